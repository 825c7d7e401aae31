"""What ``parameters()`` and ``state_dict()`` give, what loads, and the way back to the base."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import gift
from gift import (
    FineTuningStrategy,
    GiftWarning,
    disable_fine_tuning,
    enable_fine_tuning,
    merge_strategies,
    plan_fine_tuning,
)
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_type, pa_adapt, pa_train, pc_name
from gift.strategies import (
    DebugStrategy,
    FreezeStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    LoRAConvFineTuningStrategy,
)
from gift.utils.network_tool import trainable_parameters
from tests.common import all_bits, bits, enabled, full_state, trainable

# The network of these tests is small, so its one raw parameter is a large share of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* of the base is in raw parameters")


class Net(nn.Module):
    """Convolution, BatchNorm, a parameter of its own, buffers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.scale = nn.Parameter(torch.rand(6, 8))
        self.head = nn.Linear(8, 5)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return self.head(self.body(x).mean((2, 3)) @ self.scale)


STATISTICS = [f"body.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")]
BUFFERS = ["steps", *STATISTICS]
DELTAS = [f"{layer}.lora_{factor}" for layer in ("body.0", "head") for factor in "BA"]


def lora(**options: Any) -> FineTuningStrategy:
    return LoRAAllFineTuningStrategy(**{"rank": 2} | options)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 6, 6)


def train(net: nn.Module, steps: int = 2) -> None:
    """A few real steps with weight decay, by whatever ``parameters()`` gives."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        net(images()).square().sum().backward()
        optimizer.step()


def through_file(state: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def assert_bitwise(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.fixture
def base() -> nn.Module:
    return Net()


@pytest.fixture
def net(base: nn.Module) -> nn.Module:
    """The base, fine-tuned and trained for a few steps."""
    made = copy.deepcopy(base)
    enable_fine_tuning(made, lora())
    train(made)
    return made


def fresh(base: nn.Module, **options: Any) -> nn.Module:
    made = copy.deepcopy(base)
    enable_fine_tuning(made, lora(**options))
    return made


class Outer(nn.Module):
    """A bigger module around a network, which is itself nested in another one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.wrap = nn.ModuleDict({"inner": net})
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wrap["inner"](x))


PREFIX = "wrap.inner."
LAST = ["last.weight", "last.bias"]

# --- what they give ------------------------------------------------------------------------------


def test_parameters_are_the_trained_ones(base: nn.Module) -> None:
    before = dict(base.named_parameters())
    enable_fine_tuning(base, lora())
    named = dict(base.named_parameters())
    assert list(named) == ["scale", "body.0.weight", "body.0.bias", *DELTAS[:2], "body.1.weight",
                           "body.1.bias", "head.weight", "head.bias", *DELTAS[2:]]  # fmt: skip
    assert all(named[name] is parameter for name, parameter in before.items())
    assert [id(p) for p in base.parameters()] == [id(named[name]) for name in DELTAS]
    assert [id(p) for p in trainable_parameters(base)] == [id(named[name]) for name in DELTAS]
    assert list(base.parameters(recurse=False)) == []
    assert [name for name, _ in base.named_parameters(prefix="x", recurse=False)] == ["x.scale"]
    assert base.get_parameter("head.weight") is before["head.weight"]


def test_the_state_is_the_trained_parameters_and_persistent_buffers(net: nn.Module) -> None:
    whole = dict(net.named_parameters()) | dict(net.named_buffers())
    state = net.state_dict()
    assert sorted(state) == sorted(DELTAS + BUFFERS)
    for key, value in state.items():
        assert not value.requires_grad
        assert value.data_ptr() == whole[key].data_ptr(), "no copy"
    assert all(value is whole[key] for key, value in net.state_dict(keep_vars=True).items())


def test_the_order_of_the_state_is_that_of_the_whole_state(net: nn.Module) -> None:
    whole = list(nn.Module.state_dict(net))
    assert list(net.state_dict()) == [key for key in whole if key in DELTAS + BUFFERS]


@pytest.mark.parametrize("call", ["keyword", "positional"])
def test_the_state_under_a_prefix_of_the_caller(net: nn.Module, call: str) -> None:
    mine: Any = OrderedDict(other=torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch wants keywords
        if call == "keyword":
            state = net.state_dict(destination=mine, prefix="a.b.")
        else:
            state = net.state_dict(mine, "a.b.", True)
    assert state is mine
    assert list(state) == ["other", *(f"a.b.{key}" for key in net.state_dict())]
    assert state[f"a.b.{DELTAS[0]}"].requires_grad == (call == "positional")


def test_the_state_inside_bigger_modules(net: nn.Module) -> None:
    outer = Outer(net)
    assert list(outer.state_dict()) == [PREFIX + key for key in net.state_dict()] + LAST
    keep = outer.state_dict(keep_vars=True)
    assert all(keep[PREFIX + n] is p for n, p in net.named_parameters() if n in DELTAS)
    assert list(nn.Sequential(outer).state_dict()) == [f"0.{key}" for key in outer.state_dict()]


def test_two_fine_tuned_networks_in_one(base: nn.Module) -> None:
    outer = nn.ModuleDict({"net": fresh(base), "net2": fresh(base, rank=1), "plain": base})
    keys = {name: list(part.state_dict()) for name, part in outer.items()}
    assert list(outer.state_dict()) == [f"{n}.{key}" for n in keys for key in keys[n]]
    other = copy.deepcopy(outer)
    for part in (outer["net"], outer["net2"], outer["plain"]):
        train(part)
    assert other.load_state_dict(through_file(outer.state_dict())) == ([], [])
    assert_bitwise(other.state_dict(), outer.state_dict())


def test_one_network_under_two_names(net: nn.Module, base: nn.Module) -> None:
    outer = nn.ModuleDict({"a": net, "b": net})
    assert list(outer.state_dict()) == [f"{n}.{key}" for n in "ab" for key in net.state_dict()]
    other = fresh(base)
    nn.ModuleDict({"a": other, "b": other}).load_state_dict(outer.state_dict())
    assert_bitwise(other.state_dict(), net.state_dict())


def test_tied_weights_leave_no_second_name_in_the_state() -> None:
    net = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False), nn.Linear(12, 4))
    net[1].weight = net[0].weight
    keys = list(net.state_dict())
    enable_fine_tuning(net, lora())
    assert list(net.state_dict()) == [f"{i}.lora_{f}" for i in (0, 2) for f in "BA"]
    assert list(disable_fine_tuning(net).state_dict()) == keys


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
def test_other_functions_can_be_left_as_they_are(base: nn.Module, inside: bool) -> None:
    everything, keys = len(list(base.parameters())) + len(DELTAS), list(base.state_dict())
    enable_fine_tuning(base, lora(), replace_parameter_function=False, trainable_state_dict=False)
    assert len(list(base.parameters())) == everything
    assert {id(p) for p in trainable_parameters(base)} == {
        id(p) for n, p in base.named_parameters() if n in DELTAS
    }
    state = Outer(base).state_dict() if inside else base.state_dict()
    prefix = PREFIX if inside else ""
    assert set(state) == {prefix + key for key in keys + DELTAS} | (set(LAST) if inside else set())


def test_a_whole_state_round_trips(base: nn.Module) -> None:
    """``trainable_state_dict=False``: base and deltas in one file."""
    enable_fine_tuning(base, lora(), trainable_state_dict=False)
    train(base)
    other = fresh(Net())
    assert other.load_state_dict(through_file(base.state_dict())) == ([], [])
    assert all_bits(other) == all_bits(base)
    assert_bitwise(other.eval()(x := images()), base.eval()(x))


class Counting(nn.Linear):
    """A layer with a state beside its tensors."""

    count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


def test_extra_state_is_kept() -> None:
    nets = [nn.Sequential(Counting(8, 8), nn.ReLU()) for _ in range(2)]
    for net in nets:
        enable_fine_tuning(net, lora())
    nets[0][0].count = 7
    assert "0._extra_state" in nets[0].state_dict()
    nets[1].load_state_dict(nets[0].state_dict())
    assert nets[1][0].count == 7


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
def test_a_fresh_network_is_restored_exactly(
    base: nn.Module, net: nn.Module, inside: bool, assign: bool
) -> None:
    """Deltas and BatchNorm's statistics; the same output bit for bit in training and evaluation."""
    other, x = fresh(base), images()
    assert not torch.equal(other.eval()(x), net.eval()(x))
    if inside:
        outer = Outer(net)
        target = Outer(other)
        assert target.load_state_dict(through_file(outer.state_dict()), assign=assign) == ([], [])
        assert_bitwise(target(x), outer(x))
    else:
        assert other.load_state_dict(through_file(net.state_dict()), assign=assign) == ([], [])
    assert all_bits(other) == all_bits(net)
    assert trainable(other) == trainable(net)
    assert len(list(other.parameters())) == len(DELTAS)
    for mode in (False, True):
        assert_bitwise(other.train(mode)(x), net.train(mode)(x))


def test_training_goes_on_after_loading(base: nn.Module, net: nn.Module) -> None:
    """Also by the optimizer that was there before."""
    other = fresh(base)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other.load_state_dict(net.state_dict())
    held = {name: p.detach().clone() for name, p in other.named_parameters()}
    other(images()).square().sum().backward()
    optimizer.step()
    assert {n for n, p in other.named_parameters() if not torch.equal(p, held[n])} == set(DELTAS)


def without(*keys: str) -> Callable[[dict], None]:
    return lambda state: [state.pop(key) for key in keys]


def with_values(**values: Tensor) -> Callable[[dict], None]:
    return lambda state: state.update({k.replace("__", "."): v for k, v in values.items()})


# A BatchNorm adds the number of batches itself to a state that says nothing of its version.
WRONG: dict[str, tuple[Callable[[dict], Any], list[str]]] = {
    "a delta is missing": (without("head.lora_A"), ["head.lora_A"]),
    "a buffer is missing": (without("body.1.running_var"), ["body.1.running_var"]),
    "nothing is there": (lambda state: state.clear(), DELTAS + BUFFERS[:-1]),
    "a key is unknown": (with_values(bogus=torch.ones(1)), ["bogus"]),
    "another shape": (with_values(head__lora_B=torch.ones(5, 3)), ["head.lora_B", "[5, 3]"]),
    "a layer was renamed": (
        lambda state: state.update({"tail.lora_A": state.pop("head.lora_A")}),
        ["head.lora_A", "tail.lora_A"],
    ),
    "everything at once": (
        lambda state: [
            without("body.0.lora_A", "steps")(state),
            with_values(bogus=torch.ones(1), head__lora_B=torch.ones(7, 2))(state),
        ],
        ["body.0.lora_A", "steps", "bogus", "head.lora_B", "[7, 2]"],
    ),
    "half of a base": (
        lambda state: [state.clear(), state.update({"head.weight": torch.ones(5, 8)})],
        ["scale", "head.bias", "body.0.weight", *BUFFERS[:-1]],
    ),
}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
@pytest.mark.parametrize("case", WRONG)
def test_a_state_that_does_not_fit_is_refused_whole(
    base: nn.Module, net: nn.Module, case: str, inside: bool
) -> None:
    """One error names all that is wrong, and the network has every bit that it had."""
    spoil, names = WRONG[case]
    state = net.state_dict()
    spoil(state)
    other = fresh(base)
    target: nn.Module = other
    if inside:
        target = Outer(other)
        state = {PREFIX + key: value for key, value in state.items()}
        state |= {key: target.state_dict()[key] for key in LAST}
        names = [PREFIX + n if n[0] != "[" else n for n in names]
    before = full_state(other)
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict(state)
    assert [name for name in names if name not in str(caught.value)] == []
    assert full_state(other) == before
    net_state = net.state_dict()
    other.load_state_dict(net_state)
    assert_bitwise(other.state_dict(), net_state)


@pytest.mark.parametrize("state", [None, [("head.lora_A", 1)], 3])
def test_what_is_no_state_is_refused(net: nn.Module, state: Any) -> None:
    before = full_state(net)
    with pytest.raises(TypeError, match="dict"):
        net.load_state_dict(state)
    assert full_state(net) == before


OTHER_SETTINGS = {
    "alpha": {"lora_alpha": 4.0},
    "rank": {"rank": 1},
    "scaling": {"use_rslora": True},
}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
@pytest.mark.parametrize("which", OTHER_SETTINGS)
def test_deltas_of_other_settings_are_refused(
    base: nn.Module, net: nn.Module, which: str, inside: bool
) -> None:
    """A state says with which settings it was trained, also after a file."""
    other: nn.Module = fresh(base, **OTHER_SETTINGS[which])
    target = Outer(other) if inside else other
    state = through_file((Outer(net) if inside else net).state_dict())
    before = full_state(other)
    held = all_bits(other)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"(?s)body\.0.*trained with.*head.*trained with"):
            target.load_state_dict(state, strict)
    if not inside:
        assert full_state(other) == before
    assert [key for key in DELTAS if all_bits(other)[key] != held[key]] == []


def test_an_alpha_that_means_the_same_is_no_other(base: nn.Module, net: nn.Module) -> None:
    """``lora_alpha=None`` is the rank."""
    other = fresh(base, lora_alpha=2)
    other.load_state_dict(through_file(net.state_dict()))
    assert_bitwise(other.eval()(x := images()), net.eval()(x))


def test_dropout_may_differ(base: nn.Module, net: nn.Module) -> None:
    """It changes how deltas are trained, not what they mean."""
    other = fresh(base, lora_dropout=0.5)
    other.load_state_dict(through_file(net.state_dict()))
    assert_bitwise(other.eval()(x := images()), net.eval()(x))


def test_a_state_that_says_nothing_of_settings_loads(base: nn.Module, net: nn.Module) -> None:
    """Safetensors, and dictionaries made by hand."""
    other = fresh(base)
    other.load_state_dict(dict(net.state_dict()))
    assert_bitwise(other.state_dict(), net.state_dict())


def test_not_strict(base: nn.Module, net: nn.Module) -> None:
    """What fits is loaded, the rest is told; another shape is an error all the same."""
    state = dict(net.state_dict())
    del state["head.lora_A"]
    state["bogus"] = torch.ones(1)
    other = fresh(base)
    held = other.head.lora_A.detach().clone()
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["head.lora_A"], ["bogus"])
    assert_bitwise(other.head.lora_A.detach(), held)
    assert_bitwise(other.head.lora_B, net.head.lora_B)
    missing, unexpected = Outer(other).load_state_dict(
        {PREFIX + key: value for key, value in state.items()}, strict=False
    )
    assert missing == [f"{PREFIX}head.lora_A", *LAST]
    assert unexpected == [f"{PREFIX}bogus"]
    state["head.lora_B"] = torch.ones(1, 1)
    before = full_state(other)
    with pytest.raises(RuntimeError, match=r"head\.lora_B"):
        other.load_state_dict(state, strict=False)
    assert full_state(other) == before


# --- checkpoints of the base ---------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_base_checkpoint_loads_before_and_after_enabling(
    base: nn.Module, net: nn.Module, inside: bool, assign: bool
) -> None:
    """Either way there is the new base, the old delta, and a way back to the new base."""
    new, x = Net(), images()
    train(new)
    new.eval()
    before = copy.deepcopy(base)
    before.load_state_dict(new.state_dict())
    enable_fine_tuning(before, lora())
    before.load_state_dict({n: p for n, p in net.named_parameters() if n in DELTAS}, strict=False)

    target = Outer(net) if inside else net
    state = (Outer(copy.deepcopy(new)) if inside else new).state_dict()
    with pytest.warns(GiftWarning, match="replaced 7 frozen tensors of the base"):
        assert target.load_state_dict(through_file(state), assign=assign) == ([], [])
    assert trainable(net) == trainable(before) == DELTAS
    assert_bitwise(net.eval()(x), before.eval()(x))
    train(net)
    for other in (net, before):
        disable_fine_tuning(other).eval()
        assert_bitwise(other.state_dict(), new.state_dict())
        assert_bitwise(other(x), new(x))


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (without("scale"), "scale"),
        (without("steps"), "steps"),
        (with_values(bogus=torch.ones(1)), "bogus"),
        (with_values(scale=torch.ones(2, 2)), "scale"),
    ],
)
def test_a_base_checkpoint_that_does_not_fit_is_refused(
    net: nn.Module, spoil: Callable, name: str
) -> None:
    state = Net().state_dict()
    spoil(state)
    before = full_state(net)
    with pytest.raises(RuntimeError, match=name):
        net.load_state_dict(state)
    assert full_state(net) == before


def test_a_base_checkpoint_with_trained_layers(base: nn.Module) -> None:
    """Of what is trained in place the checkpoint brings the values, and they are the base then."""
    strategy = FineTuningStrategy(
        [(mc_type(nn.Conv2d), ma_adapt("lora", rank=1))], [(pc_name("bias"), pa_train())]
    )
    enable_fine_tuning(base, strategy)
    train(base)
    new = Net()
    with pytest.warns(GiftWarning, match="replaced 4 frozen tensors of the base"):
        base.load_state_dict(new.state_dict())
    assert_bitwise(base.head.bias.detach(), new.head.bias.detach())
    train(base)
    assert not torch.equal(base.head.bias, new.head.bias)
    assert_bitwise(disable_fine_tuning(base).state_dict(), new.state_dict())


# --- the way back --------------------------------------------------------------------------------

STRATEGIES: dict[str, Callable[[], FineTuningStrategy]] = {
    "lora": lora,
    "lora with biases": lambda: lora(train_bias=True),
    "lora and frozen statistics": lambda: lora(freeze_statistics=True),
    "full": FullFineTuningStrategy,
    "freeze": FreezeStrategy,
    "freeze with statistics": lambda: FreezeStrategy(statistics=True),
    "head": lambda: HeadReplacementStrategy(3),
    "lora and head": lambda: merge_strategies(
        [LoRAConvFineTuningStrategy(rank=1), HeadReplacementStrategy(3)]
    ),
    "raw parameters": lambda: FineTuningStrategy(
        para_caps=[(pc_name("scale"), pa_adapt("lora", rank=1)), (pc_name("bias"), pa_train())]
    ),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def trained(net: nn.Module) -> None:
    """Real training, where there is anything to train, with its statistics in any case."""
    if list(net.parameters()):
        train(net)
    net(images())


@every_strategy
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_disabling_gives_back_every_bit(base: nn.Module, strategy: str, mode: bool) -> None:
    """Classes, objects, attributes, order, values, flags, modes, hooks, no gradients."""
    base.body[0].weight.requires_grad_(False)
    base.head.bias.requires_grad_(False)
    fired: list[str] = []
    base.head.register_forward_hook(lambda *_: fired.append("head"))
    base.register_state_dict_post_hook(lambda *_: fired.append("state"))
    base.train(mode)
    base.body[2].train(not mode)
    before, x = full_state(base), images()
    enable_fine_tuning(base, STRATEGIES[strategy]())
    trained(base)
    base.train(mode)
    base.body[2].train(not mode)
    assert disable_fine_tuning(base) is base
    assert full_state(base) == before
    fired.clear()
    base(x)
    assert fired == ["head"]


@every_strategy
@pytest.mark.parametrize(
    "other",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda n: through_file(n, False)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_disabling_a_copy(base: nn.Module, strategy: str, other: Callable) -> None:
    """A copy finds its own way back, and leaves the original's alone."""
    net = copy.deepcopy(base)
    enable_fine_tuning(net, STRATEGIES[strategy]())
    trained(net)
    kept = full_state(net)
    made = other(net)
    trained(made)
    disable_fine_tuning(made)
    assert full_state(net) == kept
    disable_fine_tuning(net)
    for again in (made, net):
        assert [(n, type(m)) for n, m in again.named_modules()] == [
            (n, type(m)) for n, m in base.named_modules()
        ]
        assert list(all_bits(again).items()) == list(all_bits(base).items())
        assert trainable(again) == trainable(base)
        assert vars(again).keys() == vars(base).keys()
    assert not {id(p) for p in made.parameters()} & {id(p) for p in net.parameters()}


@every_strategy
def test_enabling_again_after_disabling(base: nn.Module, strategy: str) -> None:
    enable_fine_tuning(base, STRATEGIES[strategy]())
    first = trainable(base), list(base.state_dict())
    disable_fine_tuning(base)
    enable_fine_tuning(base, STRATEGIES[strategy]())
    assert (trainable(base), list(base.state_dict())) == first


def test_what_was_added_since_stays(net: nn.Module) -> None:
    """Hooks and attributes from the time of fine-tuning are the user's."""
    fired: list[str] = []
    net.head.register_forward_hook(lambda *_: fired.append("head"))
    net.note = "mine"
    disable_fine_tuning(net)
    net(images())
    assert fired == ["head"]
    assert net.note == "mine"


def test_the_mode_since_stays(net: nn.Module) -> None:
    """Disabling is no ``train()``: the network stays in the mode that it was last put in."""
    net.eval()
    disable_fine_tuning(net)
    assert not any(module.training for module in net.modules())


def test_a_replaced_head_comes_back_as_the_object_that_it_was(base: nn.Module) -> None:
    head, bits = base.head, all_bits(base)
    enable_fine_tuning(base, HeadReplacementStrategy(3))
    assert base(images()).shape == (4, 3)
    train(base)
    assert disable_fine_tuning(base).head is head
    assert all(bits[key] == value for key, value in all_bits(base).items())
    assert list(bits) == list(all_bits(base))


def test_without_the_base_there_is_no_way_back(base: nn.Module) -> None:
    enable_fine_tuning(base, lora(), keep_base=False)
    train(base)
    before = full_state(base)
    with pytest.raises(RuntimeError, match="keep_base"):
        disable_fine_tuning(base)
    assert full_state(base) == before


def test_the_base_is_kept_only_where_training_changes_it(base: nn.Module) -> None:
    """Memory: no copy of a frozen weight, and no copy of anything if nobody wants one."""

    def kept(strategy: FineTuningStrategy, **options: Any) -> int:
        net = copy.deepcopy(base)
        enable_fine_tuning(net, strategy, **options)
        return sum(value.numel() for *_, value in net._gift_network.undo.values)

    buffers = sum(buffer.numel() for buffer in base.buffers())
    biases = base.body[0].bias.numel() + base.head.bias.numel()
    everything = sum(parameter.numel() for parameter in base.parameters())
    assert kept(lora()) == buffers
    assert kept(lora(train_bias=True)) == buffers + biases
    assert kept(FullFineTuningStrategy()) == buffers + everything
    assert kept(FullFineTuningStrategy(), keep_base=False) == 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda net: disable_fine_tuning(net), RuntimeError, "not being fine-tuned"),
        (lambda net: Outer(net), RuntimeError, r"wrap\.inner"),
        (lambda net: net.head, RuntimeError, "not being fine-tuned"),
        (lambda net: "net", TypeError, "str"),
    ],
    ids=["disabled already", "the module around it", "a part of it", "no module"],
)
def test_what_cannot_be_disabled(net: nn.Module, make: Callable, error: type, words: str) -> None:
    target = make(net)
    before = full_state(net)
    with pytest.raises(error, match=words):
        disable_fine_tuning(target)
    assert full_state(net) == before


# --- statistics, gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
def test_frozen_statistics_stand_still_whatever_the_mode(base: nn.Module, how: str) -> None:
    before = {name: b.clone() for name, b in base.named_buffers() if name.startswith("body.1")}
    net = fresh(base, freeze_statistics=True)
    if how != "itself":
        net = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    for mode in (True, False, True):
        net.train(mode)
        assert net.training == net.head.training == mode
        assert not net.body[1].training
        net(images())
    train(net)
    held = {name: b for name, b in net.named_buffers() if name in before}
    assert_bitwise(held, before)
    train(unfrozen := fresh(base))
    assert not torch.equal(unfrozen.body[1].running_mean, before["body.1.running_mean"])
    disable_fine_tuning(net)
    assert net.body[1].training, "the mode that was last asked for"


@every_strategy
def test_gradients_from_before_are_gone(base: nn.Module, strategy: str) -> None:
    """An optimizer would move a frozen weight by the gradient that it still has."""
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.1)
    base(images()).square().sum().backward()
    enable_fine_tuning(base, STRATEGIES[strategy]())
    before = all_bits(base)
    assert all(p.grad is None for p in nn.Module.parameters(base))
    optimizer.step()
    assert all_bits(base) == before


# --- all or nothing ------------------------------------------------------------------------------


class Broken(Exception):
    """What the actions of these tests raise."""


class Other(nn.Linear):
    """Another class for a layer."""


def nothing(*_: Any, **__: Any) -> None:
    """A hook."""


def set_grad(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)


def reclass(module: nn.Module) -> None:
    module.__class__ = Other


MUTATIONS: dict[str, Callable[[nn.Module, str, nn.Module], Any]] = {
    "replaces it": lambda parent, name, module: setattr(
        parent, name, nn.Identity().train(module.training)
    ),
    "removes it": lambda parent, name, module: delattr(parent, name),
    "makes it None": lambda parent, name, module: setattr(parent, name, None),
    "adds a module": lambda parent, name, module: parent.add_module("extra", nn.Linear(2, 2)),
    "adds a parameter": lambda parent, name, module: module.register_parameter(
        "extra", nn.Parameter(torch.ones(2))
    ),
    "adds a buffer": lambda parent, name, module: module.register_buffer(
        "extra", torch.ones(2), persistent=False
    ),
    "removes a parameter": lambda parent, name, module: delattr(module, "weight"),
    "replaces a parameter": lambda parent, name, module: setattr(
        module, "weight", nn.Parameter(torch.ones(1))
    ),
    "adds hooks": lambda parent, name, module: [
        module.register_forward_hook(nothing),
        module.register_forward_pre_hook(nothing, prepend=True, with_kwargs=True),
        module.register_full_backward_hook(nothing),
        module.register_state_dict_post_hook(nothing),
        module.register_load_state_dict_post_hook(nothing),
    ],
    "freezes it": lambda parent, name, module: module.requires_grad_(False),
    "trains all": lambda parent, name, module: parent.requires_grad_(True),
    "sets attributes": lambda parent, name, module: [
        setattr(module, "note", 1), setattr(module, "training", False), vars(module).pop("mine")
    ],
    "fills its own list": lambda parent, name, module: module.mine.append(1),
    "changes its dtype": lambda parent, name, module: module.half(),
    "swaps its data": lambda parent, name, module: setattr(
        module.weight, "data", torch.ones_like(module.weight)
    ),
    "writes into its weight": lambda parent, name, module: nn.init.ones_(module.weight),
    "writes into its buffer": lambda parent, name, module: module.seen.add_(1),
    "sets gradients": lambda parent, name, module: set_grad(module),
    "drops gradients": lambda parent, name, module: parent.zero_grad(),
    "changes its class": lambda parent, name, module: reclass(module),
    "normalises its weight": lambda parent, name, module: parametrizations.weight_norm(module),
    "prunes it": lambda parent, name, module: prune.l1_unstructured(module, "weight", 0.5),
    "adapts it": lambda parent, name, module: ma_adapt("lora", rank=1)(
        parent, name, "", "", module
    ),
}  # fmt: skip


def layers() -> nn.Module:
    """Four linear layers, flags and gradients that differ, an attribute of their own each."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Sequential(nn.Linear(4, 4)))
    net[0].weight.requires_grad_(False)
    for module in net.modules():
        module.mine = []
        module.register_buffer("seen", torch.zeros(2))
    net(torch.randn(2, 4)).sum().backward()
    net[1].register_forward_hook(lambda *_: None)
    net[2].eval()
    return net


def sabotage(mutate: Callable, count: int, error: BaseException | None) -> FineTuningStrategy:
    """Mutates every linear layer, and raises after the `count`-th."""
    done: list[nn.Module] = []

    def act(parent: nn.Module, name: str, path: str, cls: str, module: nn.Module) -> None:
        mutate(parent, name, module)
        done.append(module)
        if error is not None and len(done) == count:
            raise error

    return FineTuningStrategy([(lambda *place: place[3] == "Linear", act)])


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("how", MUTATIONS)
def test_a_failing_action_leaves_the_network_as_it_was(how: str, count: int) -> None:
    net = layers()
    before = full_state(net)
    with pytest.raises(Broken, match="on purpose"):
        enable_fine_tuning(net, sabotage(MUTATIONS[how], count, Broken("on purpose")))
    assert full_state(net) == before
    enable_fine_tuning(net, lora())
    assert len(list(net.parameters())) == 8


@pytest.mark.parametrize("how", MUTATIONS)
def test_a_plan_leaves_the_network_as_it_was(how: str) -> None:
    """Whatever the actions do, a plan and a debug strategy look only."""
    net = layers()
    before = full_state(net)
    plan_fine_tuning(net, sabotage(MUTATIONS[how], 0, None))
    assert full_state(net) == before
    enable_fine_tuning(net, DebugStrategy(sabotage(MUTATIONS[how], 0, None)))
    assert full_state(net) == before


@pytest.mark.parametrize("how", MUTATIONS)
def test_what_actions_did_is_undone(how: str) -> None:
    """What foreign actions did to the structure is given back as well; gradients stay cleared."""
    net = layers()
    for parameter in net.parameters():
        parameter.grad = None
    before = full_state(net)
    enable_fine_tuning(net, sabotage(MUTATIONS[how], 0, None))
    disable_fine_tuning(net)
    assert full_state(net) == before


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(), AdaptationError("no")], ids=repr
)
def test_whatever_is_raised(error: BaseException) -> None:
    net = layers()
    before = full_state(net)
    with pytest.raises(type(error)):
        enable_fine_tuning(net, sabotage(MUTATIONS["adapts it"], 3, error))
    assert full_state(net) == before


def test_a_check_that_raises_after_others_acted() -> None:
    def check(*place: Any) -> bool:
        if place[2] == "3.0":
            raise Broken
        return place[3] == "Linear"

    net = layers()
    before = full_state(net)
    with pytest.raises(Broken):
        enable_fine_tuning(net, FineTuningStrategy([(check, ma_adapt("lora", rank=1))]))
    assert full_state(net) == before


def test_ranks_that_do_not_fit_are_named_together() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Sequential(nn.Linear(2, 9)))
    before = full_state(net)
    with pytest.raises(ValueError, match=r"(?s)1 \(Linear\).*2\.0 \(Linear\)") as caught:
        enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=4, clip_rank=False))
    assert "\n  0" not in str(caught.value)
    assert full_state(net) == before


def test_a_warning_that_is_an_error_leaves_the_network_as_it_was() -> None:
    """With ``-W error`` the call raises, so it has done nothing."""
    strategy = FineTuningStrategy(
        [(mc_type(nn.Linear), ma_adapt("lora", rank=1)), (mc_type(nn.Conv2d), ma_adapt("lora"))]
    )
    net = layers()
    before = full_state(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GiftWarning)
        with pytest.raises(GiftWarning, match="took nothing"):
            enable_fine_tuning(net, strategy)
    assert full_state(net) == before


def test_a_refused_state_leaves_a_lazy_network_lazy() -> None:
    """A shape that a layer has taken cannot be given back: the refusal comes before."""
    net = nn.Sequential(nn.LazyLinear(5), nn.LazyLinear(3))
    enable_fine_tuning(net, lora())
    before = full_state(net)
    state = {f"{i}.lora_{f}": torch.ones(2, 2) for i in (0, 1) for f in "BA"}
    with pytest.raises(RuntimeError, match="bogus"):
        net.load_state_dict(state | {"bogus": torch.ones(1)})
    assert full_state(net) == before
    assert all(nn.parameter.is_lazy(p) for _, p in net.named_parameters())


@pytest.mark.parametrize("inside", [False, True])
def test_a_state_that_is_assigned_gives_its_own_tensors(inside: bool) -> None:
    """As torch does for plain layers; also to a network inside of another module."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    whole = nn.ModuleDict({"part": net}) if inside else net
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    whole.load_state_dict(state, assign=True)
    now = whole.state_dict(keep_vars=True)
    for name in ("0.lora_A", "0.lora_B", "1.running_mean"):
        name = f"part.{name}" if inside else name
        assert now[name].data_ptr() == state[name].data_ptr(), name


class Plain(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


class Renamed(Plain):
    """Has names of its own for its state."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        return {f"my.{name}": value for name, value in found.items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        own = {name.removeprefix("my."): value for name, value in state_dict.items()}
        return super().load_state_dict(own, *args, **kwargs)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("wrong", ["shape", "name"])
@pytest.mark.parametrize("kind", [Renamed, Plain])
def test_a_state_is_loaded_as_a_whole_or_not_at_all(kind: Any, wrong: str, by_name: bool) -> None:
    net, other = enabled(kind()), enabled(kind())
    before, state = all_bits(net), dict(other.state_dict())
    last = sorted(state)[-1]
    other_state = {last: torch.ones(7)} if wrong == "shape" else {f"{last}_third": state[last]}
    broken = state | other_state
    with pytest.raises(RuntimeError, match=r"size mismatch|Unexpected key"):
        net.load_state_dict(state_dict=broken) if by_name else net.load_state_dict(broken)
    assert all_bits(net) == before
    net.load_state_dict(state)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_a_state_is_loaded_while_a_layer_has_no_shape() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    state = {name: value for name, value in net.state_dict().items() if name.startswith("0.")}
    state = {name: value + 1 for name, value in state.items()}
    net.load_state_dict(state, strict=False)
    for name, value in state.items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=0)
    before = {name: bits(value) for name, value in net.state_dict().items() if name in state}
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict(state | {"0.lora_A": torch.ones(9)}, strict=False)
    assert {name: bits(net.state_dict()[name]) for name in state} == before


def test_what_was_not_loaded_into_a_part_is_said() -> None:
    inner = enabled(nn.Sequential(nn.Linear(4, 4)))
    outer = nn.ModuleDict({"part": inner, "other": nn.Linear(4, 4)})
    state = {name: value + 1 for name, value in outer.state_dict().items()}
    before = all_bits(inner)
    with pytest.raises(RuntimeError, match=r"nothing was loaded into part"):
        outer.load_state_dict(state | {"part.0.lora_A": torch.ones(7)})
    assert all_bits(inner) == before
    with pytest.raises(RuntimeError, match=r"Unexpected key(.|\n)*nothing was loaded into part"):
        outer.load_state_dict(state | {"part.0.lora_C": torch.ones(7)})
    assert all_bits(inner) == before


def test_a_state_of_a_base_whose_layers_have_no_shape() -> None:
    """It changes nothing of them, and the rest is loaded."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))

    plain, net = make(), make()
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    net.load_state_dict(plain.state_dict())
    assert torch.equal(net.get_parameter("0.weight"), plain.get_parameter("0.weight"))
    assert net(torch.randn(2, 4)).shape == (2, 3)
