"""What is raised where a network cannot be changed as asked."""


class AdaptationError(ValueError):
    """A tensor cannot be adapted as asked; the message says why and what would work."""
