"""Layer types: every table that says something about a class of layers."""
