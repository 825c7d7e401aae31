"""Private parts of diffusers; see `gift.private`."""

from typing import Any


def source_of(network: Any) -> str | None:
    """Where a network of diffusers or transformers was loaded from, by its configuration.

    Configurations of transformers say it publicly, those of diffusers under a private name alone;
    without either it is not known, and files that would name it do not.
    """
    config = getattr(network, "config", None)
    return getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None) or None
