"""Training in one process, or in several that torchrun started: who computes and who writes."""

import atexit
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gift.errors import TrainingError
from gift.private.torch.containers import tree_map
from gift.schedules.blocks import divide
from gift.support.sharding import distributed_like, is_sharded
from gift.support.sharding import whole as full_tensor
from gift.training.settings import Settings


class Processes:
    """The processes that train together.

    Args:
        settings: settings of the run; only ``device`` and ``parallel`` are used.

    Raises:
        TrainingError: if the device does not exist.
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
            # Sharded parameters need the process group for as long as the process lives.
            atexit.register(dist.destroy_process_group)

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def is_sharding(self) -> bool:
        """Whether each process holds a shard of the parameters."""
        return self.number > 1 and self.parallel == "fsdp"

    @property
    def has_part_in_files(self) -> bool:
        """Whether writing needs this process: because it writes, or because it holds a shard."""
        return self.first or self.is_sharding

    def share(self, places: list[int]) -> tuple[list[int], bool]:
        """Return the positions of a batch that this process computes, and whether they count.

        Every process gets at least one, because processes that train together must run forward and
        backward equally often. A process without a position of its own gets the first one, which
        does not count (the second value is False).
        """
        own = places[self.rank :: self.number]
        return (own, True) if own else (places[:1], False)

    def sum(self, value: float | Tensor) -> float:
        """Return the sum of a value over all processes."""
        if self.number == 1:
            return float(value)
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach().clone()
        dist.all_reduce(total)
        return total.item()

    def gathered(self, value: Any) -> list[Any]:
        """Gather a value from all processes."""
        values = [value] * self.number
        if self.number > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes get here."""
        if self.number > 1:
            dist.barrier()

    def shard(self, net: nn.Module) -> None:
        """Shard the parameters over the processes (FSDP2), if requested.

        Gradients and optimizer states are sharded with them. The blocks of the network are
        gathered one after the other when they are needed.
        """
        if self.is_sharding:
            for part in [*_blocks(net), net]:
                _fsdp().fully_shard(part)

    def reshard(self, net: nn.Module) -> None:
        """Shard the parameters of each module again: evaluation leaves some of them gathered."""
        if self.is_sharding:
            for module in net.modules():
                if isinstance(module, _fsdp().FSDPModule):
                    module.reshard()

    def model(self, net: nn.Module, compiled: bool, all_take_part: Callable[[], bool]) -> Any:
        """Return the callable for training: the network, or a wrapper of it.

        Args:
            net: the network.
            compiled: whether to compile it.
            all_take_part: returns whether each trained parameter gets a gradient.
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
        """Synchronize gradients only with the last of the batches that one step accumulates."""
        if isinstance(model, nn.parallel.DistributedDataParallel):
            with nullcontext() if last else model.no_sync():
                yield
        else:
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            yield

    def agree_on_buffers(self, net: nn.Module) -> None:
        """Broadcast buffers, such as running statistics, from the first process."""
        if self.number > 1:
            for buffer in net.buffers():
                if not is_sharded(buffer):
                    dist.broadcast(buffer, 0)


def rank() -> int:
    """Return the rank of this process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


def _blocks(net: nn.Module) -> list[nn.Module]:
    """Return the blocks to shard as units: those that share no parameters with other modules."""
    try:
        names = [block.name for block in divide(net).blocks]
    except ValueError:  # no head that could be separated from the blocks
        return []
    modules = dict(net.named_modules())
    parts = [modules[name] for name in names if name in modules]
    uses = _uses(net)
    alone = [part for part in parts if all(uses[key] == n for key, n in _uses(part).items())]
    return [part for part in alone if any(True for _ in part.children())]


def _uses(module: nn.Module) -> Counter[int]:
    """Count how often each parameter occurs in a module."""
    return Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)


def _fsdp() -> Any:
    import torch.distributed.fsdp  # takes a second to import, and is rarely needed

    return torch.distributed.fsdp


def device_of(name: str, number: int = 0) -> torch.device:
    """Return the device of a given name; "auto" is an accelerator if one is available.

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
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise TrainingError(f"there is no device {name!r} here: {error}") from None
    return device


def whole(state: Any) -> Any:
    """Return the state with full tensors on the CPU; all processes must call this."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return full_tensor(value).detach().cpu().clone()
        return value

    return tree_map(one, state)


def sharded_like(value: Any, parameter: Tensor) -> Any:
    """Shard a tensor as a parameter of the same shape is sharded."""
    if not (isinstance(value, Tensor) and is_sharded(parameter)):
        return value
    if value.shape != parameter.shape:
        return value
    return distributed_like(value, parameter)
