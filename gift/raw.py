"""Raw parameters that look like weights, in modules of classes that `gift.layers` does not know."""

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from gift.generated import plain_class
from gift.layers import row_of
from gift.quantised import is_quantised, shape_of
from gift.tensors import is_inexact

# Tables of positions, tokens and biases are looked up or added: no matrix of them is multiplied.
_TABLES = re.compile(r"bias|pos|embed|token|table|latent|quer", re.IGNORECASE)


def raw_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module of unknown class that look like weights, with their names.

    They have at least two axes, and a first one that is longer than one, which position embeddings
    and class tokens of networks do not have.
    """
    if isinstance(module, ParametrizationList) or row_of(plain_class(type(module))) is not None:
        return
    for name, parameter in module._parameters.items():
        if parameter is None or is_lazy(parameter) or _TABLES.search(name):
            continue
        shape = shape_of(parameter)
        longer = sum(length > 1 for length in shape)
        counts = is_inexact(parameter) or is_quantised(parameter)
        if counts and len(shape) > 1 and shape[0] > 1 and longer > 1:
            yield name, parameter


def is_experts(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the weights of several experts in one: three axes, all above one."""
    if parameter.ndim != 3 or is_lazy(parameter) or min(parameter.shape) < 2:
        return False
    return is_inexact(parameter) and name in dict(raw_weights(module))
