"""Private parts of diffusers; see `gift.private`."""

from typing import Any


def source_of(network: Any) -> str | None:
    """Where a network of diffusers or transformers was loaded from, according to its configuration.

    Configurations of transformers have a public name for it, those of diffusers only a private one.
    Without either it is unknown, and files that would name it leave it out.
    """
    config = getattr(network, "config", None)
    values = (getattr(config, name, None) for name in ("name_or_path", "_name_or_path"))
    return next((value for value in values if value and isinstance(value, str)), None)
