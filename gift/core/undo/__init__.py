"""All or nothing: what a network was before a change, and the way back to it."""
