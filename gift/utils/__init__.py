"""Helpers for users: what is trainable, and tables of it. Only `gift.cli` imports this package."""
