"""Classes of any layout, metaclass and way of being copied, as networks and as layers."""

import copy
import json
import pickle
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pytest
import torch
from torch import Tensor, nn

import gift
from gift.factories import mc_path
from gift.strategies import (
    BitFitFineTuningStrategy,
    BottleneckFineTuningStrategy,
    DoRAAllFineTuningStrategy,
    FullFineTuningStrategy,
    IA3AllFineTuningStrategy,
    LoRAAllFineTuningStrategy,
)
from tests.common import full_state

Item = TypeVar("Item")


class NoSlots:
    __slots__ = ()


class OneSlot:
    __slots__ = ("slot",)


class WeakSlot:
    __slots__ = ("__weakref__",)


class DictSlot:
    __slots__ = ("__dict__",)


class Ordinary:
    pass


class Contract(Protocol):
    def other(self, x: Any) -> Any: ...


class Registered:
    """A base that keeps a list of its subclasses."""

    __slots__ = ()
    known: list[type] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.known.append(cls)


class Closed(nn.Module):
    """A class that takes no subclass of its subclasses."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Closed not in cls.__bases__:
            raise TypeError(f"{cls.__bases__[0].__name__} is final")


class Listing(type):
    """A metaclass that keeps a list of its classes."""

    known: list[type] = []

    def __init__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args)
        Listing.known.append(cls)


class Asking(type):
    """A metaclass that needs a keyword."""

    def __new__(cls, name: str, bases: Any, namespace: Any, *, word: str) -> Any:
        return super().__new__(cls, name, bases, namespace)

    def __init__(cls, name: str, bases: Any, namespace: Any, *, word: str) -> None:
        super().__init__(name, bases, namespace)


LAYOUTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "abc first": ((ABC, "base"), {}, {}),
    "abc last": (("base", ABC), {}, {}),
    "generic first": ((Generic[Item], "base"), {}, {}),
    "generic last": (("base", Generic[Item]), {}, {}),
    "protocol": ((Contract, "base"), {}, {}),
    "no slots": ((NoSlots, "base"), {}, {}),
    "several": ((NoSlots, ABC, Ordinary, "base"), {}, {}),
    "one slot": ((OneSlot, "base"), {}, {}),
    "slots of its own": (("base",), {}, {"__slots__": ("slot",)}),
    "weak slot": ((WeakSlot, "base"), {}, {}),
    "dict slot": ((DictSlot, "base"), {}, {}),
    "ordinary": ((Ordinary, "base"), {}, {}),
    "registered": ((Registered, "base"), {}, {}),
    "closed": ((Closed, "base"), {}, {}),
    "listing": (("base",), {"metaclass": Listing}, {}),
    "asking": (("base",), {"metaclass": Asking, "word": "please"}, {}),
    "a dict too": (("base", dict), {}, {"__hash__": object.__hash__}),
}


def _class(layout: str, base: type, name: str) -> Any:
    """A class of that layout, found by pickle under its name."""
    bases, keywords, own = LAYOUTS[layout]
    real = tuple(base if b == "base" else b for b in bases)
    made = types.new_class(name, real, keywords, lambda space: space.update(own))
    made.__module__ = __name__
    globals()[made.__qualname__] = made
    return made


def _perturbed(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_as_network_and_as_layer(layout: str) -> None:
    """Effective weight by hand; copies, merging and the way back, as for any other class."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer(6, 6)
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    if layout == "closed":
        layer: Any = nn.Linear  # as the layers of the class would be subclasses of two modules
    else:
        layer = _class(layout, nn.Linear, "Layer")
    network: Any = _class(layout, Body, "Network")
    known = len(Registered.known), len(Listing.known)
    torch.manual_seed(0)
    net, x = network(), torch.randn(3, 6)
    before, kept = net(x), copy.deepcopy(net.state_dict())
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
    assert isinstance(net, network)
    assert isinstance(net.inner, layer)
    assert torch.equal(net(x), before)
    _perturbed(net)
    own = net.inner._parameters
    weight = own["weight"] + own["lora_B"] @ own["lora_A"]
    tuned = net(x)
    torch.testing.assert_close(tuned, nn.functional.linear(x, weight, net.inner.bias))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin) is type(net)
        assert torch.equal(twin(x), tuned)
        twin(x).sum().backward()
        assert twin.inner.lora_B.grad is not None
        assert net.inner.lora_B.grad is None
    with gift.merged(net):
        torch.testing.assert_close(net(x), tuned)
        assert isinstance(net, network)
    with gift.disabled(net):
        assert type(net) is network
        assert torch.equal(net(x), before)
    assert torch.equal(net(x), tuned)
    torch.testing.assert_close(gift.merge(copy.deepcopy(net))(x), tuned)
    gift.disable_fine_tuning(net)
    assert type(net) is network
    assert type(net.inner) is layer
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert (len(Registered.known), len(Listing.known)) == known, "hooks saw a class of gift's"


def test_abstract_methods_stay_implemented_and_super_finds_its_way() -> None:
    class Stage(ABC, nn.Module):
        @abstractmethod
        def forward(self, x: Tensor) -> Tensor: ...

        def train(self, mode: bool = True) -> Any:
            self.calls = [*getattr(self, "calls", []), mode]
            return super().train(mode)

    class Projection(Stage):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def train(self, mode: bool = True) -> Any:
            return super().train(mode)

    net = Projection()
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    assert net.eval() is net
    assert net.calls == [False]
    assert not net.inner.training
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = torch.randn(2, 4)
    assert torch.equal(compiled(x), net(x))


def test_a_class_that_somebody_derives_from_an_adapted_one() -> None:
    """As FSDP2 does, with a class of its own in front."""

    class Front:
        def hello(self) -> str:
            return "front"

    class Net(ABC, nn.Linear):
        pass

    net, x = Net(4, 4), torch.randn(2, 4)
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    _perturbed(net)
    tuned = net(x)
    derived: Any = type("Derived", (type(net),), {"hello": Front.hello})
    net.__class__ = derived
    assert net.hello() == "front"
    assert torch.equal(net(x), tuned)


class ByConfig(nn.Module):
    """Pickled as its settings and state, as some authors do."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.size, self.cache = size, {"made": object()}
        self.inner = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Reduced(ByConfig):
    def __reduce__(self) -> Any:
        return type(self), (self.size,), self.state_dict()

    def __setstate__(self, state: Any) -> None:
        self.load_state_dict(state)


class Stated(ByConfig):
    def __getstate__(self) -> Any:
        return {"size": self.size, "values": self.state_dict()}

    def __setstate__(self, state: Any) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
        self.load_state_dict(state["values"])


class Copied(ByConfig):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self)(self.size)
        memo[id(self)] = twin
        twin.load_state_dict(self.state_dict())
        return twin


class Uncached(ByConfig):
    def __getstate__(self) -> Any:
        return {key: value for key, value in self.__dict__.items() if key != "cache"}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.cache = {}


class ReducedLayer(nn.Linear):
    def __reduce__(self) -> Any:
        return type(self), (self.in_features, self.out_features), self.state_dict()

    def __setstate__(self, state: Any) -> None:
        self.load_state_dict(state)


class OfReducedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ReducedLayer(4, 4), ReducedLayer(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _copies(net: Any) -> Iterator[Any]:
    yield copy.deepcopy(net)
    yield pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("kind", [Reduced, Stated, Copied, Uncached])
def test_copies_that_the_author_makes_in_his_own_way(kind: Any) -> None:
    """A copy is fine-tuned as the original is, and independent of it."""
    torch.manual_seed(0)
    net, x = kind(), torch.randn(3, 4)
    base = net(x)
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
    _perturbed(net)
    tuned, names = net(x), list(net.state_dict())
    for twin in _copies(net):
        assert torch.equal(twin(x), tuned)
        assert list(twin.state_dict()) == names
        assert len(list(twin.parameters())) == 2
        twin.load_state_dict(net.state_dict())
        _perturbed(twin)
        assert torch.equal(net(x), tuned)
        assert not torch.equal(twin(x), tuned)
        assert torch.equal(gift.disable_fine_tuning(twin)(x), base)
    assert torch.equal(net(x), tuned)
    assert list(net._modules) == ["inner"]


def test_layers_that_are_copied_in_their_own_way() -> None:
    torch.manual_seed(0)
    net, x = OfReducedLayers(), torch.randn(3, 4)
    strategy = gift.FineTuningStrategy(
        [(gift.factories.mc_path("first"), gift.factories.ma_adapt("lora", rank=2))]
    )
    gift.enable_fine_tuning(net, strategy)
    _perturbed(net)
    tuned = net(x)
    for twin in _copies(net):
        torch.testing.assert_close(twin(x), tuned)


class Found(ByConfig):
    def get_parameter(self, target: str) -> Any:
        return super().get_parameter(f"inner.{target}")


def test_get_parameter_of_the_author() -> None:
    net = Found()
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
    assert net.get_parameter("bias") is net.inner.bias
    assert net.inner.get_parameter("weight") is net.inner._parameters["weight"]


class Anything:
    """What has every attribute, and can be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


ANSWERS = {"nothing": None, "a function": lambda *args, **kwargs: None, "anything": Anything()}


def _answering(base: type, answer: str, *arguments: Any) -> Any:
    """A module with an answer for each name that is not there; its inner modules', if "inner"."""

    class Answering(base):  # type: ignore[misc,valid-type]
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                # Torch itself asks before a module is complete.
                if name.startswith("__") or "complete" not in vars(self):
                    raise
                if answer != "inner":
                    return ANSWERS[answer]
                for module in self.children():
                    return getattr(module, name)
                raise

    made = Answering(*arguments)
    vars(made)["complete"] = True
    return made


ANSWERED: dict[str, Any] = {
    "lora": LoRAAllFineTuningStrategy(rank=1),
    "dora": DoRAAllFineTuningStrategy(rank=1),
    "ia3": IA3AllFineTuningStrategy(),
    "bottleneck": BottleneckFineTuningStrategy(2, after=mc_path("3")),
    "whole": FullFineTuningStrategy(),
    "biases": BitFitFineTuningStrategy(),
}


@pytest.mark.filterwarnings("ignore::gift.GiftWarning")
@pytest.mark.parametrize("name", ANSWERED)
@pytest.mark.parametrize("answer", [*ANSWERS, "inner"])
def test_modules_with_an_answer_for_every_name(answer: str, name: str, tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return _answering(
            nn.Sequential, answer,
            _answering(nn.Conv2d, answer, 3, 4, 3), nn.Flatten(),
            _answering(nn.Sequential, answer, _answering(nn.Linear, answer, 144, 8), nn.ReLU()),
            _answering(nn.Linear, answer, 8, 4),
        )  # fmt: skip

    net, x, strategy = build(), torch.randn(2, 3, 8, 8), ANSWERED[name]
    before, start = net(x), full_state(net)
    gift.plan_fine_tuning(net, strategy)
    assert full_state(net) == start
    gift.enable_fine_tuning(net, strategy)
    assert torch.equal(net(x), before)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):  # the first step may move one factor alone
        net(x).square().sum().backward()
        optimizer.step()
    found = net(x)
    assert not torch.allclose(found, before)
    gift.save(net, tmp_path / "delta.safetensors")
    fresh = build()
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(fresh(x), found)
    assert torch.equal(copy.deepcopy(net)(x), found)
    assert torch.equal(gift.reference(net)(x), found)
    with gift.merged(net):
        torch.testing.assert_close(net(x), found)
    with gift.disabled(net):
        assert torch.equal(net(x), before)
    assert torch.equal(net(x), found)
    gift.disable_fine_tuning(net)
    assert torch.equal(net(x), before)


@pytest.mark.filterwarnings("ignore::gift.GiftWarning")
@pytest.mark.parametrize("answer", [*ANSWERS, "inner"])
def test_an_answer_for_every_name_is_no_configuration(answer: str, tmp_path: Path) -> None:
    """Files of others, which tell where a network came from, if it knows."""
    net = _answering(nn.Sequential, answer, _answering(nn.Linear, answer, 8, 4))
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    gift.save_peft(net, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config.get("base_model_name_or_path") is None
    gift.save_kohya(net, tmp_path / "delta.safetensors")
