"""Errors on loading networks by name."""

from collections.abc import Iterable

from gift.errors import NetworkError, closest, first_line


def unknown(what: str, name: str, known: Iterable[str]) -> NetworkError:
    """Create the error for a name that does not exist, with the closest ones."""
    return NetworkError(f"there is no {what} {name!r}, closest: {closest(name, known)}")


def unreachable(what: str, error: Exception) -> NetworkError:
    """Create the error for something that is neither available locally nor downloadable."""
    return NetworkError(
        f"{what} cannot be fetched: check the connection, or give weights=FILE, a file with the "
        "network's state, or weights=None for random ones "
        f"({type(error).__name__}: {first_line(error)})"
    )
