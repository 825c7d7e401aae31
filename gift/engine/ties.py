"""Tied tensors: what caps do to a tensor under each of its names, and whether that agrees."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from gift.core.dynamic_class import joined
from gift.core.iterator import named_parts
from gift.core.weights.record import present_weight_deltas
from gift.engine.claims import Claimed
from gift.factories.serializable import describe
from gift.methods import Method
from gift.strategies.base import Cap


class Fate(NamedTuple):
    """What a cap does to a tensor under one of its names.

    Args:
        path: that name.
        cap: number of the cap.
        what: "trained", "frozen", or the method by which it is adapted.
        firm: whether the cap is about this tensor. False if it is only frozen because the cap
            adapts another tensor of the module, as for a bias; then another cap may train it.
    """

    path: str
    cap: int
    what: str | Method
    firm: bool = True

    def __str__(self) -> str:
        return f"adapted by {self.what}" if isinstance(self.what, Method) else self.what


class Ties:
    """The parameters that have several names, and what each cap did to them.

    Args:
        network: the network, before any cap acts.
    """

    def __init__(self, network: nn.Module) -> None:
        self.tensors = _with_several_names(network)
        self.flags = {key: p.requires_grad for key, p in self.tensors.items()}
        self.fates: dict[int, list[Fate]] = {}
        self.takers: dict[int, tuple[Cap, int, str]] = {}
        """For each claimed module or parameter, by id: the cap, its number, and the name there."""
        self.contradicted: set[int] = set()
        self._contradictions: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def forget_flags(self, parameters: Iterable[nn.Parameter | None]) -> None:
        """Restore the original ``requires_grad`` of tied parameters before a cap acts on them.

        The cap then sees what the network had rather than the result of another cap, so an action
        that does nothing trains what was trainable.
        """
        for parameter in parameters:
            if parameter is not None and id(parameter) in self.fates:
                parameter.requires_grad = self.flags[id(parameter)]

    def note_module(self, cap: Cap, claimed: Claimed) -> None:
        """Record what happened to the tied parameters of a module that a cap claimed."""
        if claimed.module is None:
            return
        gained = next(claimed.deltas(), None) is not None
        for path, part in named_parts(claimed.module, claimed.path):
            self.takers[id(part)] = cap, claimed.cap, path
            for name, parameter in part._parameters.items():
                if parameter is not None and id(parameter) in self.tensors:
                    fate = _fate(part, name, parameter)
                    firm = fate != "frozen" or not gained
                    self._note(parameter, Fate(joined(path, name), claimed.cap, fate, firm))

    def note_parameter(
        self, cap: Cap, number: int, module: nn.Module, name: str, path: str
    ) -> None:
        """Record what happened to a tied parameter that a cap claimed."""
        parameter = module._parameters.get(name)
        if parameter is not None and id(parameter) in self.tensors:
            self.takers.setdefault(id(parameter), (cap, number, path))
            self._note(parameter, Fate(path, number, _fate(module, name, parameter)))

    def _note(self, parameter: nn.Parameter, fate: Fate) -> None:
        self.fates.setdefault(id(parameter), []).append(fate)

    def takes_anew(self, cap: Cap, what: object) -> bool:
        """Whether a cap does something else than the cap that claimed the module or parameter."""
        first = self.takers.get(id(what))
        return first is None or not _same_action(first[0], cap)

    def contradict(
        self, module: nn.Module, number: int, path: str, caps: list[str], name: str = ""
    ) -> None:
        """Record that another cap claims something again under another name.

        Args:
            module: a claimed module, or one with a claimed parameter.
            number: number of the cap.
            path: the other name.
            caps: what each cap is, by its number.
            name: of the parameter.
        """
        taken = self.takers.get(id(module._parameters.get(name))) if name else None
        _, first, known = taken or self.takers[id(module)]
        what = "tensor" if name else "module"
        known = joined(known, name) if name and not taken else known
        self._contradictions.append(
            f"{path} is tied to {known or 'the network'}, which is matched by {caps[first]}; "
            f"{path} is matched by {caps[number]}; one {what} can have one"
        )

    def contradicts(
        self, cap: Cap, module: nn.Module, number: int, path: str, caps: list[str]
    ) -> bool:
        """Whether a cap would claim a module in which others adapted something under another name.

        The arguments are those of `contradict`.
        """
        adapted = [
            (part, name, joined(inside, name))
            for inside, part in named_parts(module, path)
            for name in present_weight_deltas(part)
            if self.takes_anew(cap, part) and self.takes_anew(cap, part._parameters.get(name))
        ]
        for part, name, inside in adapted:
            self.contradict(part, number, inside, caps, name)
        return bool(adapted)

    def settle(self, caps: list[str]) -> Iterator[str]:
        """Train a tensor if one cap trains it and another only froze it beside what it adapts.

        Args:
            caps: what each cap is, by its number.

        Returns:
            The contradictions, as text.
        """
        yield from dict.fromkeys(self._contradictions)
        for key, fates in self.fates.items():
            firm: list[Fate] = []
            for fate in fates:
                if fate.firm and fate.what not in [known.what for known in firm]:
                    firm.append(fate)
            if len(firm) > 1:
                self.contradicted.add(key)
                first, *others = firm
                texts = [f"{first.path} is {first} by {caps[first.cap]}"]
                texts += [f"{fate.path} is {fate} by {caps[fate.cap]}" for fate in others]
                names = " and ".join(dict.fromkeys(fate.path for fate in others))
                yield (
                    f"{names} is tied to {first.path}: {', '.join(texts)}; one tensor can have one"
                )
            elif firm and firm[0].what == "trained":
                self.tensors[key].requires_grad = True


def _fate(module: nn.Module, name: str, parameter: nn.Parameter) -> str | Method:
    if (delta := present_weight_deltas(module).get(name)) is not None:
        return delta.method
    return "trained" if parameter.requires_grad else "frozen"


def _same_action(one: Cap, other: Cap) -> bool:
    """Whether two caps do the same; compared as text, since their arguments may be tensors."""
    if one.action is not other.action:
        recipes = [getattr(cap.action, "recipe", ("",)) for cap in (one, other)]
        if not recipes[0][0] or describe(recipes[0]) != describe(recipes[1]):
            return False
    return describe(one.params) == describe(other.params)


def _with_several_names(network: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters that several modules hold, and those in a module with several names."""
    seen: set[int] = {id(network)}
    found: dict[int, nn.Parameter] = {}
    known: set[int] = set()
    for module in network.modules():
        for child in module._modules.values():
            if child is not None and id(child) in seen:
                found |= {id(p): p for p in nn.Module.parameters(child)}
            seen.add(id(child))
        for parameter in module._parameters.values():
            if parameter is not None:
                if id(parameter) in known:
                    found[id(parameter)] = parameter
                known.add(id(parameter))
    return found
