"""Apply the caps of a strategy to a network, from the root down."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gift.core.delta import remove_tensor
from gift.core.dynamic_class import joined, plain_class
from gift.core.forwards import settle_modules_around
from gift.core.iterator import ModuleIterator, named_parts
from gift.core.weights.attach import install, uninstall
from gift.core.weights.record import WeightDelta, weight_deltas
from gift.engine.claims import Claimed, claims_of, placed_deltas
from gift.engine.ties import Ties
from gift.errors import AdaptationError, closest
from gift.factories import Action
from gift.factories.serializable import Recorded, bind
from gift.layers.table import layout_of
from gift.methods import Method
from gift.strategies.base import Cap, FineTuningStrategy

Place = tuple[nn.Module | None, str, str, str, nn.Module]
Caps = tuple[list[Cap], list[Cap]]
Guard = Callable[[], AbstractContextManager[Any]]
Visit = Callable[[Caps, Place, int | None], None]


class Walk:
    """One pass over a network.

    An `open` action (a wrapper) leaves its module open to other caps: the caps after it are tried
    on the same module, and the walk continues below it. The action runs after all of that. It
    therefore finds the module as the other caps left it, and what it adds does not belong to them.

    Args:
        network: the network.
        strategy: the strategy whose caps are applied.
        guard: returns the context in which actions of other authors run.
    """

    def __init__(self, network: nn.Module, strategy: FineTuningStrategy, guard: Guard) -> None:
        self.network = network
        self.guard = guard
        self.taken: list[Claimed] = []
        self.problems: list[str] = []
        self.kept: set[int] = set()  # ids of the parameters that caps claimed
        self.done: dict[int, nn.Module | None] = {}  # by id of a claimed module: its replacement
        self.extended: dict[int, str] = {}  # paths of modules of open actions, by id
        self.ties = Ties(network)
        self.caps = strategy.cap_texts if self.ties else []
        caps = self._caps_for(strategy, network)
        self._visit(caps, (None, "", "", _class_name(network), network), None)
        self.problems += self.ties.settle(self.caps)
        self._tie()
        if self.extended:
            settle_modules_around(network)
        self.clipped: dict[str, tuple[str, int]] = {}  # weights without the requested size
        self._settle_sizes()
        self.claims = claims_of(self.taken)

    def _caps_for(self, strategy: FineTuningStrategy, module: nn.Module) -> Caps:
        types = strategy.constraint_type
        if types and not isinstance(module, types):
            raise TypeError(
                f"{type(strategy).__name__} is for {' or '.join(t.__name__ for t in types)}, "
                f"the network is {_class_name(module)}"
            )

        def bound(caps: Iterable[Cap]) -> list[Cap]:
            return [
                Cap(bind(c.check, module), bind(c.action, module), c.params)  # type: ignore[arg-type]
                for c in caps
            ]

        return bound(strategy.module_caps), bound(strategy.para_caps)

    def _visit(self, caps: Caps, place: Place, top: int | None) -> None:
        """Visit a module and all modules in it; claims are credited to the cap `top`, if given."""
        parent, name, _, _, module = place
        if id(module) in self.done:
            self._look_again(caps, place, top)
            self._put_replacement(parent, name, module)
            return
        extending: list[tuple[Cap, int]] = []
        for number, cap in enumerate(caps[0]):
            if not self._matches(cap, f"module cap {number}", place):
                continue
            credited = number if top is None else top
            if getattr(cap.action, "open", False) is not True:
                self._claim(cap, place, credited)
                break
            extending.append((cap, credited))
        else:
            self._descend(caps, place, top)
        for cap, credited in extending:
            self._extend(cap, place, credited)

    def _descend(
        self, caps: Caps, place: Place, top: int | None, visit: Visit | None = None
    ) -> None:
        """Offer the parameters of a module that no cap claimed to caps, then visit its children."""
        module_caps, para_caps = caps
        module = place[4]
        for parameter_name, parameter in list(module._parameters.items()):
            if parameter is not None:
                self._offer(para_caps, len(module_caps), (*place, parameter_name, parameter), top)
        for child_name, path, class_name, child, _ in list(ModuleIterator(module, place[2])):
            (visit or self._visit)(caps, (module, child_name, path, class_name, child), top)

    def _look_again(self, caps: Caps, place: Place, top: int | None) -> None:
        """Check a claimed module under another name: no other cap may claim it or its contents."""
        module = place[4]
        for number, cap in enumerate(caps[0]):
            if getattr(cap.action, "open", False) is True:
                continue
            if not self._matches(cap, f"module cap {number}", place):
                continue
            credited = number if top is None else top
            if isinstance(cap.action, FineTuningStrategy):
                self._look_again(self._caps_for(cap.action, module), place, credited)
            elif self.ties.takes_anew(cap, module):
                self.ties.contradict(module, credited, place[2], self.caps)
            return
        self._descend(caps, place, top, self._look_again)

    def _put_replacement(self, parent: nn.Module | None, name: str, module: nn.Module) -> None:
        replacement = self.done[id(module)]
        if parent is not None and replacement is not None and replacement is not module:
            parent._modules[name] = replacement

    def _claim(self, cap: Cap, place: Place, number: int) -> None:
        parent, name, path, class_name, module = place
        if isinstance(cap.action, FineTuningStrategy):
            self._visit(self._caps_for(cap.action, module), place, number)
            return
        if self.ties:
            if self.ties.contradicts(cap, module, number, path, self.caps):
                return
            self.ties.forget_flags(nn.Module.parameters(module))
        self._run(cap, place, path)
        now = module if parent is None else parent._modules.get(name)
        self.done[id(module)] = now
        if now is not None:
            for _, part in named_parts(now):
                self.done[id(part)] = part
                self.kept.update(map(id, part._parameters.values()))
        self.taken.append(Claimed(number, path, class_name, now, replaced=now is not module))
        if self.ties:
            self.ties.note_module(cap, self.taken[-1])

    def _extend(self, cap: Cap, place: Place, number: int) -> None:
        """Run an open action on the module at `place`, after everything else there is done."""
        parent, name, path, class_name, module = place
        now = module if parent is None else parent._modules.get(name)
        if now is None:
            self.problems.append(f"{path} ({class_name}): {cap!r} has nothing to act on, as a "
                                 "later cap removed the module")  # fmt: skip
            return
        if self.extended.setdefault(id(now), path) != path:
            return  # done already, under its first name
        before = {id(delta) for *_, delta in placed_deltas(now)}
        self._run(cap, (parent, name, path, _class_name(now), now), path)
        gained = [d for d in placed_deltas(now, path) if id(d[2]) not in before]
        self.taken.append(Claimed(number, path, class_name, now, gained=tuple(gained)))

    def _offer(
        self, caps: list[Cap], offset: int, place: tuple[Any, ...], top: int | None
    ) -> None:  # fmt: skip
        *_, module, name, parameter = place
        for number, cap in enumerate(caps):
            if not self._matches(cap, f"parameter cap {number}", place):
                continue
            number = offset + number if top is None else top
            path = joined(place[2], name)
            if isinstance(cap.action, FineTuningStrategy):
                self._offer(self._caps_for(cap.action, module)[1], 0, place, number)
                return
            if id(parameter) in self.kept:
                self._offer_again(cap, place, path, number)
                return
            self.kept.add(id(parameter))
            self._run(cap, place, path)
            self.ties.note_parameter(cap, number, module, name, path)
            self.taken.append(Claimed(number, path, place[3], module, parameter=name))
            return

    def _offer_again(self, cap: Cap, place: tuple[Any, ...], path: str, number: int) -> None:
        """Let a cap act on a parameter that was claimed under another name, if they agree."""
        *_, module, name, parameter = place
        if id(parameter) not in self.ties.tensors or not self.ties.takes_anew(cap, parameter):
            return
        if name in weight_deltas(module):
            self.ties.contradict(module, number, path, self.caps, name)
            return
        self.ties.forget_flags([parameter])
        self._run(cap, place, path)
        self.ties.note_parameter(cap, number, module, name, path)

    def _matches(self, cap: Cap, label: str, place: tuple[Any, ...]) -> bool:
        try:
            return bool(cap.check(*place))
        except Exception as error:
            where = joined(place[2], *place[5:6]) or "the network"
            error.add_note(f"raised by the check of {cap!r} ({label}) on {where}")
            raise

    def _run(self, cap: Cap, place: tuple[Any, ...], path: str) -> None:
        try:
            with nullcontext() if isinstance(cap.action, Action) else self.guard():
                cap.action(*place, **cap.params)  # type: ignore[operator]
        except AdaptationError as error:  # collect all of these, raise once
            self.problems.append(f"{path or 'the network'} ({place[3]}): {error}")
        except Exception as error:
            error.add_note(f"raised by the action of {cap!r} on {path or 'the network'}")
            raise

    def _tie(self) -> None:
        """Keep one delta for each tied tensor, which every module that holds the tensor reads."""
        parts = list(self.network.named_modules())
        if not (further := list(_with_owners(parts))):
            return
        for owner, path, module, name in further:
            self._drop_second(owner, path, module, name)
        # Search again: a dropped delta may also have been the delta of a bias.
        for owner, _, module, name in list(_with_owners(parts)):
            if name not in weight_deltas(module):
                _share(*owner, module, name)

    def _settle_sizes(self) -> None:
        """Clip a size that some weights cannot have, and refuse a size that none can have.

        Weights that are adapted by the same method with the same settings are judged together.
        """
        asked: dict[Method, list[tuple[Claimed, str, WeightDelta]]] = {}
        for taken in self.taken:
            for path, _, adapter in taken.adapters():
                if adapter.asked is not None and adapter.owner is None:
                    asked.setdefault(adapter.asked, []).append((taken, path, adapter))
        refused: dict[str, list[str]] = {}
        for weights in asked.values():
            clipped = [weight for weight in weights if weight[2].clipped]
            if len(clipped) < len(weights):
                for _, path, adapter in clipped:
                    method = adapter.method
                    self.clipped[path] = str(method.size_setting), method.size or 0
                continue
            for taken, path, adapter in clipped:
                place = f"{taken.path or 'the network'} ({taken.class_name})"
                texts = path.removeprefix(taken.path).lstrip("."), adapter.refusal()
                refused.setdefault(place, []).append(": ".join(filter(None, texts)))
        self.problems += [f"{place}: {'; '.join(texts)}" for place, texts in refused.items()]

    def _drop_second(
        self, owner: tuple[nn.Module, str], path: str, module: nn.Module, name: str
    ) -> None:
        """Drop the second delta of a tied tensor, or report a problem if the methods differ."""
        holder, tensor = owner
        adapter, second = weight_deltas(holder).get(tensor), weight_deltas(module).get(name)
        if adapter is None or second is None:
            return
        if id(holder._parameters[tensor]) in self.ties.contradicted:
            return  # reported already
        if second.method != adapter.method:
            self.problems.append(
                f"{path} is tied to a tensor that is adapted by {adapter.method}, and was to "
                f"be adapted by {second.method}; one tensor takes one"
            )
            return
        _drop(module, name)


def _with_owners(
    parts: Iterable[tuple[str, nn.Module]],
) -> Iterator[tuple[tuple[nn.Module, str], str, nn.Module, str]]:
    """Every further place of each adapted tensor, after the first place where it is adapted.

    Args:
        parts: the modules of a network, with their paths.

    Yields:
        The first module and the name there, then the tensor's other path, module and name.
    """
    owners: dict[int, tuple[nn.Module, str]] = {}
    for _, module in parts:
        for name in weight_deltas(module):
            if (parameter := module._parameters.get(name)) is not None:
                owners.setdefault(id(parameter), (module, name))
    for path, module in parts if owners else ():
        for name, parameter in module._parameters.items():
            owner = owners.get(id(parameter))
            if owner is not None and owner != (module, name):
                yield owner, joined(path, name), module, name


def _share(owner: nn.Module, tensor: str, module: nn.Module, name: str) -> None:
    """Let `module` read its tensor through the delta of the tied tensor in `owner`."""
    adapter = weight_deltas(owner)[tensor]
    shared = replace(adapter, owner=owner, follows=())
    if adapter.layout is not None:
        shape = torch.Size(adapter.layout.shape)
        shared.reads_alike = layout_of(module, name, shape, adapter.options) == adapter.layout
    install(module, name, shared)


def _drop(module: nn.Module, tensor: str) -> None:
    """Remove a delta, and the use of it for the bias that belongs to the weight."""
    adapter = weight_deltas(module)[tensor]
    uninstall(module, tensor)
    if adapter.owner is not None:
        return
    gone = set(adapter.names.values())
    for added in gone:
        remove_tensor(module, added)
    for name, other in list(weight_deltas(module).items()):
        if other.follows and gone & set(other.names.values()):
            uninstall(module, name)


def _class_name(module: nn.Module) -> str:
    return plain_class(type(module)).__name__


def closest_names(check: Callable[..., Any], network: nn.Module) -> list[str]:
    """Names in the network that are similar to those that a check looks for."""
    wanted = set(_strings(check))
    known: set[str] = set()
    for path, module in network.named_modules():
        known |= {path, path.rpartition(".")[2], _class_name(module)}
        known |= {name for name in module._parameters}
    close = {match for text in wanted for match in closest(text, known - {""}, cutoff=0.5)}
    return sorted(close)[:6]


def _strings(check: Any) -> Iterable[str]:
    """The strings in a check's recipe, or in the code of a function."""
    if isinstance(check, str):
        yield from filter(None, re.split(r"[*?\\|()]", check))
    elif isinstance(check, Recorded):
        yield from _strings(check.recipe[1])
    elif isinstance(check, dict):
        yield from _strings(list(check.values()))
    elif isinstance(check, list | tuple | set | frozenset):
        for item in check:
            yield from _strings(item)
    elif hasattr(check, "__code__"):
        yield from _strings(list(check.__code__.co_consts))
