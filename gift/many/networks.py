"""Networks that jobs do not name."""

from collections.abc import Callable
from typing import Any

from gift.jobs.networks import named_network


def counted_network(network: Callable[[], Any] | str | None) -> Any:
    """Return a network for counting its parameters; None if the job names one itself.

    Args:
        network: a function that returns one, or ``import:package.module:function``.
    """
    if network is None or callable(network):
        return None if network is None else network()
    return named_network(network, "default", None, allow_import=True)
