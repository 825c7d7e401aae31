"""The base class of all schedules: attach, step, state."""

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
from gift.schedules.state import describe_difference
from gift.support.recipes import encode

_HORIZON = 1000  # epochs that a report tries to find when a custom schedule unfreezes its blocks


@dataclass(eq=False, repr=False, kw_only=True)
class Schedule:
    """Base class of schedules, which unfreeze the blocks of a network epoch by epoch.

    A schedule drives any training loop by one call per epoch. A network has a head, which is
    trained from the start, and blocks: layers, residual blocks or encoder layers, in the order of
    registration. All blocks are frozen until they are due, and trained from then on. Schedules
    work with or without a strategy.

    A custom schedule is a subclass with one method, `due`; its settings are fields of a dataclass.

    Args:
        head: dotted path or paths of the head's modules; None is the last linear layer. It is
            trained as the strategy trains it, or completely if the strategy trains nothing in it.
            Parameters that are tied to it belong to it.
        blocks: dotted paths or globs of the blocks; None finds them. Weights outside of head and
            blocks stay frozen.
        unfreezes: what is unfrozen in a block: its own "weights" (deltas of a strategy are then
            trained throughout), the "deltas", or "all". Parameters that were frozen before
            anything was enabled or attached stay frozen.
        train_bn: how to train layers with running statistics, such as batch norm, outside of the
            head. True: train statistics and weights from the start (weights not with
            ``unfreezes="deltas"``). False: always keep them frozen, even after ``net.train()``.
            None: unfreeze them with their block.
        lr_ratio: ratio of the learning rate of unfrozen parameters to that of the head.
        depth_decay: layer-wise learning rate decay, a factor on this ratio for each step from the
            last block towards the first.

    Raises:
        ValueError: naming all settings that are out of range.

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
        """Yield what is wrong with the settings."""
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
        """Return the blocks that are trained in an epoch: those of earlier epochs, and new ones.

        Args:
            epoch: the epoch, from 0.
            blocks: names of the blocks with something to unfreeze, in the order of the network.
        """
        raise NotImplementedError

    @property
    def milestones(self) -> tuple[int, ...]:
        """Epochs at which something must be unfrozen, as far as they are known."""
        return ()

    def attach(self, net: nn.Module) -> ScheduleReport:
        """Freeze the blocks of a network; an earlier schedule of the network is removed.

        Args:
            net: any module, after `enable_fine_tuning` if that is used. It may be compiled,
                wrapped in DDP, or contain the network that is being fine-tuned. (DDP synchronizes
                the parameters that were trainable when it was made. Wrap the network before
                attaching, with ``find_unused_parameters=True``, or wrap it again whenever
                something was unfrozen.)

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
        """Detach the schedule, and restore which parameters were trained before it was attached.

        Values stay as they are, and an optimizer keeps its groups.

        Raises:
            RuntimeError: if the schedule is not attached.
        """
        attached, _ = self._checked()
        with transaction(attached.net, self):
            attached.release()
            self._attached = self._groups = None

    def step(self, epoch: int, optimizer: Any = None) -> list[str]:
        """Unfreeze what is due. Call it at the beginning of each epoch.

        Args:
            epoch: the epoch, from 0; skipped epochs are caught up.
            optimizer: optimizer that gets new parameter groups for unfrozen parameters. Each group
                copies the settings of the head's group with the most similar parameters (`lora_B`
                for `lora_B`, biases for biases), and its learning rate keeps its ratio to that
                group's rate, even if either is changed. Wrapped optimizers of accelerate and
                Lightning are accepted. An optimizer that is passed later, or another one, gets all
                groups then.

        Returns:
            The names of the blocks that were unfrozen now.

        Raises:
            RuntimeError: if the schedule is not attached, or the network was enabled since.
            ValueError: if a trained block would have to be frozen again, for example when going
                back.
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
        """Whether the schedule is attached to a network."""
        return self._attached is not None

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the head, and those tied to it."""
        attached, _ = self._checked()
        return [attached.parameter(name) for name in attached.division.head_parameters]

    @property
    def trained(self) -> list[str]:
        """The blocks unfrozen so far, in the order of the network."""
        return list(self._trained)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain data."""
        attached, groups = self._checked()
        return {
            "schedule": self._config(),
            "head": list(attached.division.head),
            "blocks": {name: list(unit.waiting) for name, unit in attached.units.items()},
            "epoch": self._epoch,
            "trained": list(self._trained),
            "groups": [{"names": list(g.names), "ratio": g.ratio} for g in groups.records],
        }

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Any = None) -> None:
        """Restore which blocks are frozen, and arrange the groups of a new optimizer.

        Call it before loading the states of network, optimizer and scheduler. It also goes back:
        blocks of a fine-tuned network that were unfrozen since get their base values back.

        Args:
            state: state from `state_dict`.
            optimizer: optimizer, created as at the start of the run.

        Raises:
            RuntimeError: if the schedule is not attached.
            ValueError: if the state belongs to another schedule or network; the error names the
                difference, and nothing is changed.
        """
        if difference := describe_difference(state, self.state_dict()):
            raise ValueError(f"the state does not fit, nothing was changed: {difference}")
        records = [Group(tuple(g["names"]), float(g["ratio"])) for g in state["groups"]]
        self._become(list(state["trained"]), state["epoch"], records, optimizer)

    def to_config(self) -> dict[str, Any]:
        """Return the schedule as plain data, for `load_schedule_from_config`.

        Raises:
            ValueError: if it was not decorated with `register_schedule`.
        """
        return encode(self, "the schedule")

    @property
    def recipe(self) -> tuple[str, dict[str, Any]]:
        """The name and arguments of the schedule in config files."""
        return type(self).__name__, {f.name: getattr(self, f.name) for f in fields(self)}

    def __repr__(self) -> str:
        own = [f for f in fields(self) if f.name not in _BASE] + [
            f for f in fields(self) if f.name in _BASE and getattr(self, f.name) != f.default
        ]
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in own)
        return f"{type(self).__name__}({shown})"

    def _config(self) -> Any:
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
        """Put network, schedule and optimizer into the state of an epoch; all of them, or none.

        Args:
            trained: blocks that are trained in that epoch.
            epoch: the epoch.
            records: groups of the optimizer.
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
        """Return the blocks that are due, in the order of the network."""
        blocks = list(attached.units)
        due = set(self.due(epoch, list(blocks)))
        if unknown := sorted(due - set(blocks)):
            close = [match for name in unknown for match in closest(name, blocks)]
            raise ValueError(
                f"at epoch {epoch}, {type(self).__name__} wants {unknown}, which are not blocks "
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
        """Return the first epoch in which each block is due."""
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
