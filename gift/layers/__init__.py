"""Layer types: every table that says something about a class of layers. No methods."""
