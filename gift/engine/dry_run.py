"""Dry runs: what a strategy would do, on a copy of the network with shapes but no values."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from gift.core.report import Report
from gift.core.trained import named_trainable
from gift.core.undo.snapshot import Snapshot
from gift.engine.claims import size_of
from gift.engine.enable import enable_fine_tuning
from gift.errors import GiftWarning
from gift.strategies.base import FineTuningStrategy


def on_meta(net: nn.Module) -> nn.Module:
    """Copy the network onto the meta device: shapes and ties, no values.

    Raises:
        TypeError: if `net` is not a module, or contains something that cannot be copied.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(net).__name__}")
    parameters = (p for m in net.modules() for p in m._parameters.values() if p is not None)
    memo: dict[int, Any] = {id(p): _parameter_on_meta(p) for p in parameters if not is_lazy(p)}
    try:
        with _NoValues():
            return copy.deepcopy(net, memo)
    except Exception as error:
        error.add_note(f"this {type(net).__name__} holds something that cannot be copied")
        raise


def _parameter_on_meta(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(_tensor_on_meta(parameter), requires_grad=parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    return twin


def _tensor_on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _NoValues(TorchFunctionMode):
    """Mode in which every copy of a tensor is on the meta device, wherever the tensor is found."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__deepcopy__, Tensor.clone) and not is_lazy(args[0]):
            twin = _tensor_on_meta(args[0])
            return twin if func is Tensor.clone else args[1].setdefault(id(args[0]), twin)
        return func(*args, **(kwargs or {}))


class Cost(NamedTuple):
    """The cost of what is trained and saved.

    Args:
        parameters: number of elements of the trained parameters.
        bytes: size of the state: the trained parameters and persistent buffers.
    """

    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: Any) -> "Cost":
        return Cost(self.parameters + other.parameters, self.bytes + other.bytes)


def cost_of(net: nn.Module) -> Cost:
    """The cost of a network that is being fine-tuned, tied tensors once."""
    trained = [p for _, p in named_trainable(net)]
    buffers = [
        buffer
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    saved: dict[int, Tensor] = {id(t): t for t in [*trained, *buffers] if not is_lazy(t)}
    return Cost(size_of(trained), sum(t.numel() * t.element_size() for t in saved.values()))


@contextmanager
def rehearsed(net: nn.Module, strategy: FineTuningStrategy) -> Iterator[Report]:
    """Context in which `net`, a copy without values, is fine-tuned; yields the report.

    Warnings are suppressed. They are issued when the network itself is fine-tuned.
    """
    snapshot = Snapshot(net)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng([]):
            warnings.simplefilter("ignore", GiftWarning)
            report = enable_fine_tuning(net, strategy)
        yield report
    finally:
        snapshot.rollback()
