"""`sscloud cycle --simulate`: the whole loop with sampled scenes and an oracle in place of people."""
