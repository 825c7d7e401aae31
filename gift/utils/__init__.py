"""Helpers for users: what is trainable, and tables of it. Nothing but `gift.cli` uses them."""
