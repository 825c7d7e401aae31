"""What can be wrong with a network that is asked for by name."""

from collections.abc import Iterable
from difflib import get_close_matches

from gift.errors import first_line


class NetworkError(ValueError):
    """A network that cannot be loaded; the message says what to do."""


def unknown(what: str, name: str, known: Iterable[str]) -> NetworkError:
    """The error for a name that does not exist, with the closest ones."""
    return NetworkError(
        f"there is no {what} {name!r}, closest: {get_close_matches(name, list(known), n=3)}"
    )


def unreachable(what: str, error: Exception) -> NetworkError:
    """The error for what can neither be found here nor fetched."""
    return NetworkError(
        f"{what} cannot be fetched: check the connection, or give weights=FILE, a file with the "
        "network's state, or weights=None for random ones "
        f"({type(error).__name__}: {first_line(error)})"
    )
