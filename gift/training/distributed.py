"""One process, or several that torchrun started: who computes what, and who writes."""

import atexit
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gift.core.weights.record import is_sharded
from gift.errors import TrainingError
from gift.private.torch import tree_map
from gift.schedules.blocks import divide
from gift.training.settings import Settings


class Processes:
    """The processes that train together.

    Args:
        settings: ``device`` and ``parallel`` count.

    Raises:
        TrainingError: for a device that is not there.
    """

    def __init__(self, settings: Settings) -> None:
        self.parallel = settings.parallel
        self.rank = rank()
        self.number = int(os.environ.get("WORLD_SIZE", 1))
        self.device = device_of(settings.device, int(os.environ.get("LOCAL_RANK", 0)))
        if self.number > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            # What was dealt out needs it as long as there is a process.
            atexit.register(dist.destroy_process_group)

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def is_sharding(self) -> bool:
        """Whether each process has a part of the parameters."""
        return self.number > 1 and self.parallel == "fsdp"

    @property
    def has_part_in_files(self) -> bool:
        """Whether this process is needed to write: it does so, or has a part of what is written."""
        return self.first or self.is_sharding

    def share(self, places: list[int]) -> tuple[list[int], bool]:
        """The part of this process, of the places of a batch.

        All processes get a part, as those who compute together must compute as often: where there
        are too few places, it is the first one and does not count (the second value is False).
        """
        own = places[self.rank :: self.number]
        return (own, True) if own else (places[:1], False)

    def sum(self, value: float | Tensor) -> float:
        """The sum of what all processes give."""
        if self.number == 1:
            return float(value)
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach().clone()
        dist.all_reduce(total)
        return total.item()

    def gathered(self, value: Any) -> list[Any]:
        """What all processes give."""
        values = [value] * self.number
        if self.number > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.number > 1:
            dist.barrier()

    def shard(self, net: nn.Module) -> None:
        """Deal out parameters and what is made of them, if that was asked for (FSDP2).

        The blocks of the network are gathered one after the other when they are needed.
        """
        if self.is_sharding:
            for part in [*_blocks(net), net]:
                _fsdp().fully_shard(part)

    def reshard(self, net: nn.Module) -> None:
        """Give each module its part of the parameters again: an evaluation leaves some whole."""
        if self.is_sharding:
            for module in net.modules():
                if isinstance(module, _fsdp().FSDPModule):
                    module.reshard()

    def model(self, net: nn.Module, compiled: bool, all_take_part: Callable[[], bool]) -> Any:
        """What is called for training: the network, or what wraps it.

        Args:
            net: the network.
            compiled: whether it is compiled.
            all_take_part: tells whether each trained parameter gets a gradient.
        """
        model: Any = torch.compile(net) if compiled else net
        if self.number == 1 or self.is_sharding:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=self.sum(not all_take_part()) > 0
        )

    @contextmanager
    def accumulating(self, model: Any, last: bool) -> Iterator[None]:
        """Gradients are exchanged with the last of the batches that one step takes together."""
        if isinstance(model, nn.parallel.DistributedDataParallel):
            with nullcontext() if last else model.no_sync():
                yield
        else:
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            yield

    def agree_on_buffers(self, net: nn.Module) -> None:
        """All take the first one's running statistics."""
        if self.number > 1:
            for buffer in net.buffers():
                if not is_sharded(buffer):
                    dist.broadcast(buffer, 0)


def rank() -> int:
    """The number of this process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


def _blocks(net: nn.Module) -> list[nn.Module]:
    """Encoder layers, residual blocks: what is dealt out as one, and tied to nothing outside."""
    try:
        names = [block.name for block in divide(net).blocks]
    except ValueError:  # no head that could be told from the blocks
        return []
    modules = dict(net.named_modules())
    parts = [modules[name] for name in names if name in modules]
    uses = _uses(net)
    alone = [part for part in parts if all(uses[key] == n for key, n in _uses(part).items())]
    return [part for part in alone if any(True for _ in part.children())]


def _uses(module: nn.Module) -> Counter[int]:
    """How often each parameter stands in a module."""
    return Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)


def _fsdp() -> Any:
    import torch.distributed.fsdp  # takes a second, and is rarely require

    return torch.distributed.fsdp


def device_of(name: str, number: int = 0) -> torch.device:
    """The device of that name; "auto" is an accelerator where there is one.

    Raises:
        TrainingError: if there is no such device.
    """
    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        name = "cpu" if found is None else found.type
        if name == "cuda":
            name = f"cuda:{number}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise TrainingError(f"there is no device {name!r} here: {error}") from None
    return device


def whole(state: Any) -> Any:
    """The same with whole tensors on the CPU; those who share them must all call this."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]  # a DTensor
            return value.detach().cpu().clone()
        return value

    return tree_map(one, state)


def sharded_like(value: Any, parameter: Tensor) -> Any:
    """A tensor of the shape of a parameter, dealt out as that is."""
    if not (isinstance(value, Tensor) and is_sharded(parameter)):
        return value
    if value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    like: Any = parameter
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
