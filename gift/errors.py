"""What is raised where a network cannot be changed as asked, and how errors are told."""


class AdaptationError(ValueError):
    """A tensor cannot be adapted as asked; the message says why and what would work."""


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0]
