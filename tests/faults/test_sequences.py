"""Whatever is done to a network in whatever order, it is what a model of it says.

The model keeps plain tensors: the base, what fine-tuning added, what is trained in place, flags. It
computes weights, outputs and steps of training from these in float64 (`tests.cases.sequences`).
After each operation the network is compared with it, bit for bit where nothing was computed.
"""

import contextlib
import copy
import os
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

import gift
from gift import DeltaBank
from gift.core.undo.unload import UnloadedDelta
from gift.errors import AdaptationError, GiftWarning
from gift.schedules import FreezeUnfreeze
from tests.cases.sequences import (
    LOW_RANK,
    NO_MULTIPLE,
    PIECES,
    READS_WEIGHT,
    SIZE,
    TOKENS,
    Plan,
    Shape,
    computed,
)
from tests.common import frozen_output

LONG = os.environ.get("GIFT_FAULTS") == "long"
SEEDS = st.integers(0, 2**32)
X = torch.randint(0, TOKENS, (3, 4), generator=torch.Generator().manual_seed(0))
RATE = 0.05
Values = dict[str, Tensor]


@dataclass
class Delta:
    """What fine-tuning adds to a base, as the model knows it.

    Args:
        plan: what the strategy did.
        own: trained tensors and saved buffers of methods, by name.
        flags: of the parameters that are trained.
        place: what is trained in place, and buffers: values while it is away.
        base: the same in the base, while it is on the network.
        hidden: buffers that no state has, for each adapted tensor, while it is away.
        changes: by how much it must change parameters of the base, where its own are not known.
        made: whether it is a sum of others.
        late: parameters of the base that a schedule unfroze.
        more: others of the base that a state had.
        waiting: for each block, what a schedule holds frozen.
        noted: the flags before a schedule was attached.
        kind: how weights are matrices to it, if not as to its method.
    """

    plan: Plan
    own: Values
    flags: dict[str, bool]
    place: Values = field(default_factory=dict)
    base: Values = field(default_factory=dict)
    hidden: dict[str, Values] = field(default_factory=dict)
    changes: Values | None = None
    made: bool = False
    kind: str = ""
    late: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)
    waiting: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, bool] | None = None

    @property
    def chosen(self) -> list[str]:
        """Names of all that is trained."""
        return [*self.plan.chosen, *self.late]

    @property
    def in_place(self) -> list[str]:
        """Names of what may have other values than in the base."""
        return list(dict.fromkeys([*self.plan.in_place, *self.late, *self.more]))


class Operation(NamedTuple):
    """An operation of `Sequences`, when it can be done, and how often it is chosen."""

    name: str
    act: Callable[["Sequences", random.Random], None]
    when: Callable[["Sequences"], Any]
    weight: float


OPERATIONS: list[Operation] = []
Act = Callable[["Sequences", random.Random], None]


def operation(
    when: Callable[["Sequences"], Any] = lambda self: True, weight: float = 1
) -> Callable[[Act], Act]:
    def register(act: Act) -> Act:
        OPERATIONS.append(Operation(act.__name__, act, when, weight))
        return act

    return register


def is_active(one: "Sequences") -> bool:
    return one.active is not None


def is_base(one: "Sequences") -> bool:
    return one.active is None


def is_known(one: "Sequences") -> bool:
    """Whether a delta without a name is in nobody's way."""
    return one.active is None or one.name is not None


class Sequences(RuleBasedStateMachine):
    """A network with a bank, and the model of both."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    @initialize(seed=SEEDS)
    def begin(self, seed: int) -> None:
        torch.manual_seed(seed)
        chance = random.Random(seed)
        pieces = chance.choices(list(PIECES), k=chance.choice([1, 2, 3]))
        self.shape = Shape(tuple(pieces), tied=chance.random() < 0.4)
        note(repr(self.shape))
        self.net = self.shape.make().to(chance.choice([torch.float32, torch.float64]))
        self.coarse = torch.finfo(self.dtype).eps
        for parameter in self.net.parameters():
            parameter.requires_grad = chance.random() < 0.8
        self.net.train(chance.random() < 0.5)
        self.training: bool = self.net.training
        self.values: Values = {n: self.found(n).detach().clone() for n in self.firsts}
        self.flags: dict[str, bool] = {n: p.requires_grad for n, p in self.net.named_parameters()}
        self.bank = DeltaBank(self.net)
        self.active: Delta | None = None
        self.name: str | None = None  # of the delta that is active, in the bank
        self.away: dict[str, Delta] = {}  # of the bank
        self.loose: list[tuple[UnloadedDelta, Delta]] = []
        self.states: list[tuple[Plan, Mapping[str, Tensor], Values]] = []
        self.number = 0
        self.schedule: Any = None  # of the active delta

    # ------------------------------------------------------------------ what there is

    @property
    def firsts(self) -> list[str]:
        return list(dict.fromkeys(self.shape.names.values()))

    @property
    def dtype(self) -> torch.dtype:
        return self.net.embed._parameters["weight"].dtype

    def found(self, name: str) -> Tensor:
        """The tensor of that name in the network, not the effective weight."""
        path, _, own = name.rpartition(".")
        module = self.net.get_submodule(path)
        tensor = module._parameters.get(own)
        return module._buffers[own] if tensor is None else tensor

    @property
    def tolerance(self) -> float:
        return 2e3 * self.coarse

    def close(self, found: Tensor, expected: Tensor, what: str) -> None:
        bound = self.tolerance
        torch.testing.assert_close(
            found.detach().double(), expected.detach().double(), rtol=bound, atol=bound,
            msg=lambda text: f"{what}: {text}",
        )  # fmt: skip

    def leaves(self, delta: Delta | None, values: Values) -> tuple[Values, dict[str, Values]]:
        """In float64: a base, and what a delta adds to its weights; leaves where it is trained."""
        flags = {} if delta is None else delta.flags

        def leaf(name: str, value: Tensor) -> Tensor:
            value = value.detach().double() if value.is_floating_point() else value.detach()
            return value.requires_grad_() if flags.get(name) else value

        own: dict[str, Values] = {}
        for tensor in delta.plan.tensors if delta is not None else ():
            assert delta is not None
            roles = delta.plan.added(tensor)
            hidden = self.hidden(tensor, roles) if delta is self.active else delta.hidden[tensor]
            mine = {role: leaf(name, delta.own[name]) for role, name in roles.items()}
            own[tensor] = {role: leaf("", value) for role, value in hidden.items()} | mine
        return {name: leaf(name, value) for name, value in values.items()}, own

    def hidden(self, tensor: str, roles: Mapping[str, str]) -> Values:
        """Buffers that no state has: a method makes them from the weight or a seed."""
        path = tensor.rpartition(".")[0]
        role, name = next(iter(roles.items()))
        prefix = name.removeprefix(f"{path}.").removesuffix(role)
        buffers = self.net.get_submodule(path)._buffers
        return {name.removeprefix(prefix): buffer.detach().clone()
                for name, buffer in buffers.items() if name.startswith(prefix)}  # fmt: skip

    def effective(self, delta: Delta | None = None, values: Values | None = None) -> Values:
        """Everything that a network computes with, by the formula, in float64."""
        delta = delta or self.active
        base, own = self.leaves(delta, self.values if values is None else values)
        made = delta.plan.effective(base, own, delta.kind) if delta and delta.plan.method else {}
        return base | made

    def base(self) -> Values:
        """The base's values, whatever delta is active."""
        kept = self.active.base if self.active else {}
        return self.values | {n: as_dtype(v, self.dtype) for n, v in kept.items()}

    def another_base(self) -> Any:
        """Another network, which is this one without fine-tuning."""
        other, values = self.shape.make(), self.base()
        if values["head.bias"].shape != other.head.bias.shape:  # that of a merged one
            other.head = nn.Linear(SIZE, len(values["head.bias"]))
        other.to(self.dtype)
        other.load_state_dict({n: values[first] for n, first in self.shape.names.items()})
        return other

    def on_base(self, delta: Delta) -> Values:
        """What the base would compute with, if it wore a delta that is away."""
        place = {n: as_dtype(v, self.dtype) for n, v in delta.place.items()}
        return {n: v.detach() for n, v in self.effective(delta, self.base() | place).items()}

    def mode(self, path: str) -> bool:
        still = self.active.plan.still_norms if self.active else []
        return self.training and path not in still

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def structure(self) -> None:
        """Names, classes, bits, flags, modes, and what parameters() and state_dict() give."""
        net, active = self.net, self.active
        for path, module in net.named_modules():
            plain = self.shape.classes[path]
            assert isinstance(module, plain), path
            assert type(module).__name__ == plain.__name__
            assert module.training == self.mode(path), path
            if active is None:
                assert type(module) is plain
                left = [k for k in vars(module) if k.startswith("_gift") or k == "requires_grad_"]
                assert not left, (path, left)
        known = {*self.shape.names, *(active.own if active else ())}
        named = dict(nn.Module.named_parameters(net, remove_duplicate=False))
        assert {*named} == {n for n in known if n not in self.saved_buffers}, "names"
        for name, value in {**self.values, **(active.own if active else {})}.items():
            tensor = self.found(name)
            assert tensor.dtype == value.dtype, name
            assert torch.equal(tensor, value), f"the value of {name}"
        for name, first in self.shape.names.items():
            assert self.found(name) is self.found(first), f"{name} is tied to {first}"
        flags = self.flags if active is None else dict.fromkeys(self.flags, False) | active.flags
        assert {n: p.requires_grad for n, p in net.named_parameters()} == flags
        trained = [*flags] if active is None else active.chosen
        assert {id(p) for p in net.parameters()} == {id(self.found(n)) for n in trained}
        keys = {k for k in net.state_dict() if not k.endswith("gift_settings")}
        assert {self.shape.names.get(k, k) for k in keys} == self.state_keys
        for name, parameter in named.items():
            assert parameter.requires_grad or parameter.grad is None, name

    @property
    def saved_buffers(self) -> set[str]:
        return {*self.shape.buffers, *(self.active.plan.saved_buffers() if self.active else ())}

    @property
    def state_keys(self) -> set[str]:
        if self.active is None:
            return {*self.firsts}
        return {*self.active.chosen, *self.saved_buffers}

    @invariant()
    def outputs(self) -> None:
        """The network computes what plain layers with the weights of the formula compute."""
        with torch.no_grad():
            expected, buffers = computed(self.shape, self.effective(), X, self.mode)
            self.close(self.net(X), expected, "output")
        self.moved_buffers(buffers)

    def moved_buffers(self, expected: Values) -> None:
        for name, value in expected.items():
            found = self.found(name)
            self.close(found, value, name)
            if torch.equal(value, self.values[name].to(value)):
                assert torch.equal(found, self.values[name]), f"{name} moved"
            self.values[name] = found.detach().clone()

    @invariant()
    def bank_says(self) -> None:
        assert self.bank.active == self.name
        assert {*self.bank.names} == {*self.away, *([self.name] if self.name else ())}

    # ------------------------------------------------------------------ the model's steps

    def activated(self, delta: Delta) -> None:
        """Put a delta of the model on: the base keeps what it changes in place."""
        delta.base = {n: self.values[n] for n in delta.in_place}
        delta.own = {n: v.to(self.dtype) for n, v in delta.own.items()}
        before, self.active, self.schedule = self.effective(values=self.values), delta, None
        self.values |= {n: as_dtype(v, self.dtype) for n, v in delta.place.items()}
        if delta.changes is not None:
            expected = {n: before[n].detach() + change for n, change in delta.changes.items()}
            expected |= {n: v for n, v in delta.place.items() if n in self.shape.buffers}
            self.meet(delta, expected)

    def meet(self, delta: Delta, expected: Values) -> None:
        """Take what the network has for a delta, which must give these tensors."""
        self.adopt(delta)
        plan, delta.changes = delta.plan, None
        self.values |= {n: self.found(n).detach().clone() for n in delta.in_place}
        for kind in ("matrices", "filters", "outputs") if delta.made else ():
            delta.kind = kind
            with contextlib.suppress(RuntimeError, AssertionError):
                self.all_close(self.effective(), expected, "its change")
                break
        self.all_close(self.effective(), expected, f"the change by {plan.method}")

    def all_close(self, found: Values, expected: Values, what: str) -> None:
        for name, value in expected.items():
            self.close(found[name], value, f"{what} of {name}")

    def take_off(self) -> Delta:
        delta = self.active
        assert delta is not None
        delta.place = {n: self.values[n] for n in delta.in_place}
        delta.hidden = {t: self.hidden(t, delta.plan.added(t)) for t in delta.plan.tensors}
        self.values |= {n: as_dtype(v, self.dtype) for n, v in delta.base.items()}
        self.active = self.name = self.schedule = None
        return delta

    def adopt(self, delta: Delta) -> None:
        """What the model cannot know: numbers drawn at random."""
        plan = delta.plan
        delta.own = {name: self.found(name).detach().clone()
                     for name in (*plan.trained_deltas(), *plan.saved_buffers())}  # fmt: skip
        delta.hidden = {tensor: self.hidden(tensor, plan.added(tensor)) for tensor in plan.tensors}

    def drawn(self, seed: int) -> Plan:
        return Plan.drawn(self.shape, random.Random(seed))

    def begun(self, plan: Plan) -> None:
        """After enabling: a new delta is active, whose start has no effect."""
        delta = Delta(plan, {}, dict.fromkeys(plan.chosen, True))
        if plan.head is not None:
            delta.place = {n: self.found(n).detach().clone() for n in plan.in_place}
        before = self.effective()
        self.activated(delta)
        self.adopt(delta)
        if plan.head is None:
            for name, value in self.effective().items():
                self.close(value, before[name], f"{name} right after enabling")

    def now_another(self, made: Any) -> None:
        """Continue with a copy; what was copied stays as it is."""
        old, self.schedule = (self.net, self.bank, self.loose), None
        self.net, self.bank, self.loose = made
        assert self.bank.net is self.net
        before = {n: p.detach().clone() for n, p in nn.Module.named_parameters(old[0])}
        mine = {id(t) for t in (*nn.Module.parameters(self.net), *self.net.buffers())}
        assert mine.isdisjoint(id(t) for t in (*nn.Module.parameters(old[0]), *old[0].buffers()))
        with torch.no_grad():
            for parameter in nn.Module.parameters(self.net):
                parameter.add_(1)
            assert all(torch.equal(p, before[n]) for n, p in nn.Module.named_parameters(old[0]))
            for name, value in {**self.values, **(self.active.own if self.active else {})}.items():
                self.found(name).copy_(value)

    @contextmanager
    def refused(self, *errors: type[Exception]) -> Iterator[None]:
        """An error, after which the network is as it was: the invariants see that."""
        with pytest.raises(errors or (RuntimeError, ValueError, AdaptationError)):
            yield

    @rule(seed=SEEDS)
    def operate(self, seed: int) -> None:
        """One operation among those that can be done now."""
        chance = random.Random(seed)
        torch.manual_seed(seed)
        able = [one for one in OPERATIONS if one.when(self)]
        (one,) = chance.choices(able, [one.weight for one in able])
        note(one.name)
        one.act(self, chance)

    # ------------------------------------------------------------------ enabling and its undoing

    @operation(is_base, weight=2)
    def enable(self, chance: random.Random) -> None:
        seed = chance.randrange(2**32)
        plan = self.drawn(seed)
        gift.enable_fine_tuning(self.net, plan.strategy())
        self.begun(plan)

    @operation(weight=0.4)
    def plan(self, chance: random.Random) -> None:
        seed = chance.randrange(2**32)
        plan = self.drawn(seed)
        if self.active is not None:
            with self.refused():
                gift.plan_fine_tuning(self.net, plan.strategy())
            return
        report = gift.plan_fine_tuning(self.net, plan.strategy())
        twin = copy.deepcopy(self.net)
        gift.enable_fine_tuning(twin, plan.strategy())
        trained = {id(p): p.numel() for p in twin.parameters()}
        assert report.trainable_after == sum(trained.values())

    @operation(weight=0.3)
    def misuse(self, chance: random.Random) -> None:
        """What does not fit the moment is refused."""
        seed = chance.randrange(2**32)
        operation = chance.choice(["enable", "disable", "merge", "save"])
        if operation == "enable" and self.active is not None:
            with self.refused():
                gift.enable_fine_tuning(self.net, self.drawn(seed).strategy())
        elif operation != "enable" and self.active is None:
            act = {"disable": gift.disable_fine_tuning, "merge": gift.merge,
                   "save": lambda net: gift.save(net, self.file())}[operation]  # fmt: skip
            with self.refused():
                act(self.net)

    @operation(is_active, weight=0.6)
    def disable(self, chance: random.Random) -> None:
        name = self.name
        self.take_off()
        gift.disable_fine_tuning(self.net)
        self.bank_forgets(name)

    def bank_forgets(self, name: str | None) -> None:
        """It was not asked, so it says what it finds when it is used again."""
        if name is not None:
            with pytest.warns(GiftWarning, match=f"'{name}' was .* without the bank"):
                self.bank.activate(None)

    @operation(is_active, weight=0.6)
    def merge(self, chance: random.Random) -> None:
        assert self.active is not None
        expected = {n: v.detach() for n, v in self.effective().items()}
        values, plan, name = dict(self.values), self.active.plan, self.name
        gift.merge(self.net)
        self.active = self.schedule = self.name = None
        self.bank_forgets(name)
        for name in self.firsts:
            now = self.found(name).detach().clone()
            if name in plan.tensors:
                self.close(now, expected[name], f"merged {name}")
                self.values[name] = now
            else:
                assert torch.equal(now, values[name])
        if plan.head is not None:  # it is the base's from now on
            self.heads_stay()
        self.forget_what_reads_the_base()

    def heads_stay(self) -> None:
        """A merged network may have another head, so that nothing else that is away fits."""
        for name in list(self.bank.names):
            self.bank.remove(name)
        self.away, self.loose, self.states = {}, [], []
        self.flags = {n: p.requires_grad for n, p in self.net.named_parameters()}

    def forget_what_reads_the_base(self) -> None:
        """Deltas that were made from the values of another base."""
        fixed = {n for n, d in self.away.items() if d.changes is not None}  # by the base that was
        for name in [n for n, d in self.away.items()
                     if d.plan.method in READS_WEIGHT or n in fixed]:  # fmt: skip
            self.bank.remove(name)
            del self.away[name]
        self.loose = [one for one in self.loose if one[1].plan.method not in READS_WEIGHT]
        self.states = [one for one in self.states if one[0].method not in READS_WEIGHT]

    @operation(is_active)
    def merged(self, chance: random.Random) -> None:
        fails = chance.random() < 0.3
        assert self.active is not None
        expected = {n: v.detach() for n, v in self.effective().items()}
        output, _ = computed(self.shape, expected, X, self.mode)
        try:
            with gift.merged(self.net):
                assert not any(p.requires_grad for p in nn.Module.parameters(self.net))
                state = self.net.state_dict()
                assert {*state} == {*self.shape.names}
                for name, value in state.items():
                    self.close(value, expected[self.shape.names[name]], name)
                self.close(self.net(X), output, "merged output")
                if fails:
                    raise Failure
        except Failure:
            pass

    @operation(is_active)
    def disabled(self, chance: random.Random) -> None:
        fails = chance.random() < 0.3
        inside = chance.choice(["nothing", "flags", "mode", "enable"])
        seed = chance.randrange(2**32)
        active, name = self.active, self.name
        assert active is not None
        flags = dict(self.flags)
        try:
            self.take_off()
            with gift.disabled(self.net):
                self.name = name
                self.flags = dict.fromkeys(self.flags, False)
                self.structure()
                self.outputs()
                if inside == "flags":
                    self.net.requires_grad_(True)
                elif inside == "mode":
                    self.net.train(not self.training)
                elif inside == "enable":
                    gift.enable_fine_tuning(self.net, self.drawn(seed).strategy())
                    before = {n: self.found(n).detach().clone() for n in self.shape.buffers}
                    self.net.eval()(X)
                    assert all(torch.equal(self.found(n), v) for n, v in before.items())
                if fails:
                    raise Failure
        except Failure:
            pass
        self.activated(active)
        self.flags, self.name = flags, name

    @operation(lambda self: is_active(self) and self.name is None, weight=0.7)
    def unload(self, chance: random.Random) -> None:
        delta = self.take_off()
        self.loose.append((UnloadedDelta(self.net), delta))

    @operation(lambda self: self.active is None and self.loose)
    def attach(self, chance: random.Random) -> None:
        unloaded, delta = self.loose.pop(chance.randrange(len(self.loose)))
        unloaded.attach()
        self.activated(delta)

    # ------------------------------------------------------------------ what users do

    @operation(is_active, weight=3)
    def train(self, chance: random.Random) -> None:
        """One step; the formula's gradients come from autograd of plain tensors."""
        active = self.active
        assert active is not None
        base, own = self.leaves(active, self.values)
        weights = base | (
            active.plan.effective(base, own, active.kind) if active.plan.method else {}
        )
        with torch.enable_grad():
            output, buffers = computed(self.shape, weights, X, self.mode)
            leaves = {n: base[n] for n in active.flags if n in base}
            for tensor in active.plan.tensors:
                roles = active.plan.added(tensor)
                leaves |= {name: own[tensor][role] for role, name in roles.items()
                           if name in active.flags}  # fmt: skip
            leaves = {n: t for n, t in leaves.items() if t.requires_grad}
            expected = dict.fromkeys(leaves, None)
            if leaves and output.requires_grad:
                output.square().mean().backward()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=RATE)
        found = self.net(X)
        assert found.requires_grad == output.requires_grad
        if found.requires_grad:
            found.square().mean().backward()
        optimizer.step()
        self.net.zero_grad()
        self.moved_buffers(buffers)
        for name in expected:
            gradient = leaves[name].grad
            now = self.found(name).detach().clone()
            before = leaves[name].detach()
            self.close(
                now, before if gradient is None else before - RATE * gradient, f"step {name}"
            )
            (self.values if name in self.values else active.own)[name] = now

    @operation()
    def requires_grad(self, chance: random.Random) -> None:
        flag = chance.random() < 0.6
        path = chance.choice(list(self.shape.classes))
        part = self.net.get_submodule(path)
        inside = {self.shape.names.get(f"{path}.{n}".lstrip("."), f"{path}.{n}".lstrip("."))
                  for n, _ in nn.Module.named_parameters(part)}  # fmt: skip
        part.requires_grad_(flag)
        changed = self.flags if self.active is None else self.active.flags
        waiting = self.waiting if flag else set()
        changed |= dict.fromkeys((inside & changed.keys()) - waiting, flag)

    @property
    def waiting(self) -> set[str]:
        """What a schedule holds frozen, whoever asks."""
        return {n for names in (self.active.waiting.values() if self.active else ()) for n in names}

    @operation(weight=0.7)
    def train_mode(self, chance: random.Random) -> None:
        training = chance.random() < 0.5
        self.net.train(training)
        self.training = training

    @operation(weight=0.7)
    def cast(self, chance: random.Random) -> None:
        dtype = chance.choice([torch.float32, torch.float64])
        self.net.to(dtype)
        self.coarse = max(self.coarse, torch.finfo(dtype).eps)
        for values in (self.values, self.active.own if self.active else {}):
            values |= {n: v.to(dtype) for n, v in values.items() if v.is_floating_point()}

    @operation(weight=0.5)
    def deepcopy(self, chance: random.Random) -> None:
        self.now_another(copy.deepcopy((self.net, self.bank, self.loose)))

    @operation(weight=0.5)
    def pickled(self, chance: random.Random) -> None:
        self.now_another(pickle.loads(pickle.dumps((self.net, self.bank, self.loose))))

    # ------------------------------------------------------------------ states and files

    @operation(is_active)
    def keep_state(self, chance: random.Random) -> None:
        plainly = chance.random() < 0.5
        assert self.active is not None
        state = {k: v.clone() for k, v in self.net.state_dict().items()}
        if state.keys() >= self.shape.names.keys():
            return  # all is trained in place: to another delta, it is a checkpoint of a base
        held = self.net.state_dict() if not plainly else state
        for key, value in state.items():
            held[key] = value
        self.states.append((self.active.plan, held, {n: v.detach() for n, v in state.items()}))

    @operation(lambda self: is_active(self) and self.states)
    def load_state(self, chance: random.Random) -> None:
        """Of this delta, or of another, which is refused or means what it meant."""
        active = self.active
        assert active is not None
        plan, state, kept = chance.choice(self.states)
        try:
            self.net.load_state_dict(state)
        except RuntimeError:
            assert plan != active.plan or {*kept} ^ {*self.net.state_dict()}
            return
        firsts = {self.shape.names.get(k, k): v for k, v in kept.items()}
        delta = Delta(plan, {n: firsts[n].to(self.dtype) for n in
                             (*plan.trained_deltas(), *plan.saved_buffers())}, {})  # fmt: skip
        values = {n: v.to(self.values[n].dtype) for n, v in firsts.items() if n in self.values}
        active.base |= {n: self.values[n] for n in values.keys() - active.base.keys()}
        active.more += values.keys() - {*active.in_place}
        self.values |= values
        for name in active.own:
            active.own[name] = firsts[name].to(self.dtype)
        if plan != active.plan:
            mine, theirs = self.effective(), self.effective(delta)
            for name in mine:
                self.close(mine[name], theirs[name], f"{name} of {plan.method}")

    def file(self) -> Path:
        self.number += 1
        return Path(self.folder.name) / f"{self.number}.safetensors"

    @operation(is_active)
    def save_and_load(self, chance: random.Random) -> None:
        """A file on another copy of the base gives the same network, bit for bit."""
        active = self.active
        assert active is not None
        path, other = self.file(), self.another_base()
        gift.save(self.net, path)
        gift.load(other, path)
        other.train(self.training)
        assert {*other.state_dict()} == {*self.net.state_dict()}
        for name, value in self.net.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        both = other.eval(), copy.deepcopy(self.net).eval()
        with torch.no_grad():
            outputs = [frozen_output(net, X) for net in both]
        if torch.finfo(self.dtype).eps < self.coarse:  # what is made from a weight was rounded
            self.close(*outputs, "output of a file")
        else:
            assert torch.equal(*outputs)

    @operation(is_base)
    def load_file(self, chance: random.Random) -> None:
        """A delta of another copy of the base."""
        seed = chance.randrange(2**32)
        other = copy.deepcopy(self.net)
        plan, path = self.drawn(seed), self.file()
        gift.enable_fine_tuning(other, plan.strategy())
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        gift.save(other, path)
        gift.load(self.net, path)
        mine, self.net = self.net, other
        delta = Delta(plan, {}, dict.fromkeys(plan.chosen, True))
        self.adopt(delta)
        delta.place = {n: self.found(n).detach().clone() for n in plan.in_place}
        self.net = mine
        self.activated(delta)

    # ------------------------------------------------------------------ schedules

    def blocks(self) -> list[str]:
        return [f"parts.{i}" for i in range(len(self.shape.pieces))]

    @operation(
        lambda self: is_active(self) and not self.shape.tied and self.trains("head"), weight=2
    )
    def schedule_attached(self, chance: random.Random) -> None:
        """All blocks but the head wait; their weights or their deltas."""
        weights = chance.random() < 0.5
        active = self.active
        assert active is not None
        flags = dict(active.flags)
        if active.noted is not None:
            flags = dict.fromkeys(active.chosen, False) | active.noted
        norms = {n for p in self.shape.norms if self.shape.classes[p] is nn.BatchNorm2d
                 for n in self.shape.names if n.startswith(f"{p}.")}  # fmt: skip
        deltas, waiting = {*active.plan.trained_deltas()}, dict[str, list[str]]()
        base = [n for n, flag in self.flags.items() if flag] if weights else deltas
        for block in self.blocks():
            own = [n for n in base if n.startswith(f"{block}.") and n not in norms]
            if own:
                waiting[block] = own
        wanted = {n for names in waiting.values() for n in names}
        reads = active.plan.method in READS_WEIGHT and wanted & active.plan.tensors.keys()
        schedule = FreezeUnfreeze(1, head="head", blocks=self.blocks(), train_bn=True,
                                  unfreezes="weights" if weights else "deltas")  # fmt: skip
        if not waiting or reads:
            with self.refused():
                schedule.attach(self.net)
            return
        schedule.attach(self.net)
        active.noted, active.flags, active.waiting = dict(flags), flags, waiting
        self.schedule = schedule
        if weights:
            waiting["rest"] = [n for n in flags if n.startswith("embed.") and n not in deltas]
            self.begin_late({n for n in norms if self.flags.get(n)})
        active.flags |= dict.fromkeys((n for n in self.waiting if n in active.flags), False)

    def trains(self, path: str) -> bool:
        flags = self.active.noted or self.active.flags if self.active else {}
        return any(flag for name, flag in flags.items() if name.startswith(f"{path}."))

    def begin_late(self, names: set[str]) -> None:
        """Train parameters of the base from now on."""
        active = self.active
        assert active is not None
        new = sorted(names - {*active.chosen})
        active.base |= {n: self.values[n] for n in new if n not in active.base}
        active.late += new
        active.flags |= dict.fromkeys(names, True)

    @operation(lambda self: self.schedule is not None and self.active is not None, weight=2)
    def schedule_stepped(self, chance: random.Random) -> None:
        epoch = chance.choice([0, 1, 1])
        active = self.active
        assert active is not None
        if epoch == 0 and self.schedule.trained:
            with self.refused(ValueError):
                self.schedule.step(0)
            return
        optimizer = torch.optim.SGD(self.net.parameters(), lr=RATE)
        done = self.schedule.step(epoch, optimizer)
        assert set(done) == (active.waiting.keys() - {"rest"} if epoch else set())
        for block in done:
            self.begin_late(set(active.waiting.pop(block)))
        groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert groups >= {id(p) for p in self.net.parameters() if p.requires_grad}

    @operation(lambda self: self.schedule is not None and self.active is not None)
    def schedule_detached(self, chance: random.Random) -> None:
        active = self.active
        assert active is not None
        assert active.noted is not None
        self.schedule.detach()
        active.flags = dict.fromkeys(active.chosen, False) | active.noted
        active.noted, active.waiting, self.schedule = None, {}, None

    # ------------------------------------------------------------------ the bank

    def uncovered(self) -> None:
        """What is active is off for a moment: the base has the network's dtype from then on."""
        if self.active is not None:
            self.active.base = {n: as_dtype(v, self.dtype) for n, v in self.active.base.items()}

    def new_name(self) -> str:
        self.number += 1
        return f"delta {self.number}"

    @operation(is_active, weight=2)
    def name_it(self, chance: random.Random) -> None:
        if self.name is not None:
            with self.refused():
                self.bank.add(self.new_name())
            return
        self.name = self.new_name()
        self.bank.add(self.name)

    @operation(weight=1.5)
    def add(self, chance: random.Random) -> None:
        """From a state of another copy of the base, or new."""
        seed = chance.randrange(2**32)
        moved = chance.random() < 0.7
        plan, name = self.drawn(seed), self.new_name()
        source = None
        other = self.another_base()
        torch.manual_seed(seed)
        gift.enable_fine_tuning(other, plan.strategy())
        if moved:
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            source = other.state_dict()
        torch.manual_seed(seed)
        self.bank.add(name, source, strategy=plan.strategy())
        self.uncovered()
        delta = Delta(plan, {}, dict.fromkeys(plan.chosen, True))
        mine, self.net = self.net, other
        self.adopt(delta)
        delta.place = {n: self.found(n).detach().clone() for n in plan.in_place}
        self.net = mine
        self.away[name] = delta

    @operation(lambda self: is_known(self) and (self.away or self.name), weight=2)
    def activate(self, chance: random.Random) -> None:
        names = [*self.away, *([self.name] if self.name else ()), None]
        name = chance.choice(names)
        if name != self.name and self.name is not None:
            own = self.name
            self.away[own] = self.take_off()
        self.bank.activate(name)
        if name == self.name:
            return
        if name is not None:
            self.activated(self.away.pop(name))
            self.name = name

    @operation(lambda self: self.away)
    def remove(self, chance: random.Random) -> None:
        name = chance.choice(list(self.away))
        self.bank.remove(name)
        del self.away[name]

    def named(self) -> dict[str, Delta]:
        """All deltas of the bank whose tensors are known."""
        active = (
            {self.name: self.active} if self.name is not None and self.active is not None else {}
        )
        return {n: d for n, d in (self.away | active).items()
                if d.changes is None and not d.late and not d.more}  # fmt: skip

    def as_away(self, delta: Delta) -> Delta:
        """A delta that is active, as if it were away."""
        if delta is not self.active:
            return delta
        hidden = {t: self.hidden(t, delta.plan.added(t)) for t in delta.plan.tensors}
        place = {n: self.values[n] for n in delta.in_place}
        return replace(delta, place=place, hidden=hidden, base={})

    def changes(self, delta: Delta) -> Values:
        """By how much a delta changes each tensor of the base that it has anything for."""
        delta = self.as_away(delta)
        base = {n: v.double() for n, v in self.base().items()}
        now = self.on_base(delta)
        return {n: now[n] - base[n] for n in (*delta.plan.tensors, *delta.in_place)
                if self.values[n].is_floating_point()}  # fmt: skip

    @operation(lambda self: is_known(self) and self.named(), weight=1.5)
    def scale(self, chance: random.Random) -> None:
        factor = chance.choice([0.0, 0.5, -1.5])
        name = chance.choice(list(self.named()))
        delta = self.named()[name]
        if delta.plan.method in NO_MULTIPLE:
            with self.refused(AdaptationError):
                self.bank.scale(name, factor)
            return
        buffers = set(self.shape.buffers)
        heads = {"head.weight", "head.bias"} if delta.plan.head is not None else set()
        changes = {} if heads else self.changes(delta)
        changes = {n: c if n in buffers else factor * c for n, c in changes.items()}
        base = {n: v.double() for n, v in self.base().items()}
        self.bank.scale(name, factor)
        self.uncovered()
        if heads:  # the rest is scaled: see it by another delta
            self.bank.remove(name)
            self.away.pop(name, None)
            if delta is self.active:
                self.take_off()
        elif delta is self.active:
            self.meet(delta, {n: base[n] + change for n, change in changes.items()})
        else:
            delta.changes = {n: c for n, c in changes.items() if n not in buffers}

    @operation(lambda self: is_known(self) and self.named(), weight=2)
    def combine(self, chance: random.Random) -> None:
        """The sum of the changes, as a LoRA, or a refusal of what cannot be summed."""
        factors = [chance.choice([0.25, 1.0, -0.5]) for _ in range(2)]
        named = self.named()
        names = chance.sample(list(named), min(len(named), chance.choice([1, 2])))
        weights, plans = dict(zip(names, factors, strict=False)), [named[n].plan for n in names]
        whole = sorted({name for n in names for name in self.trained_in_place(named[n])})
        adapted = dict.fromkeys(path for plan in plans for path in plan.adapted)
        parts = {path: {self.shape.names[n] for n in self.shape.weights(path)} for path in adapted}
        if any(plan.still for plan in plans) or any(
            own & {*whole} and own - {*whole} for own in parts.values()
        ):
            return
        name = self.new_name()
        heads = any(plan.head is not None for plan in plans)
        factorless = any(plan.method not in (None, *LOW_RANK) for plan in plans)
        sums = {} if heads else self.sum_of_changes(weights)
        spread = [self.base()[n].double() + c for n, c in sums.items() if n.endswith("_var")]
        if heads or factorless or any((value < 0).any() for value in spread):
            with self.refused(AdaptationError, ValueError):
                self.bank.combine(weights, name)
            return
        self.bank.combine(weights, name)
        self.uncovered()
        left = tuple(path for path in adapted if parts[path].isdisjoint(whole))
        plan = Plan(self.shape, "lora" if left else None, left, (), None, still=False)
        place = {n: self.base()[n].double() + sums.pop(n)  # of statistics, as they are now
                 for n in self.shape.buffers if n in sums}  # fmt: skip
        delta = Delta(plan, {}, {}, place, changes=sums, made=True, late=whole)
        delta.flags = dict.fromkeys(delta.chosen, True)
        self.away[name] = delta

    def trained_in_place(self, delta: Delta) -> list[str]:
        """The parameters of the base that it trains, whether or not they have moved."""
        return [n for n in delta.in_place if n not in self.shape.buffers]

    def sum_of_changes(self, weights: Mapping[str, float]) -> Values:
        sums: Values = {}
        for name, weight in weights.items():
            for tensor, change in self.changes(self.named()[name]).items():
                sums[tensor] = sums.get(tensor, 0) + weight * change
        return sums

    @operation(lambda self: is_known(self) and self.named() and not self.training, weight=2)
    def rows(self, chance: random.Random) -> None:
        """Each row is that of its own delta; what cannot differ between rows is refused."""
        named = self.named()
        names = [chance.choice([*named, None]) for _ in range(3)]
        expected = []
        for row, name in enumerate(names):
            delta = None if name is None else self.as_away(named[name])
            base = {n: as_double(v) for n, v in self.base().items()}
            values = base if delta is None else self.on_base(delta)
            with torch.no_grad():
                expected.append(computed(self.shape, values, X, lambda path: False)[0][row])
        try:
            with self.bank.rows(names):
                found = self.net(X)
        except (AdaptationError, ValueError, RuntimeError):
            assert not all(n is None or self.differs_by_row(named[n].plan) for n in names)
            return
        finally:
            self.uncovered()
        for row, value in enumerate(expected):
            self.close(found[row], value, f"row {row}")

    def differs_by_row(self, plan: Plan) -> bool:
        """Whether a change surely can differ between rows: low-rank changes of linear layers."""
        linear = all(self.shape.classes[path] is nn.Linear for path in plan.adapted)
        simple = {"linear", "nested", "layer_norm"}.issuperset(self.shape.pieces)
        alone = not plan.trained and plan.head is None and not self.shape.tied
        return linear and simple and alone and plan.method in LOW_RANK

    def teardown(self) -> None:
        self.folder.cleanup()


def as_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def as_double(value: Tensor) -> Tensor:
    return as_dtype(value, torch.float64)


class Failure(Exception):
    """Of the code within a block."""


TestSequences = pytest.mark.filterwarnings("ignore::gift.GiftWarning")(Sequences.TestCase)
TestSequences.settings = settings(
    max_examples=int(os.environ.get("GIFT_EXAMPLES", 1000 if LONG else 50)),
    stateful_step_count=25,
    derandomize=not LONG,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink] if LONG else [Phase.generate],  # shrinking takes minutes
)
