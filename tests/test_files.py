"""`gift.save` and `gift.load`: what comes back, onto which networks, and what a file tells."""

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gift
from gift import DeltaFileError, FineTuningStrategy, GiftWarning, enable_fine_tuning
from gift.core.trained import moved_buffers
from gift.factories import (
    ma_adapt,
    ma_bottleneck,
    ma_freeze,
    ma_replace,
    ma_replace_head,
    ma_train,
    mc_layer,
    mc_path,
    pa_adapt,
    pa_train,
    pc_name,
    pc_path,
)
from gift.files import container, saving
from gift.methods import METHODS
from gift.strategies import (
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    merge_strategies,
)
from gift.strategies.resolved import ResolvedStrategy
from gift.support import atomic_files
from gift.wrappers import Bottleneck
from tests import _files_worker
from tests._files_worker import unnamed
from tests.common import all_bits, bits, frozen_output, full_state

LORA = LoRAAllFineTuningStrategy
ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    """Convolution, BatchNorm, attention, a recurrent layer, tied weights, raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.raw = nn.Parameter(torch.randn(8, 8))
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.head = nn.Linear(8, 5)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]).repeat(8, 4))
        self.register_buffer("table", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).flatten(2).mT
        x = self.attention(x, x, x)[0] + self.lstm(x)[0]
        x = self.second(self.first(self.normed(x))).mean(1) @ (self.raw + self.experts.sum(0))
        return self.head((x + self.table) + self.mask.softmax(-1).sum(0))


def base(seed: int = 0, make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def images() -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def output(net: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return net.eval()(images() if x is None else x)


def enable(net: nn.Module, strategy: FineTuningStrategy, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        enable_fine_tuning(net, strategy, **options)
    return net


def train(net: nn.Module, steps: int = 2) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        net(images()).square().sum().backward()
        optimizer.step()
    return net


def tuned(strategy: FineTuningStrategy | None = None, **options: Any) -> nn.Module:
    return train(enable(base(), strategy or LORA(rank=2), **options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "delta.safetensors"


# --- everything, in a fresh process --------------------------------------------------------------


def test_everything_comes_back_in_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method on every layer, every strategy, every wrapped call; with and without names."""
    monkeypatch.setattr(atomic_files, "_flush", lambda path: None)  # this machine does not crash
    _files_worker.save_all(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "tests._files_worker", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = json.loads((tmp_path / "wrong.json").read_text(encoding="utf-8"))
    assert not wrong, f"{len(wrong)}: {sorted(wrong)}\n" + "\n".join(list(wrong.values())[:3])


def test_the_trips_are_about_everything() -> None:
    trips = _files_worker.trips()
    assert {name.partition("-")[0] for name in trips} >= {
        *METHODS, "bottleneck", "prompt", *_files_worker.REGISTERED
    } - {"DebugStrategy"}  # fmt: skip
    configs = [trip.strategy for name, trip in trips.items() if name.endswith("-unnamed")]
    assert len(configs) >= (len(trips) - len(configs)) / 4
    for strategy in configs[:: len(configs) // 20]:
        with pytest.raises(ValueError, match="cannot name"):
            strategy.to_config()


def frozen_bias(head: Any) -> nn.Module:
    new = nn.Linear(head.in_features, 3)
    new.bias.requires_grad = False
    return new


def test_a_new_head_with_a_frozen_part_is_not_taken_for_one_that_is_trained_whole(
    path: Path,
) -> None:
    """No file can say how it was made: this is told; the file goes onto a network that has it."""
    strategy = FineTuningStrategy([(mc_path("head"), ma_replace(frozen_bias))])
    net, fresh = tuned(strategy), enable(base(), strategy)
    gift.save(net, path)
    with pytest.raises(DeltaFileError, match="head was replaced by a Linear"):
        gift.load(base(), path)
    gift.load(fresh, path)
    assert torch.equal(fresh.head.weight, net.head.weight)
    assert [p.requires_grad for p in fresh.head.parameters()] == [True, False]


# --- strategies that no file can name ------------------------------------------------------------


def at(*names: str) -> Callable[..., bool]:
    """A lambda that looks for these paths."""
    return lambda *place: place[2] in names


def named(*names: str) -> Callable[..., bool]:
    """The same for parameters, by their own names."""
    return lambda *place: place[5] in names


LAMBDAS: dict[str, FineTuningStrategy] = {
    "mixed methods and ranks": FineTuningStrategy([
        (at("conv"), ma_adapt("dora", rank=1)), (at("lstm"), ma_adapt("lora", rank=2)),
        (at("first"), ma_adapt("lora", rank=3, lora_alpha=5)), (at("head"), ma_adapt("hra"))]),
    "parameters of a cap": FineTuningStrategy([(at("conv"), ma_adapt("lora"), {"rank": 2})]),
    "biases that are scaled": FineTuningStrategy([(lambda *p: mc_layer()(*p), ma_adapt("ia3"))]),
    "biases that are not": FineTuningStrategy(
        para_caps=[(named("weight", "weight_hh_l0", "in_proj_weight"), pa_adapt("ia3"))]),
    "biases that are trained": FineTuningStrategy(
        [(at("first", "lstm", "attention"), ma_adapt("lora", train_bias=True))]),
    "tied weights": FineTuningStrategy([(at("second"), ma_adapt("pissa"))]),
    "query, key and value apart": FineTuningStrategy(
        [(at("attention"), ma_adapt("lora", rank=2, split_qkv=True))]),
    "another layout": FineTuningStrategy(
        [(at("conv"), ma_adapt("loha", rank=2, conv_layout="balanced"))]),
    "frozen statistics": FineTuningStrategy(
        [(at("norm"), ma_freeze(statistics=True)), (at("head"), ma_adapt("lora"))]),
    "trained norms": FineTuningStrategy([(at("norm"), ma_train())]),
    "trained biases": FineTuningStrategy(para_caps=[(named("bias", "bias_hh_l0"), pa_train())]),
    "a new head": FineTuningStrategy(
        [(at("head"), ma_replace_head(7)), (at("first"), ma_adapt("lora"))]),
    "a new head like one": FineTuningStrategy([(at("head"), ma_replace(nn.Linear(8, 9)))]),
    "a new head, wrapped": FineTuningStrategy(
        [(at("head"), ma_bottleneck(3)), (at("head"), ma_replace_head(7))]),
    "parametrised": FineTuningStrategy([(at("normed"), ma_adapt("oft"))]),
    "what is parametrised with": FineTuningStrategy(para_caps=[(named("original1"), pa_train())]),
    "raw parameters of the root": FineTuningStrategy(
        para_caps=[(named("raw", "experts"), pa_adapt("lora", rank=2))]),
    "wrapped calls": FineTuningStrategy([
        (at("first", "conv"), ma_bottleneck(2)), (at("second"), ma_bottleneck(3, parallel=True)),
        (at("conv", "head"), ma_adapt("vera", save_projection=True))]),
    "regular expressions": FineTuningStrategy([(mc_path(regex="head|con."), ma_adapt("lora"))]),
    "everything": FineTuningStrategy([(lambda *place: True, ma_train())]),
    "nothing": FineTuningStrategy([(lambda *place: True, ma_freeze())]),
    "a strategy in the place of an action": FineTuningStrategy([(at("attention"), LORA(rank=2))]),
}  # fmt: skip


@pytest.mark.parametrize("strategy", LAMBDAS.values(), ids=LAMBDAS)
def test_a_strategy_with_lambdas_is_saved_as_what_it_came_to(
    strategy: FineTuningStrategy, path: Path
) -> None:
    net, fresh = tuned(strategy) if strategy is not LAMBDAS["nothing"] else base(), base()
    if strategy is LAMBDAS["nothing"]:
        enable(net, strategy)
    gift.save(net, path)
    assert gift.inspect(path).strategy["name"] == "ResolvedStrategy"
    gift.load(fresh, path)
    assert torch.equal(output(fresh), output(net))
    assert all_bits(fresh) == all_bits(net)
    flags = [{n: p.requires_grad for n, p in one.named_parameters()} for one in (net, fresh)]
    assert flags[0] == flags[1]
    other = enable(base(), strategy)
    gift.load(other, path)
    assert torch.equal(output(other), output(net))


def test_a_resolved_strategy_can_be_saved_again(path: Path) -> None:
    net, fresh = tuned(LAMBDAS["mixed methods and ranks"]), base()
    gift.save(net, path)
    gift.load(fresh, path)
    again = path.with_name("again.safetensors")
    gift.save(fresh, again)
    assert gift.inspect(again).strategy == gift.inspect(path).strategy
    assert copy.deepcopy(fresh._gift_network.recipe) == gift.inspect(path).strategy


def replaced_by_own(*place: Any) -> None:
    place[0]._modules[place[1]] = nn.Sequential(nn.Linear(8, 5), nn.Tanh())


def hooked(*place: Any) -> None:
    place[4].register_forward_hook(lambda module, args, result: 2 * result)


def with_attribute(*place: Any) -> None:
    place[4].slope = 2.0


def with_parameter(*place: Any) -> None:
    place[4].extra = nn.Parameter(torch.ones(2))


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def reclassed(*place: Any) -> None:
    place[4].__class__ = Doubled


ONLY_CODE = {
    "head was replaced by a Sequential": replaced_by_own,
    "head was replaced by a Doubled": ma_replace(Doubled(8, 5)),
    r"head was given other \['_forward_hooks": hooked,
    r"head was given other \['slope'\]": with_attribute,
    r"head was given other \['_parameters'\]": with_parameter,
    "head was given another class": reclassed,
}


@pytest.mark.parametrize(("reason", "action"), ONLY_CODE.items())
def test_what_only_code_can_do_says_so_and_loads_onto_what_that_code_enabled(
    reason: str, action: Any, path: Path
) -> None:
    strategy = FineTuningStrategy([(at("head"), action), (at("conv"), ma_adapt("lora"))])
    net, plain, ready = tuned(strategy), base(), enable(base(), strategy)
    gift.save(net, path)
    assert gift.inspect(path).strategy is None
    before = full_state(plain)
    with pytest.raises(DeltaFileError, match=reason) as caught:
        gift.load(plain, path)
    assert "enable it in your code" in str(caught.value)
    assert full_state(plain) == before
    gift.load(ready, path)
    assert torch.equal(output(ready), output(net))


# --- what is in a file ---------------------------------------------------------------------------


def names_in(path: Path) -> set[str]:
    return set(gift.inspect(path).tensors)


STATISTICS = {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_a_file_has_trained_tensors_and_buffers_that_moved(path: Path) -> None:
    net = tuned()
    gift.save(net, path)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert names_in(path) == trained | STATISTICS, "and neither mask nor table"
    assert gift.inspect(path).buffers == [n for n in net.state_dict() if n in STATISTICS]


def test_buffers_that_stood_still_are_not_in_the_file(path: Path) -> None:
    net = tuned(LORA(rank=2, freeze_statistics=True))
    gift.save(net, path)
    assert not names_in(path) & STATISTICS
    assert gift.inspect(path).buffers == []


def test_without_a_kept_base_all_buffers_are_in_the_file(path: Path) -> None:
    net, fresh = tuned(keep_base=False), base()
    gift.save(net, path)
    assert names_in(path) >= STATISTICS | {"mask", "table"}
    gift.load(fresh, path, keep_base=False)
    assert torch.equal(output(fresh), output(net))
    assert not fresh._gift_network.keeps_base


def test_statistics_go_back_to_those_of_a_file_that_has_none(path: Path) -> None:
    """A first file, of before they moved, is loaded when they have moved."""
    net = enable(base(), LORA(rank=2))
    gift.save(net, path)
    assert not names_in(path) & STATISTICS
    expected = output(net)
    train(net)
    assert not torch.equal(output(net), expected)
    gift.load(net, path)
    assert torch.equal(output(net), expected)


def test_tied_tensors_are_written_once_and_stay_tied(path: Path) -> None:
    net, fresh = tuned(FullFineTuningStrategy()), base()
    gift.save(net, path)
    assert gift.inspect(path).aliases == {"second.weight": "first.weight"}
    assert "second.weight" not in names_in(path)
    gift.load(fresh, path)
    assert torch.equal(output(fresh), output(net))
    assert fresh.second.weight is fresh.first.weight


class Shares(nn.Module):
    """Two layers with one buffer, which moves."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.linear = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.two.running_mean = self.one.running_mean

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.linear(self.one(x)))


@pytest.mark.parametrize("moves", [False, True])
def test_shared_buffers_are_written_once_if_at_all(moves: bool, path: Path) -> None:
    net, fresh, x = enable(base(make=Shares), LORA(rank=1)), base(make=Shares), torch.randn(9, 8)
    net.train(moves)(x)
    gift.save(net, path)
    shared = {"one.running_mean", "two.running_mean"}
    assert len(names_in(path) & shared) == moves
    gift.load(fresh, path)
    assert torch.equal(output(fresh, x), output(net, x))


DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_come_back(dtype: torch.dtype, path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(dtype)

    net, fresh = base(make=make), base(make=make)
    strategy = merge_strategies([HeadReplacementStrategy(3), LORA(rank=2)])
    enable(net, strategy)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    gift.save(net, path)
    gift.load(fresh, path)
    x = torch.randn(2, 8, dtype=dtype)
    assert torch.equal(output(fresh, x), output(net, x))
    kinds = {name: tensor.dtype for name, tensor in gift.inspect(path).tensors.items()}
    assert kinds == {name: p.dtype for name, p in net.named_parameters() if p.requires_grad}
    assert kinds["1.weight"] is dtype


def test_a_trained_float8_tensor_comes_back(path: Path) -> None:
    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.rand(8).to(torch.float8_e4m3fn))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale.float()

    net, fresh = base(make=Eight), base(make=Eight)
    enable(
        net, FineTuningStrategy([(mc_layer(), ma_adapt("lora"))], [(pc_name("scale"), pa_train())])
    )
    net.scale.data = torch.rand(8).to(torch.float8_e4m3fn)
    gift.save(net, path)
    gift.load(fresh, path)
    assert torch.equal(output(fresh, torch.ones(2, 8)), output(net, torch.ones(2, 8)))
    assert fresh.scale.dtype is torch.float8_e4m3fn


def test_parameters_that_are_not_contiguous_come_back(path: Path) -> None:
    net, fresh = enable(base(), FullFineTuningStrategy()), base()
    net.conv.weight.data = torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)
    net.raw.data = torch.randn(8, 8).T
    net.head.weight.data = torch.randn(5, 20)[:, ::2][:, :8]
    gift.save(net, path)
    gift.load(fresh, path)
    assert all_bits(fresh) == all_bits(net)


# --- networks that are wrapped, enabled, moved ---------------------------------------------------


class Bigger(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({"net": net})
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside["net"](x))


WRAPPERS = {
    "bigger": Bigger,
    "data parallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_network_is_found_in_what_wraps_it(wrap: Callable[..., nn.Module], path: Path) -> None:
    net, other = tuned(), enable(base(), LORA(rank=2))
    direct = path.with_name("direct.safetensors")
    gift.save(wrap(net), path)
    gift.save(net, direct)
    assert container.read(path)[0] == container.read(direct)[0], "with all digests"
    gift.load(wrap(other), path)
    assert torch.equal(output(other), output(net))


def test_of_several_fine_tuned_parts_one_must_be_named(path: Path) -> None:
    both = nn.ModuleList([tuned(), tuned()])
    for call in (gift.save, gift.load):
        gift.save(both[0], path)
        with pytest.raises(RuntimeError, match=r"several parts are: \['0', '1'\]"):
            call(both, path)


def test_only_what_is_fine_tuned_can_be_saved(path: Path) -> None:
    with pytest.raises(RuntimeError, match="call enable_fine_tuning first"):
        gift.save(base(), path)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        gift.save({}, path)
    assert not path.exists()


def test_an_enabled_network_takes_the_values_of_a_file(path: Path) -> None:
    net, other = tuned(), train(enable(base(), LORA(rank=2)), steps=4)
    assert not torch.equal(output(other), output(net))
    gift.save(net, path)
    report = gift.load(other, path)
    assert torch.equal(output(other), output(net))
    assert report is other._gift_network.report
    gift.disable_fine_tuning(other)
    assert all_bits(other) == all_bits(base())


def test_settings_of_the_same_effect_agree(path: Path) -> None:
    net, other = tuned(LORA(rank=2)), enable(base(), LORA(rank=2, lora_alpha=2, lora_dropout=0.1))
    gift.save(net, path)
    gift.load(other, path)
    assert torch.equal(output(other), output(net))


def test_a_loaded_network_can_be_trained_on_and_taken_back(path: Path) -> None:
    net, fresh = tuned(), base()
    gift.save(net, path)
    gift.load(fresh, path)
    for one in (net, fresh):
        torch.manual_seed(3)
        train(one)
    assert torch.equal(output(fresh), output(net))
    gift.disable_fine_tuning(fresh)
    assert all_bits(fresh) == all_bits(base())


def test_options_of_enabling_are_passed_on_and_wrong_ones_refused(path: Path) -> None:
    gift.save(tuned(), path)
    fresh = base()
    with pytest.raises(TypeError, match="keep_bass"):
        gift.load(fresh, path, keep_bass=False)
    gift.load(fresh, path, trainable_state_dict=False)
    assert "conv.weight" in fresh.state_dict()
    with pytest.raises(TypeError, match="this is being fine-tuned"):
        gift.load(fresh, path, keep_base=False)


def test_another_base_is_taken_by_those_who_ask_for_it(path: Path) -> None:
    net, other, half = tuned(), base(seed=1), base().double()
    gift.save(net, path)
    deltas = {n: p for n, p in net.named_parameters() if p.requires_grad}
    for fresh in (other, half):
        gift.load(fresh, path, check_base=False)
        named = dict(fresh.named_parameters())
        assert all(torch.equal(named[n], p.to(named[n].dtype)) for n, p in deltas.items())
    assert {p.dtype for p in half.parameters()} == {torch.float64}


@pytest.mark.parametrize("method", ["lora", "vera", "pissa"])
def test_deltas_come_back_in_the_precision_that_they_were_given(method: str, path: Path) -> None:
    """Somebody made all of a network smaller, deltas included."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

    net, fresh = base(make=make), base(make=make).bfloat16()
    enable(net, FineTuningStrategy([(mc_layer(), ma_adapt(method))])).bfloat16()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    gift.save(net, path)
    gift.load(fresh, path)
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    assert torch.equal(output(fresh, x), output(net, x))
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}


# --- what is left alone --------------------------------------------------------------------------


def test_saving_changes_nothing(path: Path) -> None:
    """Not the network, its gradients, the random numbers, nor a file beside it."""
    for strategy in (LORA(rank=2), LAMBDAS["a new head"]):
        net = tuned(strategy)
        net(images()).sum().backward()
        before, random = full_state(net), torch.get_rng_state()
        gift.save(net, path)
        assert full_state(net) == before
        assert torch.equal(torch.get_rng_state(), random)
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_load_leaves_random_numbers_alone(path: Path) -> None:
    gift.save(tuned(), path)
    net = base(seed=1)
    random = torch.get_rng_state()
    with pytest.raises(DeltaFileError):
        gift.load(net, path)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("ready", [False, True], ids=["plain", "enabled"])
def test_an_interrupted_load_leaves_the_network_as_it_was(
    ready: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody presses Ctrl+C when half of the values are in their places."""
    gift.save(tuned(FullFineTuningStrategy()), path)
    net = base()
    if ready:
        train(enable(net, FullFineTuningStrategy()))
    net(images()).sum().backward()
    before, plain = full_state(net), nn.LSTM._load_from_state_dict

    def interrupted(self: Any, *args: Any) -> None:
        plain(self, *args)
        if not net._gift_network.rehearsing:
            raise KeyboardInterrupt

    monkeypatch.setattr(nn.LSTM, "_load_from_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gift.load(net, path)
    assert full_state(net) == before


# --- what a file tells ---------------------------------------------------------------------------


def test_inspecting_tells_what_is_true(path: Path) -> None:
    strategy = merge_strategies([
        FineTuningStrategy([(at("first"), ma_bottleneck(3)), (at("norm"), ma_train())]),
        LORA(rank=2, lora_alpha=6),
    ])  # fmt: skip
    net = tuned(strategy)
    gift.save(net, path)
    file = gift.inspect(str(path))
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert file.network == "Net"
    assert file.trained == ["norm.weight", "norm.bias"]
    assert set(file.buffers) == STATISTICS
    assert {n: bits(t) for n, t in file.tensors.items() if n not in STATISTICS} == {
        name: bits(p) for name, p in trained.items()
    }
    own = sum(p.numel() for p in trained.values()) + 8 + 8 + 1
    assert file.parameters == own
    assert file.bytes == 4 * own + 4, "a counter has eight bytes"
    assert set(file.base) == set(base().state_dict()) - set(file.tensors)
    for name, tensor in base().state_dict().items():
        if name in file.base:
            assert file.base[name][:2] == ["float32", list(tensor.shape)]
    places = {name: (method, shape) for name, method, _, shape in file.places()}
    assert places["first"] == (Bottleneck.__name__, None)
    assert places["conv.weight"] == ("lora", [8 * 3, 3 * 3])
    assert places["head.weight"] == ("lora", [5, 8])
    settings = {name: settings for name, _, settings, _ in file.places()}
    assert settings["conv.weight"]["rank"] == 2
    assert settings["conv.weight"]["lora_alpha"] == 6
    assert file.versions == {"gift": gift.__version__, "torch": str(torch.__version__)}
    text = str(file)
    for part in ("Net", "conv.weight", "24x9", "rank=2", "norm.running_mean", f"{own:,}", "yes"):
        assert part in text, part


def test_printing_a_file_sends_nothing_to_the_terminal(path: Path) -> None:
    class Rude(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("\x1b[2J\a", nn.Linear(8, 8))

    net = enable(Rude(), LORA(rank=2))
    gift.save(net, path)
    text = str(gift.inspect(path))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert r"\x1b[2J\x07.weight" in text


def test_a_file_replaces_another_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "some" / "folder" / "delta.safetensors"
    gift.save(tuned(), path)
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    net = tuned(LORA(rank=1))
    gift.save(net, link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert gift.inspect(path).strategy == net._gift_network.recipe
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


UNSAVABLE: dict[str, Callable[[nn.Module], Any]] = {
    "head.lora_A has numbers that are not finite": lambda net: net.head.lora_A.data.fill_(
        torch.nan
    ),
    "norm.running_var has numbers that are not finite": lambda net: net.norm.running_var.fill_(
        torch.inf
    ),
    "conv.lora_A has no values yet": lambda net: net.conv.to("meta"),
}


@pytest.mark.parametrize(("reason", "spoil"), UNSAVABLE.items())
def test_what_cannot_be_saved_says_so_and_leaves_the_old_file(
    reason: str, spoil: Callable[[nn.Module], Any], path: Path
) -> None:
    net = tuned()
    gift.save(net, path)
    before = path.read_bytes()
    spoil(net)
    with pytest.raises(DeltaFileError, match=reason) as caught:
        gift.save(net, path)
    assert "nothing was written" in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


class Extra(nn.Linear):
    """A layer whose state is not of tensors alone."""

    def get_extra_state(self) -> Any:
        return {"scale": 2}


def test_a_state_that_no_file_can_hold_says_so(path: Path) -> None:
    net = enable(base(make=lambda: nn.Sequential(Extra(8, 8))), LORA(rank=2))
    with pytest.raises(DeltaFileError, match=r"0\._extra_state is a dict, which no safetensors"):
        gift.save(net, path)
    assert not list(path.parent.iterdir())


def test_a_quantised_base_is_known_by_its_content(path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
        return net

    net, fresh, x = enable(base(make=make), LORA(rank=2)), base(make=make), torch.randn(2, 64)
    net[0].lora_B.data.normal_()
    gift.save(net, path)
    gift.load(fresh, path)
    assert torch.equal(output(fresh, x), output(net, x))
    with pytest.raises(DeltaFileError, match="tensors of its base have other values"):
        gift.load(base(1, make), path)


def test_a_resolved_strategy_is_one_for_users_too() -> None:
    """Made by hand, and named as what is wrong with it."""
    lora = {"method": "lora", "settings": {"rank": 2}, "layout": {}}
    strategy = ResolvedStrategy([lora | {"tensors": {"head.weight": None}}], heads={"first": 3})
    net = enable(nn.ModuleDict({"first": nn.Linear(8, 8), "head": nn.Linear(8, 8)}), strategy)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "first.weight", "first.bias", "head.lora_B", "head.lora_A"
    ]  # fmt: skip
    wrong = [lora | {"method": "lore"}, lora | {"settings": {"size": 2}}, {"call": "Bottle"}]
    with pytest.raises(ValueError, match=r"(?s)lore.*has no setting.*Bottle"):
        ResolvedStrategy(wrong)
    assert unnamed(strategy).module_caps[1].action.recipe == ("ma_replace_head", {"num_classes": 3})


def test_a_delta_of_an_enabled_network_is_frozen_if_it_shall_not_be_trained(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    other = copy.deepcopy(net)
    for one in (net, other):
        enable_fine_tuning(one, LoRAAllFineTuningStrategy(rank=1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    gift.save(net, tmp_path / "delta")
    gift.load(other, tmp_path / "delta", train=False)
    assert not any(p.requires_grad for p in nn.Module.parameters(other))
    torch.testing.assert_close(other(x), frozen_output(net, x), rtol=0, atol=0)


def test_a_layer_that_an_action_put_there_can_be_repeated_by_code_alone(tmp_path: Path) -> None:
    def widen(parent: nn.Module, name: str, *_: Any) -> None:
        setattr(parent, name, nn.Linear(4, 4))

    net = nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    enable_fine_tuning(net, FineTuningStrategy([(mc_path("0"), widen)]))
    gift.save(net, tmp_path / "delta")
    text = "0 was replaced by a Linear of its own"
    assert text in gift.inspect(tmp_path / "delta").reason
    with pytest.raises(DeltaFileError, match=text):
        gift.load(nn.Sequential(nn.Identity(), nn.Linear(4, 2)), tmp_path / "delta")


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_hears_that_the_first_one_could_not_write(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def broadcast(values: list[Any]) -> None:
        if rank:
            values[:] = ["OSError: full"]
        told.extend(values)

    def fail(*_: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(saving, "write", fail)
    with pytest.raises(OSError, match="full"):
        saving._write_in_one_process(tmp_path / "delta", {}, {})
    assert told == ["OSError: full"]


def test_settings_that_are_none_are_not_shown(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    gift.save(net, tmp_path / "delta")
    details = gift.inspect(tmp_path / "delta").details()
    assert "rank=1" in details
    assert "None" not in details


def test_a_file_has_the_buffers_that_training_moved_alone(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval())
    strategy = FineTuningStrategy([(mc_path("0"), ma_adapt("lora", rank=1))],
                                  [(pc_path("1.weight"), pa_train())])  # fmt: skip
    enable_fine_tuning(net, strategy)
    gift.save(net, tmp_path / "delta")
    assert gift.inspect(tmp_path / "delta").buffers == list(moved_buffers(net)) == []
    net(torch.randn(6, 4))
    gift.save(net, tmp_path / "delta")
    moved = ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert sorted(gift.inspect(tmp_path / "delta").buffers) == moved
    assert sorted(moved_buffers(net)) == moved
