"""Layer types: every table that describes a class of layers. No methods."""
