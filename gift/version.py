"""The version of gift."""

__version__ = "0.1.0"
