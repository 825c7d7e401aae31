"""Methods of torch that authors override, with signatures and names of their own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift.strategies import LoRAAllFineTuningStrategy

from .common import enabled


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Moved(Base):
    """Calls are written down; their arguments are those that torch gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def _apply(self, fn: Any) -> Any:
        self.calls.append("_apply")
        return super()._apply(fn)

    def to(self, *args: Any) -> Any:
        self.calls.append(args)
        return super().to(*args)

    def half(self) -> Any:
        return super().to(torch.float16)

    def train(self, mode: bool) -> Any:
        self.calls.append(mode)
        return super().train(mode)

    def zero_grad(self) -> Any:
        self.calls.append("zero_grad")

    def children(self) -> Any:
        return [self.first, self.second]


class OwnApplyOfLayer(nn.Linear):
    def _apply(self, fn: Any) -> Any:
        super()._apply(fn)
        return "author"


class Keywords(Base):
    def load_state_dict(self, sd: Any, **kw: Any) -> Any:
        return super().load_state_dict(sd, **kw)

    def state_dict(self) -> Any:  # type: ignore[override]
        return super().state_dict()


class Renamed(Base):
    """Keys of its own, and an answer of its own."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"model.{key}": value for key, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        plain = {key.removeprefix("model."): value for key, value in state_dict.items()}
        return "loaded", super().load_state_dict(plain, strict, assign)


class Silent(Base):
    """Leaves all out of its state, as frozen backbones do, and takes anything."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        super().state_dict(*args, **kwargs)
        return {}


class HiddenPart(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs.get("destination", {})


class WithHiddenPart(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = HiddenPart(4, 4)


class Listed(Base):
    """Gives its parameters as a list, that of the last layer first and without the first one's."""

    def parameters(self) -> Any:  # type: ignore[override]
        return list(self.second.parameters())

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return super().named_parameters(*args, **kwargs)


class OwnNames(nn.Linear):
    """Writes its effective weight under another name, and reads it there (as others transpose)."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "kernel"] = self.weight.detach().t().contiguous()
        destination[prefix + "offset"] = self.bias.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        unexpected, _ = rest
        for mine, theirs in (("weight", "kernel"), ("bias", "offset")):
            if (value := state_dict.get(prefix + theirs)) is not None:
                with torch.no_grad():
                    self._parameters[mine].copy_(value.t() if value.ndim == 2 else value)  # type: ignore[union-attr]
            else:
                missing.append(prefix + theirs)
        known = {prefix + "kernel", prefix + "offset"}
        unexpected += [key for key in state_dict if key.startswith(prefix) and key not in known]


class OfOwnNames(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = OwnNames(4, 4), OwnNames(4, 2)


NETWORKS = [Base, Keywords, Renamed, Silent, WithHiddenPart, Listed, OfOwnNames]
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", NETWORKS)
def test_deltas_are_in_state_and_file_whatever_the_author_writes(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = kind()
    net = enabled(copy.deepcopy(base), LoRAAllFineTuningStrategy(rank=2))
    tuned, state = net(X), net.state_dict()
    trained = {p.data_ptr() for _, p in nn.Module.named_parameters(net) if p.requires_grad}
    assert len(trained) == 4
    assert trained == {v.data_ptr() for v in state.values() if isinstance(v, Tensor)} & trained
    frozen = {p.data_ptr() for _, p in nn.Module.named_parameters(net) if not p.requires_grad}
    if kind is not OfOwnNames:  # whose names nobody else knows
        assert not frozen & {value.data_ptr() for value in state.values()}
    gift.save(net, tmp_path / "delta.safetensors")
    fresh = copy.deepcopy(base)
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(fresh(X), tuned)
    other = enabled(copy.deepcopy(base), LoRAAllFineTuningStrategy(rank=2), std=0.5)
    assert not torch.equal(other(X), tuned)
    answer = other.load_state_dict(state)
    assert torch.equal(other(X), tuned)
    if kind is Renamed:
        assert answer[0] == "loaded"
    assert torch.equal(gift.disable_fine_tuning(net)(X), base(X))


@pytest.mark.parametrize("kind", NETWORKS)
def test_parameters_are_those_that_are_trained(kind: Any) -> None:
    net = enabled(kind(), LoRAAllFineTuningStrategy(rank=2))
    given = list(net.parameters())
    trained = [p for _, p in nn.Module.named_parameters(net) if p.requires_grad]
    assert {id(p) for p in given} == {id(p) for p in trained}
    assert len(given) == 4
    if kind is Listed:  # in the author's order, then the others
        assert given[0] is net.second.lora_B


def test_the_state_of_an_author_has_the_frozen_weight() -> None:
    """Where an author's code reads ``self.weight`` to write it, it is not an effective weight."""
    net = OfOwnNames()
    weight = net.first.weight.detach().clone()
    enabled(net, LoRAAllFineTuningStrategy(rank=2))
    kernel = nn.Module.state_dict(net)["first.kernel"]
    assert torch.equal(kernel.t(), weight)
    base = {"kernel": torch.ones(4, 4), "offset": torch.zeros(4)}
    before = net.first.lora_B.detach().clone()
    assert list(net.first._parameters) == ["weight", "bias", "lora_B", "lora_A"]
    missing: list[str] = []
    unexpected: list[str] = []
    net.first._load_from_state_dict(base, "", {}, True, missing, unexpected, [])
    assert unexpected == []
    assert sorted(missing) == ["lora_A", "lora_B"]
    assert torch.equal(net.first._parameters["weight"], torch.ones(4, 4))
    assert torch.equal(net.first.lora_B, before)
    assert list(net.first._parameters) == ["weight", "bias", "lora_B", "lora_A"]


def test_arguments_are_passed_on_as_they_came() -> None:
    net: Any = Moved()
    net.first = OwnApplyOfLayer(4, 4)
    enabled(net, LoRAAllFineTuningStrategy(rank=1))
    assert net.first._apply(lambda t: t) == "author"
    net.calls.clear()
    assert net.double() is net
    assert net.to(torch.float32) is net
    assert net.calls == ["_apply", (torch.float32,), "_apply"]
    net.half()
    net.float()
    net.train(False)
    net.zero_grad()
    net(X).sum().backward()
    assert net.first.lora_B.grad is not None
    gift.disable_fine_tuning(net)
    assert type(net) is Moved
    assert type(net.first) is OwnApplyOfLayer


@pytest.mark.parametrize("given", [("strict",), ("assign",), ()])
def test_keywords_of_load_state_dict(given: tuple[str, ...]) -> None:
    net = enabled(Keywords(), LoRAAllFineTuningStrategy(rank=1))
    other = enabled(Keywords(), LoRAAllFineTuningStrategy(rank=1))
    other.load_state_dict(sd=net.state_dict(), **dict.fromkeys(given, True))
    assert torch.equal(other.first.lora_A, net.first.lora_A)
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        other.load_state_dict(sd={"first.lora_B": torch.zeros(4, 1)})
    with pytest.raises(TypeError, match="state_dict"):
        other.load_state_dict(net.state_dict(), True)  # as the author's takes one only


class Packed(Base):
    """Gives its state in a format of its own."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(super().state_dict(*args, **kwargs).items())


def test_a_state_in_a_format_of_the_author_is_given_as_it_is() -> None:
    net = enabled(Packed())
    found = net.state_dict()
    assert isinstance(found, tuple)
    assert {"first.weight", "second.bias"} <= {name for name, _ in found}


def test_parameters_by_name_are_the_frozen_ones_and_those_of_deltas() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    weight = net[0].weight
    enabled(net)
    assert net.get_parameter("0.weight") is weight
    assert net[0].get_parameter("weight") is weight
    assert net[0].get_parameter("lora_A") is net[0].lora_A
    for name in ("bias", "nothing"):
        with pytest.raises(AttributeError, match=name):
            net[0].get_parameter(name)
        with pytest.raises(AttributeError, match=name):
            net.get_parameter(f"0.{name}")


def test_a_traced_graph_is_compiled_anew_as_the_class_that_it_was() -> None:
    net: Any = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    plain, x = type(net), torch.randn(3, 4)
    enabled(net)
    adapted, before = type(net), net(x)
    output = next(node for node in net.graph.nodes if node.op == "output")
    with net.graph.inserting_before(output):
        output.args = (net.graph.call_function(torch.neg, output.args),)
    net.recompile()
    assert type(net) is adapted
    torch.testing.assert_close(net(x), -before)
    gift.disable_fine_tuning(net)
    assert type(net) is plain
    first, second = net.get_submodule("0"), net.get_submodule("1")
    torch.testing.assert_close(net(x), -second(first(x)))
