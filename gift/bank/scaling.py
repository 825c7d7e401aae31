"""Multiply a delta by a number."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.delta import put_values
from gift.core.dynamic_class import joined
from gift.core.record import NetworkRecord, record_of
from gift.core.undo.undo import completed, tensor_of
from gift.core.weights.record import present_weight_deltas
from gift.errors import AdaptationError, refuse
from gift.methods.settings import is_number
from gift.support.tensors import is_finite, wide


def scale(net: Any, factor: float) -> None:
    """Multiply the active delta of `net` by `factor`, completely or not at all.

    Raises:
        ValueError: if `factor` is not finite.
        AdaptationError: naming everything with a method that cannot be scaled.
    """
    if not is_number(factor):
        raise ValueError(f"the factor is {factor!r}, expected a finite number")
    work, problems = [], []
    for path, module in net.named_modules():
        for tensor, delta in present_weight_deltas(module).items():
            if delta.owner is not None:
                continue  # reads the delta of another tensor
            method, parameters = delta.delta_of(module)
            try:
                with torch.no_grad():
                    made = method.multiplied(parameters, factor)
            except AdaptationError as error:
                problems.append(f"{joined(path, tensor)}: {error}")
                continue
            new = {delta.names[k]: v for k, v in made.items() if v is not parameters[k]}
            if not all(map(is_finite, new.values())):
                problems.append(f"{joined(path, tensor)}: its numbers would not be finite")
            work.append((module, new))
    trained = list(_trained(record_of(net), factor))
    problems += [f"{name}: its numbers would not be finite"
                 for _, name, value in trained if not is_finite(value)]  # fmt: skip
    refuse(AdaptationError, "nothing was scaled", problems)
    values = [*work, *((module, {name: value}) for module, name, value in trained)]
    completed(lambda: _put(values))


def _put(values: Iterable[tuple[nn.Module, Mapping[str, Tensor]]]) -> None:
    for module, own in values:
        put_values(module, own)


def _trained(record: NetworkRecord, factor: float) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the trained parameters with scaled differences from the base, rounded once."""
    for module, name, base in record.undo.values:
        tensor = tensor_of(module, name).detach()
        if name in module._parameters:
            far = torch.lerp(wide(base), wide(tensor), factor)  # exact for 0 and 1
            yield module, name, far.to(tensor.dtype)
