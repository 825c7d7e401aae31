"""Optimizer groups of unfrozen parameters, and the entries that schedulers keep for groups."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Lists that schedulers keep for each group: learning rates, and functions or factors of them.
_RATES = ("_lr", "_lrs", "min_lrs", "max_lrs")
_OTHERS = ("lr_lambdas", "_momentums")


class Group(NamedTuple):
    """Parameters that were unfrozen together.

    Args:
        names: names of the parameters.
        ratio: ratio of their learning rate to that of similar parameters in the head.
    """

    names: tuple[str, ...]
    ratio: float


def by_rate(
    new: Iterable[str], waiting: Mapping[str, tuple[str, ...]], ratio: float, decay: float
) -> list[Group]:
    """Group the waiting parameters of some blocks by learning rate, the last blocks first.

    Args:
        new: the blocks, in the order of the network.
        waiting: names of the waiting parameters of each block of the network.
        ratio: learning rate ratio of the last block.
        decay: factor on this ratio from each block to the one before.
    """
    depths = {name: depth for depth, name in enumerate(reversed(list(waiting)))}
    found: dict[float, list[str]] = {}
    for name in new:
        found.setdefault(ratio * decay ** depths[name], []).extend(waiting[name])
    return [Group(tuple(names), own) for own, names in reversed(found.items())]


class OptimizerGroups:
    """The groups that a schedule added to one optimizer.

    Each group follows the most similar group of the head: `lora_B` that of `lora_B`, whose rate
    LoRA+ raises, biases that of biases, weights of the base that of the head's own weights, or
    else the one with the lowest rate. Just before each step of the optimizer, its learning rate is
    set to that of the group it follows times its ratio, no matter who changed either in the
    meantime.

    Args:
        optimizer: the optimizer, without wrappers.
        head: trained parameters of the head, by name.
        roles: role of each parameter in the method that added it, such as "lora_A", by name;
            parameters of the base have none.

    Raises:
        ValueError: if the optimizer has no parameter of the head, or does not support groups.
    """

    def __init__(
        self, optimizer: Optimizer, head: Mapping[str, Tensor], roles: Mapping[str, str]
    ) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError("LBFGS takes no groups of parameters, so a schedule cannot drive it")
        places = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        self._roles = roles
        # Biases and similar parameters may have their own group, without weight decay.
        self.heads: dict[tuple[str, bool], int] = {}
        for name, parameter in head.items():
            if id(parameter) in places:
                self.heads.setdefault(self._kind(name, parameter), places[id(parameter)])
        if not self.heads:
            raise ValueError(
                "the optimizer has no trained parameter of the head: make it from the parameters "
                "of the network that the schedule was attached to"
            )
        self.follows: dict[int, tuple[int, float]] = {}
        self._optimizer = weakref.ref(optimizer)
        optimizer.register_step_pre_hook(self)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, which is alive because the caller holds it."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def is_of(self, optimizer: Optimizer) -> bool:
        """Whether these are the groups of that optimizer."""
        return self._optimizer() is optimizer

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Set the learning rates, as a hook before each step of the optimizer."""
        groups = optimizer.param_groups
        for index, (followed, ratio) in self.follows.items():
            _set_rate(groups[index], "lr", groups[followed]["lr"] * ratio)

    def add(
        self, group: Group, parameters: Mapping[str, Tensor], schedulers: Iterable[LRScheduler]
    ) -> list[Group]:
        """Add a group of these parameters, and return the groups that it was split into.

        Parameters that are already in the optimizer are moved out of their groups, with their
        states. They keep the settings of their old groups (such as no weight decay), so that
        parameters of different groups stay apart. Other parameters get the settings of the group
        that they follow.
        """
        optimizer = self.optimizer
        groups = optimizer.param_groups
        places = {id(p): i for i, g in enumerate(groups) for p in g["params"]}
        own_rates = {n: _first_rate(groups[places[id(p)]]) for n, p in parameters.items()
                     if id(p) in places}  # fmt: skip
        parts: dict[tuple[int, int, float], list[str]] = {}
        for name in group.names:
            parameter = parameters[name]
            followed = self._resembled(name, parameter)
            template = places.get(id(parameter), followed)
            ratio = group.ratio * self._raised(name, own_rates)
            parts.setdefault((template, followed, ratio), []).append(name)
        made = []
        for (template, followed, ratio), names in parts.items():
            own = {id(parameters[name]) for name in names}
            if template != followed and own == {id(p) for p in groups[template]["params"]}:
                index = template  # already a group of its own, as in a copy of the optimizer
            else:
                index = len(groups)
                named = {name: parameters[name] for name in names}
                self._new(groups[template], groups[followed], named, ratio)
                for scheduler in schedulers:
                    _lengthen(scheduler, index, followed, ratio)
            self.follows[index] = (followed, ratio)
            _set_rate(groups[index], "lr", groups[followed]["lr"] * ratio)
            made.append(Group(tuple(names), group.ratio))
        return made

    def _kind(self, name: str, parameter: Tensor) -> tuple[str, bool]:
        """Return the role of a parameter, and whether it has more than one dimension."""
        return self._roles.get(name, ""), parameter.ndim > 1

    def _resembled(self, name: str, parameter: Tensor) -> int:
        """Return the group of the head with the most similar parameters."""
        role, is_matrix = self._kind(name, parameter)
        groups = self.optimizer.param_groups

        def likeness(kind: tuple[str, bool]) -> tuple[bool, bool, bool, float]:
            same_role = role != "" and kind[0] == role
            rate = _first_rate(groups[self.heads[kind]])
            return same_role, kind[1] == is_matrix, (not kind[0]) == (not role), -rate

        return self.heads[max(self.heads, key=likeness)]

    def _raised(self, name: str, rates: Mapping[str, float]) -> float:
        """Return the factor of a delta's rate over the lowest one of its layer, as in LoRA+.

        It is 1 if the head has deltas of this role, because the followed group is already raised
        then.
        """
        role = self._roles.get(name, "")
        if not role or name not in rates or any(role == known for known, _ in self.heads):
            return 1.0
        layer = name.rpartition(".")[0]
        lowest = min(
            rate
            for other, rate in rates.items()
            if other in self._roles and other.rpartition(".")[0] == layer
        )
        return rates[name] / lowest if lowest > 0 else 1.0

    def _new(
        self,
        old: dict[str, Any],
        followed: dict[str, Any],
        parameters: dict[str, Tensor],
        ratio: float,
    ) -> None:
        new = {key: copy.deepcopy(v) for key, v in old.items() if key not in _LISTS}
        for key in new:
            if key == "lr" or key.endswith("_lr"):
                new[key] = copy.deepcopy(followed.get(key, new[key])) * ratio
        own = {id(p): name for name, p in parameters.items()}
        named = "param_names" in old
        names = dict(zip(map(id, old["params"]), old["param_names"], strict=True)) if named else {}
        kept = [p for p in old["params"] if id(p) not in own]
        old["params"][:] = kept
        if named:
            old["param_names"][:] = [names[id(p)] for p in kept]
        new["params"] = [
            (names.get(id(p), name), p) if named else p for name, p in parameters.items()
        ]
        self.optimizer.add_param_group(new)


_LISTS = ("params", "param_names")


class Groups:
    """Everything that was unfrozen so far, and the optimizer that has it in groups.

    Args:
        parameter: returns the parameter of a name.
        head: names of the parameters of the head.
        roles: roles of parameters in their methods, see `OptimizerGroups`.
    """

    def __init__(
        self,
        parameter: Callable[[str], Tensor],
        head: Iterable[str],
        roles: Mapping[str, str],
    ) -> None:
        self.records: list[Group] = []
        self._parameter, self._roles = parameter, roles
        self._head = tuple(head)
        self._known: OptimizerGroups | None = None
        self._done: list[Group] = []  # the records that are already groups of that optimizer

    def parts(self, optimizer: Any) -> Iterator[Any]:
        """Yield the objects, other than schedulers, that change when groups are arranged.

        Dictionaries are included because their entries change.
        """
        yield self
        if optimizer is not None:
            inner = unwrapped(optimizer)
            yield from (inner, *inner.param_groups)
            if self._known is not None:
                yield self._known

    def rates(self, optimizer: Any) -> Iterator[Tensor]:
        """Yield learning rates that are tensors, which are modified in place."""
        for group in () if optimizer is None else unwrapped(optimizer).param_groups:
            yield from (value for value in group.values() if isinstance(value, Tensor))

    def schedulers(self, optimizer: Any, records: list[Group]) -> list[LRScheduler]:
        """Return the schedulers that must be extended, if the optimizer gets new groups."""
        if optimizer is None:
            return []
        inner = unwrapped(optimizer)
        known = self._known is not None and self._known.is_of(inner)
        has_all = len(records) == (len(self._done) if known else 0)
        return [] if has_all else list(schedulers_of(inner))

    def of(self, optimizer: Any, records: list[Group] | None = None) -> OptimizerGroups | None:
        """Return the groups of an optimizer, which may be a new one; None if there is no optimizer.

        Args:
            optimizer: the optimizer, or a wrapper of one, or None.
            records: groups that the optimizer shall have, if other than the current `records`.

        Raises:
            ValueError: if it has other groups already, or no parameter of the head.
        """
        if optimizer is None:
            return None
        inner = unwrapped(optimizer)
        if self._known is None or not self._known.is_of(inner):
            head = {name: self._parameter(name) for name in self._head}
            trained = {name: p for name, p in head.items() if p.requires_grad}
            return OptimizerGroups(inner, trained, self._roles)
        if records is not None and records[: len(self._done)] != self._done:
            raise ValueError(
                "the optimizer has groups of what was unfrozen later: make a new one to go back"
            )
        return self._known

    def arrange(
        self, groups: OptimizerGroups | None, schedulers: Iterable[LRScheduler] = ()
    ) -> None:
        """Add all records that are missing as groups to an optimizer, and extend its schedulers.

        With None, no optimizer is changed for now.
        """
        if groups is None:
            if self.records[: len(self._done)] != self._done:
                self._known, self._done = None, []
            return
        if groups is not self._known:
            self._known, self._done = groups, []
        new = self.records[len(self._done) :]
        for group in new:
            named = {name: self._parameter(name) for name in group.names}
            self._done += groups.add(group, named, schedulers)
        self.records = list(self._done)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no optimizer yet: the next step arranges the groups of the one that it
        # receives.
        return vars(self) | {"_known": None, "_done": []}


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside wrappers of accelerate and Lightning.

    Raises:
        TypeError: if there is none.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def schedulers_of(optimizer: Optimizer) -> Iterator[LRScheduler]:
    """Yield the schedulers of an optimizer, including those inside other schedulers.

    The optimizer does not know them, so this searches all objects of the garbage collector.
    """
    kinds = {LRScheduler}
    while more := {sub for kind in kinds for sub in kind.__subclasses__()} - kinds:
        kinds |= more
    for found in gc.get_objects():
        if type(found) in kinds:  # no isinstance, which could run code of arbitrary objects
            own = vars(found).get("optimizer")
            while own is not None and own is not optimizer:  # unwraps optimizers
                own = getattr(own, "optimizer", None)
            if own is optimizer:
                yield found


def _lengthen(scheduler: LRScheduler, count: int, followed: int, ratio: float) -> None:
    """Append an entry for the new group to each list that has one entry per group."""
    for name, value in vars(scheduler).items():
        if not isinstance(value, list) or len(value) != count:
            continue
        if name.endswith(_RATES):
            value.append(copy.deepcopy(value[followed]) * ratio)
        elif name.endswith(_OTHERS):
            value.append(value[followed])


def _first_rate(group: Mapping[str, Any]) -> float:
    """Return the initial learning rate of a group, which no warm-up has lowered."""
    return float(group.get("initial_lr", group["lr"]))


def _set_rate(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):  # updated in place, because a captured graph reads it
        group[key].copy_(value)
    else:
        group[key] = value
