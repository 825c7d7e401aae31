"""What all schedules have in common: attach, step, state."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from torch import nn

from gift.core.undo.snapshot import transaction
from gift.errors import closest
from gift.schedules.attached import Attached, Unfreezes
from gift.schedules.blocks import Paths
from gift.schedules.groups import Group, Groups, by_rate
from gift.schedules.report import ScheduleReport
from gift.schedules.state import told_difference
from gift.support.recipes import encode

_HORIZON = 1000  # epochs for which a report asks an own schedule what is due


@dataclass(eq=False, repr=False, kw_only=True)
class Schedule:
    """When the blocks of a network are unfrozen; drives any loop by one call per epoch.

    A network has a head, which is trained from the start, and blocks: layers, residual blocks,
    encoder layers, in the order in which they are registered. All blocks wait, frozen, until they
    are due; then they stay trained. It works on top of a strategy, or of none.

    An own schedule is a subclass with one method, `due`; its settings are fields of a dataclass.

    Args:
        head: dotted path or paths of the head's modules; None is the last linear layer. It is
            trained as the strategy trains it, and whole if that trains nothing in it. What is tied
            to it belongs to it.
        blocks: dotted paths or globs of what shall be a block; None finds them. Weights outside of
            all these stay frozen.
        unfreezes: what waits in a block: its own "weights" (deltas of a strategy train
            throughout), the "deltas", or "all". What was frozen before anything was enabled or
            attached stays so.
        train_bn: layers with running statistics outside of the head. True: they are trained from
            the start, statistics and weights (the latter not by ``unfreezes="deltas"``). False:
            they stand still always, whatever ``net.train()`` says. None: they follow their block.
        lr_ratio: learning rate of unfrozen parameters, in units of the head's.
        depth_decay: factor on that for each block between a block and the last one.

    Raises:
        ValueError: for settings out of range; all of them are named.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift.schedules import Schedule
        >>> class OneMoreEachEpoch(Schedule):
        ...     def due(self, epoch, blocks):
        ...         return blocks[-epoch:] if epoch else []
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> schedule = OneMoreEachEpoch()
        >>> report = schedule.attach(net)
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        >>> [schedule.step(epoch, optimizer) for epoch in range(3)]
        [[], ['2'], ['0']]
    """

    head: Paths = None
    blocks: Paths = None
    unfreezes: Unfreezes = "weights"
    train_bn: bool | None = True
    lr_ratio: float = 0.1
    depth_decay: float = 1.0

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))
        self.head, self.blocks = _plain(self.head), _plain(self.blocks)
        self._attached: Attached | None = None
        self._trained: list[str] = []
        self._epoch: int | None = None
        self._groups: Groups | None = None

    def problems(self) -> Iterable[str]:
        """What is wrong with the settings."""
        if self.unfreezes not in ("weights", "deltas", "all"):
            yield f"unfreezes is {self.unfreezes!r}, expected 'weights', 'deltas' or 'all'"
        if self.train_bn not in (True, False, None):
            yield f"train_bn is {self.train_bn!r}, expected True, False or None"
        for name in ("lr_ratio", "depth_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or (
                not isfinite(value) or value <= 0
            ):  # fmt: skip
                yield f"{name} is {value!r}, expected a number above 0"

    def due(self, epoch: int, blocks: Sequence[str]) -> Iterable[str]:
        """The blocks that are trained in an epoch: those of all epochs before, and new ones.

        Args:
            epoch: from 0.
            blocks: names of those in which something waits, the first of the network first.
        """
        raise NotImplementedError

    @property
    def milestones(self) -> tuple[int, ...]:
        """Epochs at which something must be unfrozen, as far as that is known."""
        return ()

    def attach(self, net: nn.Module) -> ScheduleReport:
        """Freeze the blocks of a network; a schedule that it had before is taken off.

        Args:
            net: any module, after `enable_fine_tuning` if that is used. A compiled network, one in
                DDP, and one that contains what is being fine-tuned will do. (DDP synchronises what
                was trainable when it was made: make it before this, with
                ``find_unused_parameters=True``, or anew whenever something was unfrozen.)

        Returns:
            Head and blocks, and when each is unfrozen; it prints as a table.

        Raises:
            ValueError: if a milestone would unfreeze nothing, or paths are not in the network.
            AdaptationError: naming weights that cannot be trained as they are.
        """
        if not isinstance(net, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(net).__name__}")
        with transaction(net, self, open=True):
            attached = Attached(net, self.head, self.blocks, self.unfreezes, self.train_bn)
            self._check_milestones(attached)
            epochs = self._epochs(attached)
            attached.freeze()
            self._attached, self._trained, self._epoch = attached, [], None
            head = attached.division.head_parameters
            self._groups = Groups(attached.parameter, head, attached.roles())
            return attached.report(repr(self), epochs)

    def detach(self) -> None:
        """Take the schedule off: what was frozen before is frozen again, what it froze is trained.

        Values stay, and an optimizer keeps its groups.

        Raises:
            RuntimeError: if the schedule is not attached.
        """
        attached, _ = self._checked()
        with transaction(attached.net, self):
            attached.release()
            self._attached = self._groups = None

    def step(self, epoch: int, optimizer: Any = None) -> list[str]:
        """Unfreeze what is due: call it at the beginning of each epoch.

        Args:
            epoch: from 0; those that were left out are made up for.
            optimizer: gets new groups for what is unfrozen, each with the settings of the head's
                group that has the most similar parameters (that of `lora_B` for `lora_B`, of biases
                for biases) and a learning rate that stays in its ratio to that group's, whoever
                changes it.
                Wrappers of accelerate and Lightning will do. Given later, or another one, it gets
                all groups then.

        Returns:
            The names of the blocks that were unfrozen now.

        Raises:
            RuntimeError: if the schedule is not attached, or the network was enabled since.
            ValueError: if something trained should be frozen again, as when going back.
        """
        attached, groups = self._checked()
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch is {epoch!r}, expected an integer from 0")
        due = self._due(epoch, attached)
        if back := [name for name in self._trained if name not in due]:
            raise ValueError(
                f"{back} are trained since epoch {self._epoch} or before, but not due at epoch "
                f"{epoch}: a schedule only unfreezes (load_state_dict goes back)"
            )
        new = [name for name in due if name not in self._trained]
        waiting = {name: unit.waiting for name, unit in attached.units.items()}
        records = [*groups.records, *by_rate(new, waiting, self.lr_ratio, self.depth_decay)]
        self._become(due, epoch, records, optimizer)
        return new

    @property
    def is_attached(self) -> bool:
        """Whether it has a network."""
        return self._attached is not None

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the head, and of what is tied to it."""
        attached, _ = self._checked()
        return [attached.parameter(name) for name in attached.division.head_parameters]

    @property
    def trained(self) -> list[str]:
        """The blocks that were unfrozen so far, in the order of the network."""
        return list(self._trained)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run must know, as plain data."""
        attached, groups = self._checked()
        return {
            "schedule": self._told(),
            "head": list(attached.division.head),
            "blocks": {name: list(unit.waiting) for name, unit in attached.units.items()},
            "epoch": self._epoch,
            "trained": list(self._trained),
            "groups": [{"names": list(g.names), "ratio": g.ratio} for g in groups.records],
        }

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Any = None) -> None:
        """Freeze and unfreeze as it was, and arrange the groups of a new optimizer.

        Call it before the states of network, optimizer and scheduler are loaded. It also goes back:
        blocks of a fine-tuned network that were unfrozen since have the values of the base again.

        Args:
            state: from `state_dict`.
            optimizer: made as at the start of the run.

        Raises:
            RuntimeError: if the schedule is not attached.
            ValueError: naming where the state is that of another schedule or network; nothing is
                changed then.
        """
        if difference := told_difference(state, self.state_dict()):
            raise ValueError(f"the state does not fit, nothing was changed: {difference}")
        records = [Group(tuple(g["names"]), float(g["ratio"])) for g in state["groups"]]
        self._become(list(state["trained"]), state["epoch"], records, optimizer)

    def to_config(self) -> dict[str, Any]:
        """The schedule as plain data, for `load_schedule_from_config`.

        Raises:
            ValueError: if it was not decorated with `register_schedule`.
        """
        return encode(self, "the schedule")

    @property
    def recipe(self) -> tuple[str, dict[str, Any]]:
        """The name and arguments under which a file can name the schedule."""
        return type(self).__name__, {f.name: getattr(self, f.name) for f in fields(self)}

    def __repr__(self) -> str:
        own = [f for f in fields(self) if f.name not in _BASE] + [
            f for f in fields(self) if f.name in _BASE and getattr(self, f.name) != f.default
        ]
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in own)
        return f"{type(self).__name__}({shown})"

    def _told(self) -> Any:
        settings = {k: v for k, v in self.recipe[1].items() if not callable(v)}
        return {"name": type(self).__name__, "init_paras": encode(settings)}

    def _checked(self) -> tuple[Attached, Groups]:
        if self._attached is None or self._groups is None:
            raise RuntimeError("the schedule is not attached: call schedule.attach(net) first")
        self._attached.check()
        return self._attached, self._groups

    def _become(
        self, trained: list[str], epoch: int | None, records: list[Group], optimizer: Any
    ) -> None:
        """Let network, schedule and optimizer be those of an epoch; all of them, or none.

        Args:
            trained: the blocks that are trained then.
            epoch: the epoch.
            records: the groups of the optimizer.
            optimizer: as for `step`.
        """
        attached, groups = self._checked()
        back = [name for name in self._trained if name not in trained]
        new = [name for name in trained if name not in self._trained]
        schedulers = groups.schedulers(optimizer, records)
        parts = list(groups.parts(optimizer))
        written = [*groups.rates(optimizer), *attached.waiting_in(back)]
        with transaction(attached.net, self, *parts, *schedulers, writes=written):
            entry = groups.of(optimizer, records)
            attached.freeze_again(back)
            attached.unfreeze(new)
            self._trained, self._epoch = trained, epoch
            groups.records = records
            groups.arrange(entry, schedulers)

    def _due(self, epoch: int, attached: Attached) -> list[str]:
        """The blocks that are due, in the order of the network."""
        blocks = list(attached.units)
        due = set(self.due(epoch, list(blocks)))
        if unknown := sorted(due - set(blocks)):
            close = [match for name in unknown for match in closest(name, blocks)]
            raise ValueError(
                f"at epoch {epoch}, {type(self).__name__} wants {unknown}, which are no blocks "
                f"where something waits{f'; closest names: {close}' if close else ''}"
            )
        return [name for name in blocks if name in due]

    def _check_milestones(self, attached: Attached) -> None:
        for epoch in self.milestones:
            before = self._due(epoch - 1, attached) if epoch else []
            if set(self._due(epoch, attached)) <= set(before):
                raise ValueError(
                    f"{self!r} would unfreeze nothing at epoch {epoch}: {attached.what_there_is()}"
                )

    def _epochs(self, attached: Attached) -> dict[str, int]:
        """When each block is due for the first time."""
        found: dict[str, int] = {}
        for epoch in sorted({*range(_HORIZON), *self.milestones}):
            for name in self._due(epoch, attached):
                found.setdefault(name, epoch)
            if len(found) == len(attached.units):
                break
        return found


_BASE = {f.name for f in fields(Schedule)}


def _plain(paths: Paths) -> Paths:
    return paths if paths is None or isinstance(paths, str) else tuple(paths)
