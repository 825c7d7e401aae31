"""Small tools for networks."""

from collections.abc import Iterator

from torch import nn

from gift.core.trained import named_trainable


def trainable_parameters(net: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that are trained, whatever ``net.parameters()`` returns.

    Example:
        >>> from torch import nn
        >>> from gift.utils.network_tool import trainable_parameters
        >>> len(list(trainable_parameters(nn.Linear(3, 2))))
        2
    """
    return (parameter for _, parameter in named_trainable(net))
