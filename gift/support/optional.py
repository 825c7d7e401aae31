"""Import packages that only parts of gift need, at the place of use."""

import importlib
from typing import Any

from gift.version import DISTRIBUTION


def require(module: str, extra: str) -> Any:
    """Import a module that comes with one of gift's extras.

    Args:
        module: its dotted name.
        extra: the extra, as in ``pip install "gift-torch[extra]"``.

    Raises:
        ImportError: if it is not installed, saying how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # installed, but broken
        raise ImportError(f"this needs {error.name}: {install(extra)}") from error


def install(extra: str) -> str:
    """Return the command that installs gift with an extra.

    >>> install("cli")
    'pip install "gift-torch[cli]"'
    """
    return f'pip install "{DISTRIBUTION}[{extra}]"'
