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
from gift.core.iterator import ModuleIterator, Site, named_parts
from gift.core.stack import names_of_levels
from gift.core.weights.attach import install, uninstall
from gift.core.weights.reading import Memory
from gift.core.weights.record import WeightDelta, present_weight_deltas, weight_deltas
from gift.core.weights.sharing import place_parts, share_parameters
from gift.engine.claims import Adapted, Claimed, claims_of, placed_deltas
from gift.engine.ties import Ties
from gift.errors import AdaptationError, closest
from gift.factories import Action
from gift.factories.serializable import Recorded, bind
from gift.layers.table import layout_of
from gift.methods import Method
from gift.strategies.base import Cap, FineTuningStrategy
from gift.support.progress import counting

Caps = tuple[list[Cap], list[Cap]]
Guard = Callable[[], AbstractContextManager[Any]]
Visit = Callable[[Caps, Site, int | None], None]


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
        self.claimed: list[Claimed] = []
        self.problems: list[str] = []
        self.kept: set[int] = set()  # ids of the parameters that caps claimed
        self.done: dict[int, nn.Module | None] = {}  # by id of a claimed module: its replacement
        self.handled: dict[int, str] = {}  # paths of modules of open actions, by id
        self.ties = Ties(network)
        self.caps = strategy.cap_texts if self.ties else []
        caps = self._caps_for(strategy, network)
        # SVDs of large weights take long.
        with counting("enabling", sum(1 for _ in network.modules())) as self._tick:
            self._visit(caps, Site(None, "", "", _class_name(network), network), None)
        self.problems += self.ties.settle(self.caps)
        self._tie()
        share_parameters(network)
        place_parts(network)
        if self.handled:
            settle_modules_around(network)
        self.clipped: dict[str, tuple[str, int]] = {}  # weights without the requested size
        adapted = [list(claimed.deltas()) for claimed in self.claimed]
        self._settle_sizes(adapted)
        self.claims = claims_of(self.claimed, adapted)

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

    def _visit(self, caps: Caps, site: Site, top: int | None) -> None:
        """Visit a module and all modules in it; claims are credited to the cap `top`, if given."""
        self._tick()
        if id(site.module) in self.done:
            self._look_again(caps, site, top)
            self._put_replacement(site)
            return
        extending: list[tuple[Cap, int]] = []
        for number, cap in enumerate(caps[0]):
            if not self._matches(cap, f"module cap {number}", site):
                continue
            credited = number if top is None else top
            if getattr(cap.action, "open", False) is not True:
                self._claim(cap, site, credited)
                break
            extending.append((cap, credited))
        else:
            self._descend(caps, site, top)
        for cap, credited in extending:
            self._run_open(cap, site, credited)

    def _descend(self, caps: Caps, site: Site, top: int | None, visit: Visit | None = None) -> None:
        """Offer the parameters of a module that no cap claimed to caps, then visit its children."""
        module_caps, para_caps = caps
        module = site.module
        under = set(names_of_levels(module, of_base=True))
        for parameter_name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter_name not in under:
                own = Site(*site[:5], parameter_name, parameter)
                self._offer(para_caps, len(module_caps), own, top)
        for child_name, path, class_name, child, _ in list(ModuleIterator(module, site.path)):
            (visit or self._visit)(caps, Site(module, child_name, path, class_name, child), top)

    def _look_again(self, caps: Caps, site: Site, top: int | None) -> None:
        """Check a claimed module under another name: no other cap may claim it or its contents."""
        module = site.module
        for number, cap in enumerate(caps[0]):
            if getattr(cap.action, "open", False) is True:
                continue
            if not self._matches(cap, f"module cap {number}", site):
                continue
            credited = number if top is None else top
            if isinstance(cap.action, FineTuningStrategy):
                self._look_again(self._caps_for(cap.action, module), site, credited)
            elif self.ties.takes_anew(cap, module):
                self.ties.contradict(module, credited, site.path, self.caps)
            return
        self._descend(caps, site, top, self._look_again)

    def _put_replacement(self, site: Site) -> None:
        replacement = self.done[id(site.module)]
        if site.parent is not None and replacement is not None and replacement is not site.module:
            site.parent._modules[site.name] = replacement

    def _claim(self, cap: Cap, site: Site, number: int) -> None:
        parent, name, path, class_name, module = site[:5]
        if isinstance(cap.action, FineTuningStrategy):
            self._visit(self._caps_for(cap.action, module), site, number)
            return
        if self.ties:
            if self.ties.contradicts(cap, module, number, path, self.caps):
                return
            self.ties.forget_flags(nn.Module.parameters(module))
        self._run(cap, site, path)
        now = module if parent is None else parent._modules.get(name)
        self.done[id(module)] = now
        if now is not None:
            for _, part in named_parts(now):
                self.done[id(part)] = part
                self.kept.update(map(id, part._parameters.values()))
        self.claimed.append(Claimed(number, path, class_name, now, replaced=now is not module))
        if self.ties:
            self.ties.note_module(cap, self.claimed[-1])

    def _run_open(self, cap: Cap, site: Site, number: int) -> None:
        """Run an open action on the module at `site`, after everything else there is done."""
        parent, name, path, class_name, module = site[:5]
        now = module if parent is None else parent._modules.get(name)
        if now is None:
            self.problems.append(f"{path} ({class_name}): {cap!r} has nothing to act on, as a "
                                 "later cap removed the module")  # fmt: skip
            return
        if self.handled.setdefault(id(now), path) != path:
            return  # done already, under its first name
        before = {id(delta) for *_, delta in placed_deltas(now)}
        self._run(cap, Site(parent, name, path, _class_name(now), now), path)
        gained = [d for d in placed_deltas(now, path) if id(d.delta) not in before]
        self.claimed.append(Claimed(number, path, class_name, now, gained=tuple(gained)))

    def _offer(
        self, caps: list[Cap], offset: int, site: Site, top: int | None
    ) -> None:  # fmt: skip
        *_, module, name, parameter = site
        for number, cap in enumerate(caps):
            if not self._matches(cap, f"parameter cap {number}", site):
                continue
            number = offset + number if top is None else top
            path = site.full_path
            if isinstance(cap.action, FineTuningStrategy):
                self._offer(self._caps_for(cap.action, module)[1], 0, site, number)
                return
            if id(parameter) in self.kept:
                self._offer_again(cap, site, path, number)
                return
            self.kept.add(id(parameter))
            self._run(cap, site, path)
            self.ties.note_parameter(cap, number, module, name, path)
            self.claimed.append(Claimed(number, path, site.class_name, module, parameter=name))
            return

    def _offer_again(self, cap: Cap, site: Site, path: str, number: int) -> None:
        """Let a cap act on a parameter that was claimed under another name, if they agree."""
        *_, module, name, parameter = site
        if id(parameter) not in self.ties.tensors or not self.ties.takes_anew(cap, parameter):
            return
        if name in present_weight_deltas(module):
            self.ties.contradict(module, number, path, self.caps, name)
            return
        self.ties.forget_flags([parameter])
        self._run(cap, site, path)
        self.ties.note_parameter(cap, number, module, name, path)

    def _matches(self, cap: Cap, label: str, site: Site) -> bool:
        try:
            return bool(cap.check(*site.arguments))
        except Exception as error:
            where = site.in_words()
            error.add_note(f"raised by the check of {cap!r} ({label}) on {where}")
            raise

    def _run(self, cap: Cap, site: Site, path: str) -> None:
        try:
            with nullcontext() if isinstance(cap.action, Action) else self.guard():
                cap.action(*site.arguments, **cap.params)  # type: ignore[operator]
        except AdaptationError as error:  # collect all of these, raise once
            self.problems.append(f"{path or 'the network'} ({site.class_name}): {error}")
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
            if name not in present_weight_deltas(module):
                _share(*owner, module, name)

    def _settle_sizes(self, adapted: list[list[Adapted]]) -> None:
        """Clip a size that some weights cannot have, and refuse a size that none can have.

        Weights that are adapted by the same method with the same settings are judged together.

        Args:
            adapted: the adapted tensors of each claim.
        """
        if not any(delta.clipped for deltas in adapted for *_, delta in deltas):
            return
        asked: dict[Method, list[tuple[Claimed, str, WeightDelta]]] = {}
        for claimed, deltas in zip(self.claimed, adapted, strict=True):
            for path, _, delta in deltas:
                if delta.asked is not None and delta.owner is None:
                    asked.setdefault(delta.asked, []).append((claimed, path, delta))
        refused: dict[str, list[str]] = {}
        for weights in asked.values():
            clipped = [weight for weight in weights if weight[-1].clipped]
            if len(clipped) < len(weights):
                for _, path, delta in clipped:
                    method = delta.method
                    self.clipped[path] = str(method.size_setting), method.size or 0
                continue
            for claimed, path, delta in clipped:
                where = f"{claimed.path or 'the network'} ({claimed.class_name})"
                texts = path.removeprefix(claimed.path).lstrip("."), delta.refusal()
                refused.setdefault(where, []).append(": ".join(filter(None, texts)))
        self.problems += [f"{where}: {'; '.join(texts)}" for where, texts in refused.items()]

    def _drop_second(
        self, owner: tuple[nn.Module, str], path: str, module: nn.Module, name: str
    ) -> None:
        """Drop the second delta of a tied tensor, or report a problem if the methods differ."""
        holder, tensor = owner
        delta = present_weight_deltas(holder).get(tensor)
        second = present_weight_deltas(module).get(name)
        if delta is None or second is None:
            return
        if id(holder._parameters[tensor]) in self.ties.contradicted:
            return  # reported already
        if second.method != delta.method:
            self.problems.append(
                f"{path} is tied to a tensor that is adapted by {delta.method}, and would also be "
                f"adapted by {second.method}; one tensor can have one method"
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
        for name in present_weight_deltas(module):
            if (parameter := module._parameters.get(name)) is not None:
                owners.setdefault(id(parameter), (module, name))
    for path, module in parts if owners else ():
        for name, parameter in module._parameters.items():
            owner = owners.get(id(parameter))
            if owner is not None and owner != (module, name):
                yield owner, joined(path, name), module, name


def _share(owner: nn.Module, tensor: str, module: nn.Module, name: str) -> None:
    """Let `module` read its tensor through the delta of the tied tensor in `owner`."""
    delta = weight_deltas(owner)[tensor]
    shared = _read_from(delta, owner, module)
    shared.bias_of = ()
    if delta.layout is not None:
        shape = torch.Size(delta.layout.shape)
        shared.reads_alike = layout_of(module, name, shape, delta.options) == delta.layout
    install(module, name, shared)


def _read_from(delta: WeightDelta, owner: nn.Module, module: nn.Module) -> WeightDelta:
    """The records with which `module` reads a delta, and those under it, from another module."""
    holder = owner if delta.owner is None else delta.owner
    below = None if delta.below is None else _read_from(delta.below, owner, module)
    return replace(delta, owner=None if holder is module else holder, below=below, memory=Memory())


def _drop(module: nn.Module, tensor: str) -> None:
    """Remove a delta, and the use of it for the bias that belongs to the weight."""
    delta = weight_deltas(module)[tensor]
    uninstall(module, tensor)
    if delta.below is not None:
        install(module, tensor, delta.below)
    if delta.owner is not None:
        return
    gone = set(delta.names.values())
    for added in gone:
        remove_tensor(module, added)
    for name, other in list(weight_deltas(module).items()):
        if other.bias_of and gone & set(other.names.values()):
            uninstall(module, name)
            if other.below is not None:
                install(module, name, other.below)


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
