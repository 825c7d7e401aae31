"""Private parts of diffusers; see `gift.private`."""

from typing import Any


def source_of(network: Any) -> str | None:
    """Where a network of diffusers or transformers was loaded from, by its configuration.

    Configurations of transformers say it publicly, those of diffusers under a private name alone;
    without either it is not known, and files that would name it do not.
    """
    config = getattr(network, "config", None)
    told = (getattr(config, name, None) for name in ("name_or_path", "_name_or_path"))
    return next((name for name in told if name and isinstance(name, str)), None)
