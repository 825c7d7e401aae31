"""Memory that several tensors show: fine-tuning is right for all of them, or refused in words."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import DeltaBank, FineTuningStrategy, enable_fine_tuning
from gift.errors import AdaptationError
from gift.factories import ma_adapt, ma_freeze, ma_train, mc_path
from gift.schedules import FreezeUnfreeze
from gift.strategies import FullFineTuningStrategy, LoRAAllFineTuningStrategy
from tests.common import enabled, full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.GiftWarning")

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers; `share` lets something show the memory of the first weight."""

    def __init__(self, share: Callable[[Any], None]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        share(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def _parts(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Any:
    def share(net: Any) -> None:
        big = torch.randn(16, 16)
        net.first.weight, net.second.weight = (nn.Parameter(f(big)) for f in (first, second))

    return share


def _tuple_of_the_weight(net: Any) -> None:
    net.weights = (net.first.weight,)


# fmt: off
SHARES: dict[str, Callable[[Any], None]] = {
    "overlapping rows": _parts(lambda b: b[:8, :8], lambda b: b[4:12, :8]),
    "overlapping columns": _parts(lambda b: b[:8, :8], lambda b: b[:8, 7:15]),
    "the same memory": _parts(lambda b: b[:8, :8], lambda b: b[:8, :8]),
    "transposed": _parts(lambda b: b[:8, :8], lambda b: b[:8, :8].T),
    "gaps": _parts(lambda b: b[::2, ::2], lambda b: b[::2, :8]),
    "expanded": _parts(lambda b: b[:8, :1].expand(8, 8), lambda b: b[:8, :8]),
}
APART: dict[str, Callable[[Any], None]] = {
    "rows": _parts(lambda b: b[:8, :8], lambda b: b[8:, :8]),
    "columns": _parts(lambda b: b[:8, :8], lambda b: b[:8, 8:]),
    "combs": _parts(lambda b: b[::2, :8], lambda b: b[1::2, :8]),
    "tied": lambda net: setattr(net.second, "weight", net.first.weight),
}
ALIASES: dict[str, Callable[[Any], None]] = {
    "buffer": lambda net: net.register_buffer("alias", net.first.weight.detach()),
    "not saved": lambda net: net.register_buffer("alias", net.first.weight.detach(), False),
    "part": lambda net: net.register_buffer("alias", net.first.weight.detach()[2:3].T),
    "as integers": lambda net: net.register_buffer("alias", net.first.weight.data.view(torch.int)),
    "the parameter": lambda net: net.register_buffer("alias", net.first.weight),
    "attribute": lambda net: setattr(net, "alias", net.first.weight.data),
    "of the layer": lambda net: setattr(net.first, "alias", net.first.weight.data[0]),
    "tuple": lambda net: setattr(net, "alias", (net.first.weight,)),
}
# fmt: on


def adapting(*names: str) -> gift.FineTuningStrategy:
    return gift.FineTuningStrategy([(mc_path(*names), ma_adapt("lora", rank=2))])


def refused(net: nn.Module, strategy: gift.FineTuningStrategy, match: str) -> None:
    before = full_state(net)
    with pytest.raises(AdaptationError, match=match):
        gift.enable_fine_tuning(net, strategy)
    assert full_state(net) == before


@pytest.mark.parametrize("name", SHARES)
def test_one_that_is_adapted_and_one_that_is_not(name: str) -> None:
    refused(Net(SHARES[name]), adapting("first"), "first.weight is adapted, second.weight is froz")
    refused(Net(SHARES[name]), adapting("second"), "share memory")
    both = gift.FineTuningStrategy([
        (mc_path("first"), ma_adapt("lora", rank=2)), (mc_path("second"), ma_train()),
    ])  # fmt: skip
    refused(Net(SHARES[name]), both, "second.weight is trained")


@pytest.mark.parametrize("name", SHARES)
def test_one_that_is_trained_moves_no_frozen_one(name: str) -> None:
    strategy = gift.FineTuningStrategy([(mc_path("first"), ma_train()),
                                        (mc_path("second"), ma_freeze())])  # fmt: skip
    refused(Net(SHARES[name]), strategy, "first.weight is trained, second.weight is frozen")


@pytest.mark.parametrize("name", [*SHARES, *APART])
def test_one_fate_of_both_is_right(name: str) -> None:
    """Each has a delta of its own; merging gives each the memory that it then needs."""
    net = enabled(Net((SHARES | APART)[name]), adapting("first", "second"))
    weights = [m._parameters["weight"] for m in (net.first, net.second)]
    owners = (net.first, net.first if name == "tied" else net.second)
    deltas = [owner.lora_B @ owner.lora_A for owner in owners]
    expected = [weight + delta for weight, delta in zip(weights, deltas, strict=True)]
    with torch.no_grad():
        hidden = torch.tanh(X @ expected[0].T + net.first.bias)
        output = hidden @ expected[1].T + net.second.bias
    values = [w.detach().clone() for w in weights]
    with gift.merged(net):
        torch.testing.assert_close(net(X), output)
    assert all(torch.equal(w, v) for w, v in zip(weights, values, strict=True))
    merged = gift.merge(copy.deepcopy(net))
    torch.testing.assert_close(merged(X), output)
    gift.merge(net)
    torch.testing.assert_close(net(X), output)


@pytest.mark.parametrize("name", APART)
def test_parts_that_do_not_overlap_have_fates_of_their_own(name: str) -> None:
    net: Any = Net(APART[name])
    gift.enable_fine_tuning(net, adapting("first"))
    assert type(net.second) is nn.Linear or name == "tied"


@pytest.mark.parametrize("name", ALIASES)
def test_what_shows_an_adapted_weight_would_show_the_base(name: str) -> None:
    """It may be there while the weight is trained as it is: then it shows that, as ever."""
    refused(Net(ALIASES[name]), adapting("first"), "alias is a")
    net: Any = Net(ALIASES[name])
    gift.enable_fine_tuning(net, adapting("second"))
    net = Net(ALIASES[name])
    gift.enable_fine_tuning(net, gift.FineTuningStrategy([(mc_path("first"), ma_train())]))


def test_weights_of_a_recurrent_layer_in_one_memory() -> None:
    """It holds a list of them, and where a GPU computes, all in one memory."""
    layer: Any = nn.LSTM(3, 4)
    big = torch.cat([p.detach().flatten() for p in layer.parameters()])
    start = 0
    for parameter in layer.parameters():
        parameter.data = big[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    x = torch.randn(2, 1, 3)
    before = layer(x)[0]
    gift.enable_fine_tuning(layer, LoRAAllFineTuningStrategy(rank=1))
    assert torch.equal(layer(x)[0], before)


def two() -> tuple[Any, Any]:
    first, second = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)) for _ in range(2))
    second[0].weight = first[0].weight
    return first, second


def test_a_weight_of_two_networks_is_fine_tuned_in_one() -> None:
    first, second = two()
    enabled(first)
    before = full_state(second)
    with pytest.raises(RuntimeError, match=r"0\.weight is also a parameter of another Sequential"):
        gift.enable_fine_tuning(second, LoRAAllFineTuningStrategy())
    assert full_state(second) == before
    with gift.disabled(first), pytest.raises(RuntimeError, match="another Sequential"):
        gift.enable_fine_tuning(second, LoRAAllFineTuningStrategy())
    gift.disable_fine_tuning(first)
    enabled(second)
    expected = second(X)
    with pytest.raises(RuntimeError, match="another Sequential"):
        gift.enable_fine_tuning(first, LoRAAllFineTuningStrategy())
    assert torch.equal(second(X), expected)


def test_a_network_that_is_gone_holds_nothing() -> None:
    first, second = two()
    enabled(first)
    first.itself = [first]  # which only a collection of garbage frees
    gc.disable()
    try:
        del first
        enabled(second)
    finally:
        gc.enable()


def test_a_bank_does_not_put_a_delta_on_what_another_network_holds() -> None:
    first, second = two()
    bank = DeltaBank(first)
    bank.add("a", strategy=LoRAAllFineTuningStrategy())
    enabled(second)
    before = full_state(first)
    with pytest.raises(RuntimeError, match="another Sequential"):
        bank.activate("a")
    assert (full_state(first), bank.active) == (before, None)
    gift.disable_fine_tuning(second)
    bank.activate("a")


def test_copies_and_references_share_what_nobody_writes_to() -> None:
    net = enabled(nn.Sequential(nn.Linear(8, 8)))
    before, twin = gift.reference(net), copy.deepcopy(net)
    gift.disable_fine_tuning(net)
    enabled(net)
    assert len({type(n) for n in (before, twin, net)}) == 1


def scheduled(net: Any, **settings: Any) -> FreezeUnfreeze:
    """A schedule that trains the first layer from epoch 1 on."""
    blocks = ["0"] if isinstance(net, nn.Sequential) else ["first"]
    head = "1" if isinstance(net, nn.Sequential) else "second"
    return FreezeUnfreeze(1, head=head, blocks=blocks, **settings)


def looked(*nets: nn.Module) -> Any:
    return [full_state(net) for net in nets]


def view_of(weight: Tensor) -> nn.Sequential:
    """Another network, whose first weight shows a part of that memory."""
    other = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    other[0].weight = nn.Parameter(weight.data[2:6])
    return other


@pytest.mark.parametrize("fine_tuned", [True, False])
def test_a_schedule_trains_no_memory_of_another_network(fine_tuned: bool) -> None:
    """Refused as it is attached, also where it would be trained later only."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    other = enabled(view_of(net[0].weight), adapting("0"))
    if fine_tuned:
        enabled(net, adapting("1"))
    before = looked(net, other)
    with pytest.raises(AdaptationError, match=r"0\.weight: a Sequential that is being fine-tuned"):
        scheduled(net).attach(net)
    assert looked(net, other) == before
    gift.disable_fine_tuning(other)
    scheduled(net).attach(net)


def test_a_schedule_whose_memory_another_network_holds_since_does_not_step() -> None:
    """As a reference for preference optimisation, which must not move."""
    net = enabled(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), adapting("1"))
    schedule = scheduled(net)
    schedule.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reference = gift.reference(net)
    before, groups = looked(net, reference), len(optimizer.param_groups)
    with pytest.raises(AdaptationError, match=r"0\.weight: a Sequential .* gift\.reference"):
        schedule.step(1, optimizer)
    assert looked(net, reference) == before
    assert (schedule.trained, len(optimizer.param_groups)) == ([], groups)
    del reference
    assert schedule.step(1, optimizer) == ["0"]


@pytest.mark.parametrize("name", SHARES)
def test_a_schedule_trains_no_view_of_a_frozen_weight(name: str) -> None:
    class Larger(Net):
        def __init__(self, share: Callable[[Any], None]) -> None:
            super().__init__(share)
            self.third = nn.Linear(8, 2)

    net = Larger(SHARES[name])
    schedule = FreezeUnfreeze(1, head="third", blocks=["first"])
    before = looked(net)
    with pytest.raises(AdaptationError, match=r"first\.weight: it shares memory with second\.wei"):
        schedule.attach(net)
    assert looked(net) == before
    FreezeUnfreeze(1, head="third", blocks=["first", "second"]).attach(net)
    with pytest.raises(AdaptationError, match="shares memory"):
        FreezeUnfreeze(1, head="third", blocks=["second"]).attach(net)


@pytest.mark.parametrize("name", APART)
def test_a_schedule_trains_what_no_other_shows(name: str) -> None:
    net: Any = Net(APART[name])
    scheduled(net).attach(net)


def test_frozen_tensors_of_one_memory_are_no_conflict() -> None:
    """As long as nothing of it is trained or adapted."""
    net, memory = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(24)
    net[0].weight = nn.Parameter(memory[:16].view(4, 4))
    net[1].weight = nn.Parameter(memory[8:].view(4, 4))
    strategy = FineTuningStrategy([(mc_path("2"), ma_adapt("lora", rank=1))])
    report = enable_fine_tuning(net, strategy)
    assert report.trainable_after == 8


def test_networks_that_train_other_parts_of_one_memory() -> None:
    memory = torch.randn(32)
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    one.weight = nn.Parameter(memory[:16].view(4, 4))
    other.weight = nn.Parameter(memory[16:].view(4, 4))
    enable_fine_tuning(one, LoRAAllFineTuningStrategy(rank=1))
    enable_fine_tuning(other, FullFineTuningStrategy())
    with torch.no_grad():
        other.weight.add_(1)
    overlapping = nn.Linear(4, 4, bias=False)
    overlapping.weight = nn.Parameter(memory[12:28].view(4, 4))
    with pytest.raises(ValueError, match="shares its memory"):
        enable_fine_tuning(overlapping, FullFineTuningStrategy())


def test_weights_over_one_memory_are_merged_each_with_its_delta() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = nn.Parameter(net[0].weight.detach())
    assert net[2].weight.data_ptr() == net[0].weight.data_ptr()
    enabled(net)
    x = torch.randn(3, 4)
    expected = net(x)
    gift.merge(net)
    torch.testing.assert_close(net(x), expected)
    assert not torch.allclose(net[0].weight, net[2].weight)
