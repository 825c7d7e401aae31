"""Helpers around networks: what is trainable, and how it prints."""
