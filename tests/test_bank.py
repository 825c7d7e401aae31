"""`DeltaBank`: whatever is switched, each delta is what it is alone, the base is the base."""

import copy
import pickle
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

import gift
from gift import DeltaBank, DeltaFileError, FineTuningStrategy, enable_fine_tuning
from gift.errors import AdaptationError
from gift.factories import ma_replace_head, mc_path
from gift.strategies import (
    BitFitFineTuningStrategy,
    BottleneckFineTuningStrategy,
    DoRAAllFineTuningStrategy,
    FreezeStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    IA3AllFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    NormFineTuningStrategy,
    OFTAllFineTuningStrategy,
    PiSSAAllFineTuningStrategy,
    PromptFineTuningStrategy,
    PTuningFineTuningStrategy,
    SVDiffAllFineTuningStrategy,
)
from tests.common import all_bits, bits, full_state
from tests.test_every_method import TOKENS, bert

pytestmark = pytest.mark.filterwarnings("ignore:the delta has more parameters")

IMAGES = torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Statistics, a recurrence, attention, tied layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        x = self.lstm(x)[0]
        x = self.attn(x, x, x)[0]
        return self.fc(self.drop(self.two(torch.tanh(self.one(x)))).mean(1))


def mixed() -> nn.Module:
    torch.manual_seed(7)
    return Mixed()


STRATEGIES: dict[str, Callable[[], FineTuningStrategy]] = {
    "lora": lambda: LoRAAllFineTuningStrategy(rank=2),
    "dora": lambda: DoRAAllFineTuningStrategy(rank=2),
    "svdiff": SVDiffAllFineTuningStrategy,
    "ia3": IA3AllFineTuningStrategy,
    "pissa": lambda: PiSSAAllFineTuningStrategy(rank=2),
    "bitfit": BitFitFineTuningStrategy,
    "norms": NormFineTuningStrategy,
    "two_classes": lambda: HeadReplacementStrategy(2, "fc"),
    "nine_classes": lambda: HeadReplacementStrategy(9, "fc"),
    "full": FullFineTuningStrategy,
    "frozen_statistics": lambda: FreezeStrategy(statistics=True),
    "nothing": FreezeStrategy,
}


def trained(net: Any, strategy: FineTuningStrategy, seed: str) -> list[float]:
    """Some steps of training, random but the same for each seed; what the losses were."""
    if not hasattr(net, "_gift_network"):
        seeded(seed)
        enable_fine_tuning(net, strategy)
    seeded(seed)
    net.train()
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, 0.02) if parameters else None
    losses = [step(net, optimizer) for _ in range(3)]
    net.eval()
    return losses


def seeded(text: str) -> None:
    torch.manual_seed(sum(map(ord, text)))


def step(net: Any, optimizer: Any) -> float:
    loss = net(IMAGES + 0.1 * torch.randn_like(IMAGES)).square().mean()
    if optimizer is not None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def seen(net: Any) -> dict[str, Any]:
    """All that tells one fine-tuned network from another, but who it is."""
    return {
        "output": bits(net(IMAGES)),
        "state": {name: bits(value) for name, value in net.state_dict().items()},
        "parameters": [tuple(p.shape) for p in net.parameters()],
        "bits": list(all_bits(net).items()),
        "flags": [(name, p.requires_grad) for name, p in net.named_parameters()],
        "classes": [type(module).__name__ for module in net.modules()],
        "modes": [module.training for module in net.modules()],
        "own": [sorted(vars(module)) for module in net.modules()],
    }


def filled() -> tuple[DeltaBank, dict[str, Any]]:
    """A bank with all the deltas, and what each was alone on a fresh network."""
    bank, alone = DeltaBank(mixed().eval()), {}
    for name, strategy in STRATEGIES.items():
        fresh = mixed()
        trained(fresh, strategy(), name)
        alone[name] = seen(fresh)
        seeded(name)
        bank.add(name, strategy=strategy())
        bank.activate(name)
        trained(bank.net, strategy(), name)
    return bank, alone


def test_many_switches_in_any_order() -> None:
    base = mixed().eval()
    before, output = all_bits(base), bits(base(IMAGES))
    bank, alone = filled()
    bank.activate(None)
    plain = full_state(bank.net)
    objects: dict[str, list[int]] = {}
    rng = random.Random(0)
    for _ in range(60):
        name = rng.choice([None, *bank.names])
        bank.activate(name)
        assert bank.active == name
        if name is None:
            assert full_state(bank.net) == plain
            assert all_bits(bank.net) == before
            assert bits(bank.net(IMAGES)) == output
            assert [type(m) for m in bank.net.modules()] == [type(m) for m in base.modules()]
            continue
        assert seen(bank.net) == alone[name], name
        now = [id(p) for p in bank.net.parameters()]
        assert objects.setdefault(name, now) == now
    assert len(objects) > 8


LANGUAGE: dict[str, Callable[[], FineTuningStrategy]] = {
    "lora": lambda: LoRAAllFineTuningStrategy(rank=2),
    "bottleneck": BottleneckFineTuningStrategy,
    "prompt": lambda: PromptFineTuningStrategy(num_virtual_tokens=3),
    "p_tuning": lambda: PTuningFineTuningStrategy(num_virtual_tokens=3, encoder="lstm"),
    "oft": OFTAllFineTuningStrategy,
    "bitfit": BitFitFineTuningStrategy,
}


def test_extended_calls_come_and_go() -> None:
    base = bert()
    bank, alone = DeltaBank(copy.deepcopy(base)), {}
    for name, strategy in LANGUAGE.items():
        bank.add(name, strategy=strategy())
        bank.activate(name)
        with torch.no_grad():
            for parameter in bank.net.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        fresh = copy.deepcopy(base)
        enable_fine_tuning(fresh, strategy())
        fresh.load_state_dict(bank.net.state_dict())
        alone[name] = fresh(TOKENS).logits
    plain = base(TOKENS).logits
    for name in (*reversed(LANGUAGE), None, "prompt", "lora", None, "bottleneck", "prompt"):
        bank.activate(name)
        assert torch.equal(bank.net(TOKENS).logits, plain if name is None else alone[name]), name
    assert len({bits(value) for value in (plain, *alone.values())}) == len(LANGUAGE) + 1


@pytest.mark.parametrize("others", [["bitfit", "full"], ["two_classes", "frozen_statistics"]])
def test_training_between_switches_is_training_alone(others: list[str]) -> None:
    """Each delta has its optimizer, which goes on with its state after others were active."""
    names = ["lora", *others]
    alone = {}
    for name in names:
        net = mixed()
        seeded(name)
        enable_fine_tuning(net, STRATEGIES[name]())
        optimizer = torch.optim.Adam(net.parameters(), 0.01) if list(net.parameters()) else None
        losses = []
        for i in range(4):
            torch.manual_seed(i)
            losses.append(step(net, optimizer))
        alone[name] = losses, [bits(p) for p in net.parameters()], list(all_bits(net).items())
    bank = DeltaBank(mixed())
    optimizers: dict[str, Any] = {}
    found: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        seeded(name)
        bank.add(name, strategy=STRATEGIES[name]())
    for i in range(4):
        for name in names:
            bank.activate(name)
            mine = list(bank.net.parameters())
            if mine and name not in optimizers:
                optimizers[name] = torch.optim.Adam(mine, 0.01)
            torch.manual_seed(i)
            found[name].append(step(bank.net, optimizers.get(name)))
    for name in names:
        bank.activate(name)
        now = (
            found[name],
            [bits(p) for p in bank.net.parameters()],
            list(all_bits(bank.net).items()),
        )
        assert now == alone[name], name


def test_gradients_wait_with_their_delta() -> None:
    bank = DeltaBank(mixed().eval())
    for name in ("lora", "bitfit"):
        bank.add(name, strategy=STRATEGIES[name]())
    gradients = {}
    for name in bank.names:
        bank.activate(name)
        bank.net(IMAGES).square().mean().backward()
        gradients[name] = [bits(p.grad) for p in bank.net.parameters()]
    for name in (*bank.names, None):
        bank.activate(name)
        if name is None:
            assert all(p.grad is None for p in bank.net.parameters())
        else:
            assert [bits(p.grad) for p in bank.net.parameters()] == gradients[name]


# --- the ways into the bank ----------------------------------------------------------------------


def source_of(kind: str, net: Any, strategy: FineTuningStrategy, folder: Path) -> dict[str, Any]:
    if kind == "file":
        gift.save(net, folder / "delta.safetensors")
        return {"source": folder / "delta.safetensors"}
    return {"source": net.state_dict(), "strategy": strategy}


@pytest.mark.parametrize("active", [None, "other"])
@pytest.mark.parametrize("kind", ["file", "state"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_delta_that_was_trained_elsewhere(
    name: str, kind: str, active: str | None, tmp_path: Path
) -> None:
    net = mixed()
    trained(net, STRATEGIES[name](), name)
    bank = DeltaBank(mixed().eval())
    bank.add("other", strategy=BitFitFineTuningStrategy())
    bank.activate(active)
    before = full_state(bank.net)
    bank.add(name, **source_of(kind, net, STRATEGIES[name](), tmp_path))
    assert unnumbered(full_state(bank.net)) == unnumbered(before)
    bank.activate(name)
    ours, theirs = seen(bank.net), seen(net)
    assert ours == theirs


def unnumbered(seen: dict[str, Any]) -> dict[str, Any]:
    """The state without the numbers of hooks, which count up."""
    return {
        k: (c, {n: v for n, v in d.items() if not n.endswith("_hooks")})
        for k, (c, d) in seen.items()
    }


def test_a_state_for_the_strategy_that_is_active() -> None:
    net = mixed()
    trained(net, LoRAAllFineTuningStrategy(rank=4, lora_alpha=2), "x")
    bank = DeltaBank(mixed().eval())
    bank.add("first", strategy=LoRAAllFineTuningStrategy(rank=4, lora_alpha=2))
    with pytest.raises(ValueError, match="give its strategy"):
        bank.add("second", net.state_dict())
    bank.activate("first")
    bank.add("second", net.state_dict())
    bank.activate("second")
    assert seen(bank.net) == seen(net)


def test_the_active_delta_of_the_network_gets_a_name() -> None:
    net = mixed()
    trained(net, LoRAAllFineTuningStrategy(), "x")
    before = seen(net)
    bank = DeltaBank(net)
    with pytest.raises(RuntimeError, match="without a name"):
        bank.activate(None)
    bank.add("other", strategy=BitFitFineTuningStrategy())  # which does not need that one off
    with pytest.raises(RuntimeError, match="without a name"):
        bank.activate("other")
    bank.add("mine")
    assert bank.active == "mine"
    bank.activate("other")
    bank.activate("mine")
    assert seen(net) == before
    assert bank.names == ["other", "mine"]


def test_removing() -> None:
    bank = DeltaBank(mixed().eval())
    before = all_bits(bank.net)
    for name in ("lora", "full"):
        bank.add(name, strategy=STRATEGIES[name]())
    bank.activate("full")
    trained(bank.net, FullFineTuningStrategy(), "x")
    bank.remove("full")
    assert (bank.active, bank.names) == (None, ["lora"])
    assert all_bits(bank.net) == before
    bank.add("full", strategy=BitFitFineTuningStrategy())  # the name is free again
    bank.remove("lora")
    assert bank.names == ["full"]


# --- what happens to the network meanwhile -------------------------------------------------------


def test_modes_that_are_set_under_another_delta_hold() -> None:
    bank, _ = filled()
    for mode in (True, False):
        bank.activate("two_classes")
        bank.net.train(mode)
        for name in ("lora", "nine_classes", None, "two_classes"):
            bank.activate(name)
            assert all(module.training == mode for module in bank.net.modules()), name
        bank.activate("frozen_statistics")
        assert bank.net.norm.training is False
        assert bank.net.drop.training == mode


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_network_that_gets_another_dtype_under_another_delta(name: str) -> None:
    """What was trained in float32 is what it was, as far as double precision can tell."""
    bank = DeltaBank(mixed().eval())
    bank.add(name, strategy=STRATEGIES[name]())
    bank.activate(name)
    trained(bank.net, STRATEGIES[name](), name)
    twin = copy.deepcopy(bank.net).double()
    bank.activate(None)
    bank.net.double()
    base = {n: bits(t) for n, t in all_tensors(bank.net)}
    bank.activate(name)
    torch.testing.assert_close(bank.net(IMAGES.double()), twin(IMAGES.double()))
    bank.activate(None)
    assert {n: bits(t) for n, t in all_tensors(bank.net)} == base


def all_tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    return [*nn.Module.state_dict(net).items()]


def test_hooks_of_the_user_stay() -> None:
    bank, calls = DeltaBank(mixed().eval()), []
    for name in ("lora", "two_classes"):
        bank.add(name, strategy=STRATEGIES[name]())
    bank.activate("lora")
    bank.net.conv.register_forward_hook(lambda *_: calls.append("conv"))
    bank.net.register_forward_hook(lambda *_: calls.append("net"))
    for name in ("two_classes", None, "lora"):
        bank.activate(name)
        calls.clear()
        bank.net(IMAGES)
        assert calls == ["conv", "net"], name


@pytest.mark.parametrize("active", [None, "lora", "two_classes", "bitfit"])
def test_a_base_that_is_loaded_later_is_the_base_of_all(active: str | None) -> None:
    other = mixed()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    bank, expected = DeltaBank(mixed().eval()), {None: other.eval()}
    for name in ("lora", "bitfit", "two_classes"):
        bank.add(name, strategy=STRATEGIES[name]())
        bank.activate(name)
        trained(bank.net, STRATEGIES[name](), name)
        if name == active == "bitfit":
            continue  # the new base has biases too, and those are active now
        state = bank.net.state_dict()
        expected[name] = copy.deepcopy(other)
        enable_fine_tuning(expected[name], STRATEGIES[name]())
        expected[name].load_state_dict(state)
        expected[name].eval()
    bank.activate(active)
    base = other.state_dict()
    if active == "two_classes":
        with pytest.raises(RuntimeError, match="fc"):
            bank.net.load_state_dict(base)
        bank.activate(None)
    warning: Any = nullcontext()
    if active == "lora":
        warning = pytest.warns(gift.GiftWarning, match="frozen tensors of the base")
    with warning:
        bank.net.load_state_dict(base)
    bank.net.eval()
    for name, net in expected.items():
        bank.activate(name)
        if name == active and name is not None and name != "two_classes":
            continue  # its buffers are those of the state that was loaded onto it
        assert bits(bank.net(IMAGES)) == bits(net(IMAGES)), name


def test_lazy_networks_are_refused() -> None:
    net = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(RuntimeError, match=r"0.weight.*no shape yet"):
        DeltaBank(net)


# --- errors --------------------------------------------------------------------------------------


def small(active: str | None = None) -> DeltaBank:
    bank = DeltaBank(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).eval())
    bank.add("french", strategy=LoRAAllFineTuningStrategy(rank=2))
    bank.add("german", strategy=FullFineTuningStrategy())
    bank.activate(active)
    return bank


class Raises(FineTuningStrategy):
    """Changes something, then fails."""

    def __init__(self) -> None:
        super().__init__([(mc_path("0"), ma_replace_head(7)), (mc_path("2"), _fail)])


def _fail(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("on purpose")


def other_base() -> dict[str, Tensor]:
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    return net.state_dict()


BAD: dict[str, tuple[Callable[[DeltaBank, Path], Any], type[Exception], str]] = {
    "no_name": (lambda b, p: b.add(""), ValueError, "expected some text"),
    "not_a_name": (lambda b, p: b.add(3), ValueError, "expected some text"),
    "taken": (
        lambda b, p: b.add("french", strategy=LoRAAllFineTuningStrategy()), ValueError, "'french'"
    ),
    "unknown": (lambda b, p: b.activate("frensh"), KeyError, r"closest: \['french'\]"),
    "remove_unknown": (lambda b, p: b.remove("frensh"), KeyError, r"closest: \['french'\]"),
    "scale_unknown": (lambda b, p: b.scale("frensh", 2), KeyError, r"closest: \['french'\]"),
    "combine_unknown": (lambda b, p: b.combine({"frensh": 2}), KeyError, r"closest: \['french'\]"),
    "combine_into_taken": (
        lambda b, p: b.combine({"french": 1}, "german"), ValueError, "a delta 'german' already"
    ),
    "combine_nothing": (lambda b, p: b.combine({}), ValueError, "got none"),
    "combine_nan": (lambda b, p: b.combine({"french": float("nan")}), ValueError, "nan"),
    "combine_text": (lambda b, p: b.combine({"french": "1"}), ValueError, "'1'"),
    "combine_rank": (lambda b, p: b.combine({"french": 1}, rank=0), ValueError, "rank is 0"),
    "scale_infinite": (
        lambda b, p: b.scale("french", float("inf")), ValueError, "expected a finite number",
    ),
    "no_file": (lambda b, p: b.add("x", p / "none"), FileNotFoundError, "none"),
    "bad_file": (lambda b, p: b.add("x", broken(p)), DeltaFileError, "broken"),
    "other_file": (lambda b, p: b.add("x", of_other_network(p)), DeltaFileError, "0.weight"),
    "file_and_strategy": (
        lambda b, p: b.add("x", of_other_network(p), LoRAAllFineTuningStrategy()),
        ValueError,
        "give none with it",
    ),
    "wrong_state": (
        lambda b, p: b.add("x", {"0.lora_A": torch.zeros(9, 9)}, LoRAAllFineTuningStrategy()),
        RuntimeError,
        "2.lora_B",
    ),
    "state_of_another_base": (
        lambda b, p: b.add("x", other_base(), LoRAAllFineTuningStrategy()),
        RuntimeError,
        "the base has other values",
    ),
    "raising_strategy": (lambda b, p: b.add("x", strategy=Raises()), ZeroDivisionError, "purpose"),
    "no_strategy": (lambda b, p: b.add("x", strategy=BitFitFineTuningStrategy), TypeError, "insta"),
    "nothing_fits": (
        lambda b, p: b.add("x", strategy=BottleneckFineTuningStrategy()), ValueError, "blocks"
    ),
    "wrong_source": (lambda b, p: b.add("x", 5), TypeError, "int"),
}  # fmt: skip


def broken(folder: Path) -> Path:
    (folder / "broken").write_bytes(b"\x05" + b"\0" * 40)
    return folder / "broken"


def of_other_network(folder: Path) -> Path:
    net = nn.Sequential(nn.Linear(5, 5))
    enable_fine_tuning(net, LoRAAllFineTuningStrategy())
    gift.save(net, folder / "other")
    return folder / "other"


@pytest.mark.parametrize(("act", "error", "match"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("active", [None, "french", "german"])
def test_what_fails_changes_nothing(
    active: str | None,
    act: Callable[[DeltaBank, Path], Any],
    error: Any,
    match: str,
    tmp_path: Path,
) -> None:
    bank = small(active)
    before = full_state(bank.net)
    with pytest.raises(error, match=match):
        act(bank, tmp_path)
    assert unnumbered(full_state(bank.net)) == unnumbered(before)
    assert (bank.names, bank.active) == (["french", "german"], active)
    for name in (None, "german", "french"):
        bank.activate(name)


@pytest.mark.parametrize("active", ["french", "german"])
def test_a_network_with_another_active_delta_behind_the_bank(active: str) -> None:
    """It says so, and never takes another fine-tuning for the one that it knows."""
    bank = small(active)
    gift.disable_fine_tuning(bank.net)
    enable_fine_tuning(bank.net, IA3AllFineTuningStrategy())
    before = full_state(bank.net)
    for call in (
        lambda: bank.activate(None),
        lambda: bank.activate(active),
        lambda: bank.add("x", strategy=BitFitFineTuningStrategy()),
        lambda: bank.add("x"),
        lambda: bank.remove(active),
        lambda: bank.scale("french", 2),
        lambda: bank.combine({"french": 1.0}),
        lambda: bank.rows(["french"]).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="without the bank"):
            call()
        assert full_state(bank.net) == before
    gift.disable_fine_tuning(bank.net)
    with pytest.warns(gift.GiftWarning, match=f"'{active}'.*without the bank"):
        bank.activate(None)  # which is in order again


@pytest.mark.parametrize("act", [gift.disable_fine_tuning, gift.merge])
def test_a_delta_that_was_taken_off_behind_the_bank_is_forgotten_and_no_other(act: Any) -> None:
    bank, x = small("german"), torch.ones(2, 6)
    expected = bank.net(x)
    bank.activate("french")
    act(bank.net)
    with pytest.warns(gift.GiftWarning, match="'french' was disabled or merged"):
        bank.activate("german")
    assert bank.names == ["german"]
    assert act is gift.merge or torch.equal(bank.net(x), expected)
    bank.activate(None)
    assert not any("lora" in name for name, _ in bank.net.named_parameters())


@pytest.mark.parametrize("within", [gift.merged, gift.disabled])
def test_a_network_that_is_merged_or_disabled_for_a_while(within: Any) -> None:
    bank = small("french")
    trained_output = bank.net(torch.ones(2, 6))
    with within(bank.net), pytest.raises(RuntimeError, match="temporarily"):
        bank.activate("german")
    assert torch.equal(bank.net(torch.ones(2, 6)), trained_output)
    bank.activate("german")
    bank.activate("french")
    assert torch.equal(bank.net(torch.ones(2, 6)), trained_output)


def test_two_banks_on_one_network_do_not_mix() -> None:
    bank = small("french")
    second = DeltaBank(bank.net)
    with pytest.raises(RuntimeError, match="without a name"):
        second.activate(None)
    second.add("mine")
    second.activate(None)
    with pytest.warns(gift.GiftWarning, match="'french' was disabled"):
        bank.activate("german")
    with pytest.raises(RuntimeError, match="without a name"):
        second.activate("mine")


def test_saving_and_merging_what_is_active(tmp_path: Path) -> None:
    bank, _ = filled()
    bank.activate("lora")
    output = bank.net(IMAGES)
    gift.save(bank.net, tmp_path / "lora")
    with gift.merged(bank.net) as net:
        torch.testing.assert_close(net(IMAGES), output, rtol=1e-4, atol=1e-5)
    fresh = mixed().eval()
    gift.load(fresh, tmp_path / "lora")
    assert torch.equal(fresh.eval()(IMAGES), output)


def test_no_base_was_kept_or_no_network() -> None:
    net = nn.Linear(4, 4)
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(), keep_base=False)
    with pytest.raises(RuntimeError, match="keep_base"):
        DeltaBank(net)
    with pytest.raises(TypeError, match="Module"):
        DeltaBank("net")  # type: ignore[arg-type]


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
@pytest.mark.parametrize("active", [None, "lora", "bitfit"])
def test_copies_of_a_bank_are_independent(copied: Any, active: str | None) -> None:
    bank, alone = filled()
    bank.activate(active)
    twin = copied(bank)
    assert (twin.names, twin.active) == (bank.names, active)
    for name in bank.names:
        twin.activate(name)
        assert seen(twin.net) == alone[name], name
        trained(twin.net, STRATEGIES[name](), "other")
    twin.activate(None)
    for name in bank.names:
        bank.activate(name)
        assert seen(bank.net) == alone[name], name
    own = {id(t) for t in (*nn.Module.parameters(bank.net), *bank.net.buffers())}
    assert not own & {id(t) for t in (*nn.Module.parameters(twin.net), *twin.net.buffers())}


# --- scaling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.5, -2.0, 1.0])
@pytest.mark.parametrize("active", [None, "it", "other"])
def test_scaling_a_delta_scales_all_differences(factor: float, active: str | None) -> None:
    net = Mixed().double().eval()
    base = {name: value.clone() for name, value in net.state_dict().items()}
    bank = DeltaBank(net)
    bank.add("other", strategy=IA3AllFineTuningStrategy())
    for strategy in (LoRAAllFineTuningStrategy(rank=2), IA3AllFineTuningStrategy(),
                     BitFitFineTuningStrategy(), PiSSAAllFineTuningStrategy(rank=2)):  # fmt: skip
        bank.add("it", strategy=strategy)
        bank.activate("it")
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        before = effective(net)
        bank.activate(active)
        bank.scale("it", factor)
        assert bank.active == active
        bank.activate("it")
        for name, value in effective(net).items():
            expected = base[name] + factor * (before[name] - base[name])
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        bank.activate(None)
        bank.remove("it")


def effective(net: nn.Module) -> dict[str, Tensor]:
    """Every weight as its layer reads it."""
    return {
        name: getattr(net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        .detach()
        .clone()
        for name, _ in nn.Module.named_parameters(net)
        if "lora_" not in name and "ia3_" not in name
    }


def test_scaling_by_one_changes_no_bit() -> None:
    bank = DeltaBank(nn.Linear(6, 6))
    bank.add("it", strategy=FullFineTuningStrategy())
    bank.activate("it")
    with torch.no_grad():
        bank.net.weight.mul_(1e-9)  # what is near zero is lost in a difference
    before = all_bits(bank.net)
    bank.scale("it", 1.0)
    assert all_bits(bank.net) == before


def test_scaling_is_all_or_nothing() -> None:
    bank = small()
    bank.add("dora", strategy=DoRAAllFineTuningStrategy(rank=2))
    bank.activate("dora")
    before = full_state(bank.net)
    with pytest.raises(AdaptationError) as error:
        bank.scale("dora", 2.0)
    assert "0.weight" in str(error.value)
    assert "2.weight" in str(error.value)
    assert full_state(bank.net) == before
    bank.activate("german")
    with torch.no_grad():
        bank.net[2].weight[0, 0] = 1e30
    before = full_state(bank.net)
    with pytest.raises(AdaptationError, match=r"weight.*not be finite"):
        bank.scale("german", 1e30)
    assert full_state(bank.net) == before


# --- costs ---------------------------------------------------------------------------------------


class Copied(TorchDispatchMode):
    """Counts the bytes that operators within it make or write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and "detach" not in str(func):
            self.bytes += result.numel() * result.element_size()
        return result


def test_switching_copies_no_base_weight() -> None:
    """At most a few times what is trained in place, and the buffers."""
    bank = DeltaBank(resnet18().eval())
    bank.add("a", strategy=LoRAAllFineTuningStrategy())
    bank.add("b", strategy=BitFitFineTuningStrategy())
    base = {name: (id(p), p.data_ptr(), p._version) for name, p in bank.net.named_parameters()}
    buffers = sum(b.numel() * b.element_size() for b in bank.net.buffers())
    biases = sum(p.numel() for name, p in bank.net.named_parameters() if name.endswith("bias")) * 4
    with Copied() as copied:
        for name in ("a", "b", None, "a", "b", None):
            bank.activate(name)
    assert copied.bytes <= 6 * 4 * (buffers + biases)
    assert copied.bytes < 0.2 * sum(p.numel() for p in bank.net.parameters()) * 4
    now = {name: (id(p), p.data_ptr(), p._version) for name, p in bank.net.named_parameters()}
    assert {n: v for n, v in now.items() if not n.endswith("bias")} == {
        n: v for n, v in base.items() if not n.endswith("bias")
    }


def test_how_long_switching_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed only (``pytest -s``), against loading a state and against PEFT."""
    from peft import LoraConfig, get_peft_model

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(200)))

    bank = DeltaBank(make())
    for name in "ab":
        bank.add(name, strategy=LoRAAllFineTuningStrategy(rank=4))
    bank.activate("a")
    state = copy.deepcopy(bank.net.state_dict())
    names = [str(i) for i in range(200)]
    peft = get_peft_model(make(), LoraConfig(r=4, target_modules=names), adapter_name="a")
    peft.add_adapter("b", LoraConfig(r=4, target_modules=names))

    def timed(act: Callable[[str], Any]) -> float:
        times = []
        for name in "bababa":
            start = time.perf_counter()
            act(name)
            times.append(time.perf_counter() - start)
        return 1000 * min(times)

    taken = {
        "DeltaBank.activate": timed(bank.activate),
        "load_state_dict": timed(lambda _: bank.net.load_state_dict(state)),
        "PEFT set_adapter": timed(peft.set_adapter),
    }
    with capsys.disabled():
        print({name: f"{ms:.1f} ms" for name, ms in taken.items()})
    assert bank.active == "a"
