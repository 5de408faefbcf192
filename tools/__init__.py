"""Commands for people. Nothing imports this package."""
