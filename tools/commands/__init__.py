"""One module a verb of `sscloud`; heavy imports live inside `run`."""
