"""Raw parameters that look like weights, in modules of classes that `gift.layers` does not know."""

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from gift.core.dynamic_class import plain_class
from gift.layers.table import row_of
from gift.quantization import is_quantised, shape_of
from gift.support.tensors import is_inexact

# Such tables (positions, tokens, biases) are looked up or added, never multiplied as a matrix.
_TABLES = re.compile(r"bias|pos|embed|token|table|latent|quer", re.IGNORECASE)


def raw_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that look like weights, in a module of a class without a layer row.

    They have at least two axes longer than one, and the first axis is longer than one. Position
    embeddings and class tokens have a first axis of length one.
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


# A raw parameter with three axes may be something else: XLNet's attention has (features, heads,
# head size). So a name must say that there are experts.
_EXPERTS = re.compile(r"expert|moe(?![a-z])|mixture", re.IGNORECASE)


def is_experts(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter stacks the weights of several experts: three axes, all longer than one.

    The class of the module, the parameter's name, or the name of an attribute that holds the number
    of experts must say so.
    """
    if parameter.ndim != 3 or is_lazy(parameter) or min(parameter.shape) < 2:
        return False
    if not is_inexact(parameter) or name not in dict(raw_weights(module)):
        return False
    numbers = (key for key, n in vars(module).items() if n == parameter.shape[0] and type(n) is int)
    names = (plain_class(type(module)).__name__, name, *numbers)
    return any(_EXPERTS.search(text) for text in names)
