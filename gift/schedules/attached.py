"""A network under a schedule: freezes and unfreezes blocks, with or without a strategy."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gift.core.delta import present_deltas
from gift.core.dynamic_class import joined, plain_class, spec_of
from gift.core.frozen_norms import freeze_statistics, release_statistics
from gift.core.holders import unmovable
from gift.core.trained import delta_names
from gift.core.undo.temporary_state import refuse_meanwhile
from gift.core.unfreeze import (
    flags_of_the_base,
    hold_frozen,
    refreeze,
    unfreeze,
    untrainable,
)
from gift.engine.claims import size_of
from gift.errors import AdaptationError, some
from gift.private.torch.calls import COMPILED
from gift.quantization import is_quantised
from gift.schedules.blocks import Block, Division, divide
from gift.schedules.flags import release, remember, set_flags
from gift.schedules.report import Row, ScheduleReport
from gift.support.tensors import is_inexact

Unfreezes = Literal["weights", "deltas", "all"]
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module",
             "OptimizedModule": COMPILED}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A block and its parameters that wait to be unfrozen.

    Args:
        block: the block.
        waiting: names of the parameters that are trained once the block is unfrozen.
        still: paths of the layers whose running statistics are updated from then on.
    """

    block: Block
    waiting: tuple[str, ...]
    still: tuple[str, ...] = ()


class Attached:
    """The network to which a schedule is attached, and how it is divided.

    Constructing it removes an earlier schedule from the network; nothing else changes before
    `freeze`.

    Args:
        net: the network, or a wrapper of it, or a module that contains the network that is being
            fine-tuned.
        head, blocks, unfreezes, train_bn: as in `gift.schedules.Schedule`.

    Raises:
        ValueError: if paths are not in the network.
        AdaptationError: naming weights that would wait but cannot be trained as they are.
    """

    def __init__(
        self, net: nn.Module, head: Any, blocks: Any, unfreezes: Unfreezes, train_bn: bool | None
    ) -> None:
        while (inside := _WRAPPERS.get(type(net).__name__)) is not None:
            net = getattr(net, inside)
        refuse_meanwhile(net)
        parts = {path: m for path, m in net.named_modules() if spec_of(m).network}
        if len(parts) > 1:
            raise ValueError(f"several parts are being fine-tuned: {sorted(parts)}; attach to one")
        self.net = net
        self.prefix: str = next(iter(parts), "")
        self.part: nn.Module | None = parts.get(self.prefix)
        self.record = self._record()
        release(self.part or net)
        self.unfreezes, self.train_bn = unfreezes, train_bn
        self.division: Division = divide(net, head, blocks)
        self.deltas = (
            {joined(self.prefix, n) for n in delta_names(self.part or net)} if parts else set()
        )
        self.base = self._flags_of_the_base()
        self.norms = self._norm_parameters()
        units = [Unit(b, tuple(self._waiting(b)), b.norms) for b in self.division.blocks]
        self.units = {unit.block.name: unit for unit in units if unit.waiting}
        self._follow(units)
        self._refuse()

    def _record(self) -> Any:
        return None if self.part is None else self.part.__dict__.get("_gift_network")

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of that name itself, rather than the effective weight."""
        path, _, own = name.rpartition(".")
        parameter = self.net.get_submodule(path)._parameters[own]
        assert parameter is not None
        return parameter

    def roles(self) -> dict[str, str]:
        """Return the role of each delta parameter in its method, by its full name."""
        return {
            joined(path, name): key
            for path, module in self.net.named_modules(remove_duplicate=False)
            for delta in present_deltas(module).values()
            if delta.owner is None
            for key, name in delta.names.items()
        }

    def check(self) -> None:
        """Check that the network is still in the state in which it was attached.

        Raises:
            RuntimeError: if its fine-tuning was enabled, disabled or merged since.
        """
        fine_tuned = any(spec_of(m).network for m in self.net.modules())
        if self._record() is not self.record or fine_tuned != (self.part is not None):
            raise RuntimeError(
                "the network was enabled, disabled or merged since the schedule was attached: "
                "attach it after enable_fine_tuning, outside of with blocks"
            )

    def _flags_of_the_base(self) -> dict[str, bool]:
        """For each parameter, whether it was trainable before anything froze it."""
        named = self.net.named_parameters(remove_duplicate=False)
        flags = {name: p.requires_grad for name, p in named}
        if self.part is not None:
            inside = flags_of_the_base(self.part)
            flags |= {joined(self.prefix, name): flag for name, flag in inside.items()}
        return flags

    def _norm_parameters(self) -> dict[str, list[str]]:
        """Return the layers with running statistics outside of the head, and their parameters."""
        head, found = set(self.division.head_parameters), dict[str, list[str]]()
        for path in self._norm_layers():
            layer = self.net.get_submodule(path)
            names = [joined(path, name) for name in layer._parameters]
            own = [n for n in names if n in self.base and n not in self.deltas and n not in head]
            found[path] = own
        return found

    def _norm_layers(self) -> Iterator[str]:
        yield from (path for block in self.division.blocks for path in block.norms)
        yield from self.division.rest_norms

    def _waiting(self, block: Block) -> Iterator[str]:
        aside = {n for names in self.norms.values() for n in names}
        aside = aside if self.train_bn is not None else set()
        chosen = self.record.chosen if self.record is not None else set()
        for name in block.parameters:
            if name in self.deltas:
                waits = self.unfreezes != "weights"
                known = name.removeprefix(f"{self.prefix}.") if self.prefix else name
                if waits and (known in chosen or self.parameter(name).requires_grad):
                    yield name
            elif self.unfreezes != "deltas" and name not in aside and self._is_trainable(name):
                yield name

    def _is_trainable(self, name: str) -> bool:
        """Whether a parameter was trainable in the base, and is not quantized."""
        parameter = self.parameter(name)
        return self.base[name] and not is_quantised(parameter) and is_inexact(parameter)

    def _follow(self, units: list[Unit]) -> None:
        """Assign statistics of blocks with nothing waiting to the previous block, or the next."""
        counted = list(self.units)
        last = counted[0] if counted else None
        for unit in units:
            name = unit.block.name
            if name in self.units:
                last = name
            elif last is not None and unit.still:
                other = self.units[last]
                self.units[last] = Unit(other.block, other.waiting, other.still + unit.still)

    def _refuse(self) -> None:
        wanted = self._later()
        where = self.part or self.net
        reasons = {joined(self.prefix, n): why for n, why in untrainable(where).items()}
        found = [f"{name}: {reasons[name]}" for name in reasons if name in wanted]
        self._refuse_to_train(found)

    @staticmethod
    def _refuse_to_train(found: list[str]) -> None:
        if found:
            more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
            raise AdaptationError(
                "these weights would wait, but cannot be trained as they are (unfreezes='deltas' "
                "leaves them alone):\n  " + "\n  ".join(found[:5]) + more
            )

    def freeze(self) -> None:
        """Freeze all blocks; train the head, and norm layers as requested."""
        remember(self.part or self.net, self.net)
        wait = {name for unit in self.units.values() for name in unit.waiting}
        train: set[str] = set()
        for path, names in self.norms.items():
            if self.train_bn is not True:
                self._hold(path)
            if self.train_bn is False:
                wait |= set(names)
            elif self.train_bn and self.unfreezes != "deltas":
                train |= {name for name in names if self._is_trainable(name)}
        if self.unfreezes != "deltas":
            wait |= {n for n in self.division.rest if n not in self.deltas} - train
        head = self.division.head_parameters
        if not any(self.parameter(name).requires_grad for name in head):
            train |= {n for n in head if n not in self.deltas and self._is_trainable(n)}
        self._let_wait(wait - train)
        self._train(train)
        later = self._later()  # flags are known now, and the caller's transaction undoes them
        self._refuse_to_train(unmovable(self.net, later, later))

    def unfreeze(self, names: Iterable[str]) -> None:
        """Unfreeze the waiting parameters of these blocks."""
        for name in names:
            self._train(self.units[name].waiting)
            for path in self.units[name].still if self.train_bn is None else ():
                self._let_move(path)

    def waiting_in(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Return the parameters that are trained once these blocks are unfrozen."""
        return [self.parameter(n) for name in names for n in self.units[name].waiting]

    def freeze_again(self, names: Iterable[str]) -> None:
        """Undo `unfreeze`; base parameters of a fine-tuned network get their base values back."""
        waiting = {n for name in names for n in self.units[name].waiting}
        inside, outside = self._sorted(waiting)
        if self.part is not None:
            refreeze(self.part, inside)
        set_flags(outside, False)
        for name in names:
            for path in self.units[name].still if self.train_bn is None else ():
                self._hold(path)

    def _hold(self, path: str) -> None:
        """Freeze the running statistics of a layer, if they are not frozen already."""
        layer = self.net.get_submodule(path)
        if not spec_of(layer).statistics:
            freeze_statistics(layer)
            self._noted["still"] = [*self._noted["still"], layer]  # so that it can be undone

    def _let_move(self, path: str) -> None:
        """Undo `_hold`; statistics that a strategy froze stay frozen."""
        layer = self.net.get_submodule(path)
        held = self._noted["still"]
        if any(layer is other for other in held):
            self._noted["still"] = [other for other in held if other is not layer]
            release_statistics(layer)

    @property
    def _noted(self) -> dict[str, Any]:
        """What `remember` recorded on the network."""
        return (self.part or self.net).__dict__["_gift_schedule"]

    def _train(self, names: Iterable[str]) -> None:
        names = list(names)
        self._refuse_to_train(unmovable(self.net, names, self._later()))  # others may share it now
        inside, outside = self._sorted(names)
        if self.part is not None:
            unfreeze(self.part, inside)
        set_flags(outside, True)

    def _later(self) -> set[str]:
        """Names of all parameters that wait, or have waited."""
        return {name for unit in self.units.values() for name in unit.waiting}

    def _let_wait(self, names: Iterable[str]) -> None:
        inside, outside = self._sorted(names)
        if self.part is not None:
            hold_frozen(self.part, inside)
        set_flags(outside, False)

    def _sorted(self, names: Iterable[str]) -> tuple[list[str], list[nn.Parameter]]:
        """Split names into those in the fine-tuned part, and the parameters outside of it."""
        dot = f"{self.prefix}." if self.prefix else ""
        mine = [n for n in names if self.part is not None and n.startswith(dot)]
        own = set(mine)
        return [n.removeprefix(dot) for n in mine], [
            self.parameter(name) for name in names if name not in own
        ]

    def report(self, schedule: str, epochs: dict[str, int]) -> ScheduleReport:
        """Return head and blocks, and when each is unfrozen; call it once everything is frozen."""
        division = self.division
        head = [self._row(path, (), self._in_head(path), None) for path in division.head]
        blocks = [
            self._row(b.name, self._waits(b), b.parameters, epochs.get(b.name), b.class_name)
            for b in division.blocks
        ]
        kind, rest = type(self.net).__name__, size_of(map(self.parameter, division.rest))
        return ScheduleReport(schedule, kind, tuple(head), tuple(blocks), rest)

    def release(self) -> None:
        """Undo `freeze`, and everything that was unfrozen since."""
        release(self.part or self.net)

    def _waits(self, block: Block) -> tuple[str, ...]:
        return self.units[block.name].waiting if block.name in self.units else ()

    def _in_head(self, path: str) -> list[str]:
        names = self.division.head_parameters
        own = [name for name in names if name.startswith(f"{path}.") or not path]
        others = [n for n in names if not any(n.startswith(f"{p}.") for p in self.division.head)]
        return own + (others if path == self.division.head[0] and path else [])

    def _row(
        self,
        name: str,
        waiting: Iterable[str],
        names: Iterable[str],
        epoch: int | None,
        class_name: str = "",
    ) -> Row:
        kind = class_name or plain_class(type(self.net.get_submodule(name))).__name__
        all_parameters = [self.parameter(n) for n in names]
        trained = size_of(p for p in all_parameters if p.requires_grad)
        return Row(name, kind, size_of(map(self.parameter, waiting)), trained, epoch)

    def what_there_is(self) -> str:
        """Explain in an error why so few parameters wait."""
        own = [n for b in self.division.blocks for n in b.parameters if n not in self.deltas]
        deltas = [n for b in self.division.blocks for n in b.parameters if n in self.deltas]
        packed = [n for n in own if is_quantised(self.parameter(n))]
        frozen = [n for n in own if not self.base[n] and n not in packed]
        return (
            f"unfreezes={self.unfreezes!r} finds {len(self.units)} blocks in which something waits"
            f" ({some(list(self.units)) or 'none'}); the backbone has "
            f"{len(self.division.blocks)} blocks with {len(own)} parameters of its own, "
            f"{len(packed)} of them packed by quantising and {len(frozen)} that were frozen "
            f"before, and {len(deltas)} of deltas"
        )
