"""What two processes play of tensor parallelism; `test_parallel` starts them.

Everything is float64, so that sums in another order differ by little. The reference is the same
network in one process, by gift's paths for plain tensors, which the matrix tests against formulas.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import gift
from gift import (
    AdaptationError,
    DeltaBank,
    FineTuningStrategy,
    GiftWarning,
    disable_fine_tuning,
    enable_fine_tuning,
)
from gift.factories import ma_adapt, ma_bottleneck, mc_layer, mc_path
from gift.methods import METHODS
from gift.strategies import STRATEGIES
from gift.strategies.lora import LoRAAllFineTuningStrategy
from tests._distributed_worker import (
    NO_SHARDS,
    assert_near,
    assert_same,
    assert_same_file,
    structure,
)
from tests.two_processes import Scenarios, play_all

SCENARIOS = Scenarios()
scenario = SCENARIOS.for_each

SPLIT = ("lora", "rslora", "lora_fa", "pissa", "olora", "guided", "adalora", "ia3", "ssf", "loha",
         "vera")  # fmt: skip
ROWS_ONLY = ("dora", "hra")
WHOLE = tuple(sorted({*METHODS} - {*SPLIT, *ROWS_ONLY}))


def play(rank: int, folder: Path, seconds: float) -> None:
    """Run all scenarios in this process."""
    play_all(SCENARIOS, rank, folder, seconds)


# --- networks ------------------------------------------------------------------------------------


class Network(nn.Module):
    """A table of words, a block whose hidden features are spread, and a plain head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 6)

    def block(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(F.gelu(self.block(self.words(words))))


def base() -> Network:
    torch.manual_seed(0)
    return Network().double()


def mesh_of_two() -> Any:
    return init_device_mesh("cpu", (2,))


PLANS: dict[str, Callable[[], dict[str, Any]]] = {
    "rows of words": lambda: {
        "words": RowwiseParallel(input_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    },
    "columns of words": lambda: {
        "words": ColwiseParallel(output_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    },
    "sequence": lambda: {  # what is between the layers is spread as well
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
    "outputs together": lambda: {
        "up": ColwiseParallel(output_layouts=Replicate()),
        "down": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate(), use_local_output=True),
    },
}


def parallel(network: Network, plan: str = "rows of words", mesh: Any = None) -> Network:
    parallelize_module(network, mesh_of_two() if mesh is None else mesh, PLANS[plan]())
    return network


def strategy_of(method: str) -> FineTuningStrategy:
    return STRATEGIES[f"{METHODS[method].strategy_prefix}AllFineTuningStrategy"]()


def enable(network: nn.Module, strategy: Any = None, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)  # deltas larger than their small weights
        return enable_fine_tuning(network, strategy or LoRAAllFineTuningStrategy())


def tuned(strategy: Any = None, plan: str = "rows of words") -> Network:
    """Parallel, then enabled; the other process has other random numbers."""
    network = parallel(base(), plan)
    enable(network, strategy, seed=1 + dist.get_rank())
    return network


def alone(strategy: Any = None) -> Network:
    network = base()
    enable(network, strategy)
    return network


def words() -> Tensor:
    return torch.arange(24).view(4, 6) % 20


def targets() -> Tensor:
    return torch.randn(4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def train(network: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """Train, two backward passes a step; gives the last gradients, whole."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-1)
    for _ in range(steps):
        optimizer.zero_grad()
        for half in (slice(2), slice(2, 4)):
            F.mse_loss(network(words()[half]), targets()[half]).backward()
        gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        optimizer.step()
    return {name: whole(gradient) for name, gradient in gradients.items()}


def whole(tensor: Any) -> Tensor:
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in network.state_dict().items()}


def assert_trains_alike(network: nn.Module, other: nn.Module) -> None:
    """Outputs, gradients and, after steps of an optimizer, what a state has."""
    assert_near(network(words()), other(words()))
    before = other(words()).detach()
    assert_near(train(network), train(other))
    assert not torch.allclose(other(words()), before)
    assert_near(network(words()), other(words()))
    assert_near(whole_state(network), whole_state(other))


def assert_frozen_is_the_base(network: nn.Module) -> None:
    expected = dict(base().named_parameters())
    for name, parameter in network.named_parameters():
        if name in expected:
            assert torch.equal(whole(parameter), expected[name]), name


# --- training ------------------------------------------------------------------------------------


@scenario(*SPLIT)
def a_method_trains_as_in_one_process(method: str, folder: Path) -> None:
    plain, network = parallel(base()), parallel(base())
    report, expected = enable(network, strategy_of(method), 1 + dist.get_rank()), None
    assert torch.equal(network(words()), plain(words()))  # bit for bit, right after enabling
    other = base()
    expected = enable(other, strategy_of(method))
    assert report.trainable_after == expected.trainable_after
    assert_trains_alike(network, other)
    assert_frozen_is_the_base(network)


@scenario(*SPLIT)
def a_method_that_is_made_parallel_later_trains_as_in_one_process(
    method: str, folder: Path
) -> None:
    network, other = alone(strategy_of(method)), alone(strategy_of(method))
    with torch.no_grad():  # a delta with an effect must not enter what is taken for the base
        for one in (network, other):
            for parameter in one.parameters():
                parameter.add_(0.1)
    parallel(network)
    assert not network.up._parameters["weight"].requires_grad
    assert_trains_alike(network, other)
    assert_frozen_is_the_base(network)


@scenario(*PLANS)
def a_plan_trains_as_one_process_does(plan: str, folder: Path) -> None:
    assert_trains_alike(tuned(plan=plan), alone())
    network = alone()
    assert_trains_alike(parallel(network, plan), alone())


@scenario(*ROWS_ONLY)
def a_method_that_needs_all_columns_trains_where_rows_are_cut(method: str, folder: Path) -> None:
    strategy = FineTuningStrategy(
        module_caps=[(mc_path(glob="up") | mc_path(glob="head"), ma_adapt(method))]
    )
    assert_trains_alike(tuned(strategy), alone(strategy))


@scenario("lora", "ia3")
def biases_are_trained_beside_parts(method: str, folder: Path) -> None:
    bias = {"lora": {"train_bias": True}, "ia3": {}}[method]
    strategy = FineTuningStrategy(module_caps=[(mc_layer("linear"), ma_adapt(method, **bias))])
    network, other = tuned(strategy), alone(strategy)
    assert_trains_alike(network, other)
    disable_fine_tuning(network)
    assert_frozen_is_the_base(network)


@scenario("lora")
def the_effective_weight_is_read_as_parts(method: str, folder: Path) -> None:
    network, other = tuned(), alone()
    train(network), train(other)
    for name in ("words", "up", "down"):
        weight: Any = network.get_submodule(name).weight
        assert weight.placements == network.get_submodule(name)._parameters["weight"].placements
        assert_near(whole(weight), other.get_submodule(name).weight.detach())


@scenario("lora")
def dropout_of_a_replicated_input_is_that_of_one_process(method: str, folder: Path) -> None:
    strategy = FineTuningStrategy(
        module_caps=[(mc_path(glob="up"), ma_adapt("lora", lora_dropout=0.5))]
    )
    outputs = []
    for network in (tuned(strategy), alone(strategy)):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(0.3)
        torch.manual_seed(7)
        outputs += [network(words()), network.eval()(words())]
    assert_near(outputs[:2], outputs[2:])
    assert not torch.allclose(outputs[0], outputs[1])


@scenario("lora")
def checkpointing_changes_nothing(method: str, folder: Path) -> None:
    network, other = tuned(), alone()
    block = network.block
    network.block = lambda x: checkpoint(block, x, use_reentrant=False)  # type: ignore[method-assign]
    assert_near(train(network), train(other))


@scenario("lora")
def low_precision_is_that_of_the_base(method: str, folder: Path) -> None:
    plain, network = parallel(base().bfloat16()), parallel(base().bfloat16())
    enable(network)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert torch.equal(network(words()), plain(words()))
    plain, network = parallel(base().float()), parallel(base().float())
    enable(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(words()), plain(words()))
    network(words()).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- communication -------------------------------------------------------------------------------


def collectives(network: Network, backward: bool, plan: str) -> dict[str, int]:
    """How often the block calls each collective, beside an input that needs a gradient."""
    length = 3 if plan == "sequence" else 6
    x = torch.ones(4, length, 8, dtype=torch.float64, requires_grad=True)
    with CommDebugMode() as mode:
        y = network.block(x)
        if backward:
            y.sum().backward()
    return {str(operation): count for operation, count in mode.get_comm_counts().items() if count}


@scenario("rows of words", "sequence")
def no_more_is_communicated_than_by_the_base(plan: str, folder: Path) -> None:
    plain = parallel(base(), plan)
    plain.requires_grad_(False)
    for method in ("lora", "lora_fa", "ia3", "loha", "pissa"):
        network = tuned(strategy_of(method), plan)
        assert collectives(network, False, plan) == collectives(plain, False, plan)
        sums = [
            name
            for part in (network.up, network.down)
            for name, p in part._parameters.items()
            if p is not None and p.requires_grad and p.placements[0].is_replicate()
        ]
        # lora has A of `up` and B of `down`; lora_fa only the latter.
        assert len(sums) == {"lora_fa": 1, "ia3": 1, "loha": 4}.get(method, 2)
        more = collectives(network, True, plan)
        less = collectives(plain, True, plan)
        (reduction,) = {*more} - {*less} or {key for key in less if more[key] != less[key]}
        assert more == less | {reduction: less.get(reduction, 0) + len(sums)}
        assert "all_reduce" in reduction


@scenario("lora")
def each_process_holds_its_parts_only(method: str, folder: Path) -> None:
    network = tuned()
    local = {n: tuple(p.to_local().shape) for n, p in network.named_parameters()
             if n.startswith(("words.l", "up.l", "down.l"))}  # fmt: skip
    assert local == {
        "words.lora_B": (10, 3), "words.lora_A": (3, 8), "up.lora_B": (6, 3),
        "up.lora_A": (3, 8), "down.lora_B": (8, 3), "down.lora_A": (3, 6),
    }  # fmt: skip


# --- files and merging ---------------------------------------------------------------------------


@scenario(*SPLIT)
def a_file_is_that_of_one_process_and_loads_anywhere(method: str, folder: Path) -> None:
    network, other = tuned(strategy_of(method)), alone(strategy_of(method))
    train(network)
    with torch.no_grad():
        for name, tensor in other.state_dict(keep_vars=True).items():
            if not name.endswith("gift_settings"):
                tensor.copy_(whole_state(network)[name])
    gift.save(network, folder / "spread")
    gift.save(other, folder / f"alone-{dist.get_rank()}")
    assert_same_file(folder / "spread", folder / f"alone-{dist.get_rank()}")

    expected = network(words())
    plain, spread, later = base(), parallel(base()), tuned(strategy_of(method))
    for fresh in (plain, spread, later):
        gift.load(fresh, folder / "spread")
    assert_near(plain(words()), expected)
    assert torch.equal(spread(words()), expected)
    assert torch.equal(later(words()), expected)


@scenario("lora")
def torchs_own_states_load_in_one_process_and_in_two(method: str, folder: Path) -> None:
    network = tuned()
    train(network)
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))
    plain, fresh = alone(), tuned()
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    assert_near(plain(words()), network(words()))
    set_model_state_dict(fresh, state, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(fresh(words()), network(words()))
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(words()), network(words()))


@scenario(*SPLIT)
def merging_and_disabling_work_on_parts(method: str, folder: Path) -> None:
    network, other, plain = tuned(strategy_of(method)), alone(strategy_of(method)), parallel(base())
    train(network), train(other)
    trained, state = network(words()).detach(), whole_state(network)
    with gift.merged(network):
        assert not any("lora" in name for name, _ in network.named_parameters())
        assert_near(network(words()), trained)
    with gift.disabled(network):
        assert torch.equal(network(words()), plain(words()))
    assert torch.equal(network(words()), trained)
    assert_same(whole_state(network), state)

    merged = gift.merge(copy.deepcopy(network))
    assert type(merged) is Network
    assert_near(merged(words()), other(words()))
    assert_near(whole_state(merged), whole_state(gift.merge(other)))

    disable_fine_tuning(network)
    assert torch.equal(network(words()), plain(words()))
    assert_same(whole_state(network), whole_state(plain))
    assert type(network) is Network


@scenario("before", "after")
def disabling_what_was_made_parallel_gives_the_parallel_base(order: str, folder: Path) -> None:
    strategy = FineTuningStrategy(
        module_caps=[(mc_layer("linear"), ma_adapt("lora", train_bias=True))]
    )
    network = tuned(strategy) if order == "after" else parallel(alone(strategy))
    train(network)
    disable_fine_tuning(network)
    assert torch.equal(network(words()), parallel(base())(words()))
    assert_frozen_is_the_base(network)


# --- with others ---------------------------------------------------------------------------------


@scenario("1 x 2", "2 x 1")
def fsdp_on_top_trains_as_one_process_does(sizes: str, folder: Path) -> None:
    if NO_SHARDS:
        pytest.skip("FSDP2 of torch 2.6 trains no network on CPUs")
    mesh = init_device_mesh("cpu", tuple(map(int, sizes.split(" x "))), mesh_dim_names=("dp", "tp"))
    network, other = parallel(base(), mesh=mesh["tp"]), alone()
    enable(network)
    for part in (network.up, network.down, network):
        fully_shard(part, mesh=mesh["dp"])
    assert_near(train(network), train(other))
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))
    assert_near({name: whole(value) for name, value in state.items()}, dict(other.state_dict()))
    with torch.no_grad():
        assert_near(network(words()), other(words()))
    gift.save(network, folder / "both")
    plain = base()
    gift.load(plain, folder / "both")
    assert_near(plain(words()), other(words()))


@scenario("llama")
def a_plan_of_transformers_trains_as_one_process_does(name: str, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.distributed.tensor_parallel")  # since 5
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=False, **sizes, **heads)
    torch.manual_seed(0)
    own, other = folder / "model", transformers.LlamaForCausalLM(config).double()
    if dist.get_rank() == 0:
        other.save_pretrained(own)
    dist.barrier()
    rank, load = str(dist.get_rank()), transformers.AutoModelForCausalLM.from_pretrained
    as_by_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    with mock.patch.dict(os.environ, as_by_torchrun):
        network = load(own, tp_plan="auto", torch_dtype=torch.float64)
    plan = json.dumps({n: str(getattr(p, "placements", "")) for n, p in network.named_parameters()})
    assert "Shard(dim=0)" in plan
    assert "Shard(dim=1)" in plan
    tokens = torch.arange(12).view(2, 6)
    before = network(tokens).logits
    for one in (network, other):
        enable(one)
    assert torch.equal(network(tokens).logits, before)
    for one in (network, other):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            one(tokens, labels=tokens).loss.backward()
            optimizer.step()
    assert not torch.allclose(network(tokens).logits, before)
    assert_near(network(tokens).logits, other(tokens).logits)
    with torch.no_grad():  # where transformers shows its layers local tensors
        assert_near(network(tokens).logits, other(tokens).logits)
    assert_near(whole_state(network), whole_state(other))
    gift.save(network, folder / "delta")
    fresh = load(own, torch_dtype=torch.float64)
    gift.load(fresh, folder / "delta")
    assert_near(fresh(tokens).logits, other(tokens).logits)
    gift.merge(network)
    assert_near(network(tokens).logits, other(tokens).logits)


@scenario("lora")
def copies_are_independent(method: str, folder: Path) -> None:
    network = tuned()
    train(network)
    before, twin = network(words()).detach(), copy.deepcopy(network)
    assert torch.equal(twin(words()), before)
    train(twin)
    assert torch.equal(network(words()), before)
    assert not torch.allclose(twin(words()), before)


@scenario("plain")
def what_is_new_in_plain_layers_is_the_same_in_all_processes(name: str, folder: Path) -> None:
    """Each process draws from its own seed; a wrapped module and a new head are plain."""
    strategy = FineTuningStrategy(
        module_caps=[(mc_path(glob="head"), ma_bottleneck(2))],
    )
    network = tuned(strategy)
    assert_trains_alike(network, alone(strategy))


# --- refusals ------------------------------------------------------------------------------------


@scenario(*WHOLE, *ROWS_ONLY)
def a_method_that_needs_whole_weights_is_refused(method: str, folder: Path) -> None:
    network = parallel(base())
    before = structure(network)
    with pytest.raises(AdaptationError, match=rf"(?s)down \(Linear\).*{method}.*another method"):
        enable(network, strategy_of(method))
    assert structure(network) == before
    later = alone(strategy_of(method))
    with pytest.raises(AdaptationError, match=rf"{method}.*another method"):
        parallel(later)


@scenario("mixture")
def what_parts_cannot_have_is_refused(name: str, folder: Path) -> None:
    network, mesh = parallel(base()), mesh_of_two()
    before = structure(network)
    with pytest.raises(AdaptationError, match=r"spreads its.*wrap the block"):
        enable(network, FineTuningStrategy(module_caps=[(mc_path(glob="down"), ma_bottleneck(2))]))
    assert structure(network) == before
    with pytest.raises(RuntimeError, match="spread over processes"):
        DeltaBank(network)
    convolution = nn.Conv2d(2, 4, 3)
    convolution.weight = nn.Parameter(distribute_tensor(convolution.weight, mesh, [Shard(0)]))
    with pytest.raises(AdaptationError, match="only weights that are matrices"):
        enable(convolution)
