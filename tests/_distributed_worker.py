"""What two processes play together, one scenario after the other; `test_distributed` starts them.

Everything is float64, so that sums in another order differ by little. A scenario is an ordinary
test in its body: both processes run it, and it fails where one of them raises.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import gift
from gift import (
    DeltaFileError,
    FineTuningStrategy,
    GiftWarning,
    disable_fine_tuning,
    enable_fine_tuning,
)
from gift.factories import pa_train
from gift.files.container import read
from gift.kernels import recomputed
from gift.methods import METHODS
from gift.strategies import (
    STRATEGIES,
    FreezeStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
)
from gift.strategies.lora import LoRAAllFineTuningStrategy
from gift.utils.info import kept_inputs
from tests.two_processes import Scenarios, play_all

State = dict[str, Any]
NO_SHARDS = torch.__version__.startswith("2.6")
"""FSDP2 of torch 2.6 needs an accelerator: `fsdp_of_plain_networks` shows that."""
SCENARIOS = Scenarios()
scenario = SCENARIOS.for_each


def play(rank: int, folder: Path, seconds: float) -> None:
    """Run all scenarios in this process."""
    recomputed.FEW = recomputed.WORK = 0  # at every size: FSDP frees what that might read
    play_all(SCENARIOS, rank, folder, seconds)


# --- networks ------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Attention that reads its weights itself, and a fast path in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 20)
        self.parts = [*self.encoder.layers]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


class Recurrent(nn.Module):
    """An LSTM between an embedding and an output layer that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(20, 16), nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.parts = [self.lstm]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class Convolutional(nn.Module):
    """Convolutions, one of them grouped, and a norm layer with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
            nn.ConvTranspose2d(8, 8, 2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(72, 20)
        self.parts = [self.body[0], self.body[3], self.body[4]]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


NETWORKS: dict[str, type[nn.Module]] = {
    "transformer": Transformer, "recurrent": Recurrent, "convolutional": Convolutional,
}  # fmt: skip


def base_network(name: str) -> nn.Module:
    """The same base each time."""
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def tuned(name: str, seed: int = 1) -> nn.Module:
    """The base with fresh deltas, which differ by the seed."""
    network = base_network(name)
    torch.manual_seed(seed)
    freeze = name == "convolutional"  # half a batch has other statistics
    enable_fine_tuning(network, LoRAAllFineTuningStrategy(rank=1, freeze_statistics=freeze))
    return network


def shard(network: Any) -> Any:
    """FSDP2 over both processes: each part on its own, then the rest."""
    if NO_SHARDS:
        pytest.skip("FSDP2 of torch 2.6 trains no network on CPUs")
    mesh = init_device_mesh("cpu", (2,))
    for part in [*network.parts, network]:
        fully_shard(part, mesh=mesh)
    return network


# --- training ------------------------------------------------------------------------------------


def examples(name: str) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    if name == "convolutional":
        images = torch.randn(8, 1, 6, 6, dtype=torch.float64, generator=random)
        return images, torch.arange(8)
    tokens = torch.randint(20, (8, 6), generator=random)
    return tokens, tokens.roll(1, dims=1)


def adam(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)


def train(
    network: nn.Module, name: str, ours: slice = slice(None), steps: int = 3, optimizer: Any = None
) -> torch.optim.Optimizer:
    """Train on some of the examples, with clipped gradients; gives the optimizer."""
    inputs, targets = (tensor[ours] for tensor in examples(name))
    optimizer = adam(network) if optimizer is None else optimizer
    network.train()
    for _ in range(steps):
        outputs = network(inputs)
        loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
    return optimizer


def our_half() -> slice:
    return slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)


def trained_alone(name: str) -> nn.Module:
    """Fine-tuned in this process on all examples."""
    network = tuned(name)
    train(network, name)
    return network


def outputs_of(network: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return network.eval()(examples(name)[0])


def full_state(network: nn.Module) -> State:
    """The state of a sharded network, in both processes."""
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))


def assert_near(state: Any, other: Any) -> None:
    """The same up to the order of sums."""
    assert_close(state, other, rtol=1e-9, atol=1e-10)


def assert_same(state: State, other: State) -> None:
    """The same keys and, bit for bit, the same values."""
    assert_close(dict(state), dict(other), rtol=0, atol=0)


def assert_base_untouched(network: nn.Module, name: str) -> None:
    base = dict(base_network(name).named_parameters())
    for key, parameter in network.named_parameters():
        if key in base:
            assert torch.equal(parameter, base[key]), key


# --- DistributedDataParallel ---------------------------------------------------------------------

every_network = scenario(*NETWORKS)


@every_network
def ddp_trains_as_one_process_does(name: str, folder: Path) -> None:
    network = tuned(name, seed=1 + dist.get_rank())  # DDP hands on the deltas of the first process
    train(DistributedDataParallel(network), name, our_half())
    assert_near(dict(network.state_dict()), dict(trained_alone(name).state_dict()))
    assert_base_untouched(network, name)


@every_network
def ddp_state_has_deltas_and_buffers_and_loads_back(name: str, folder: Path) -> None:
    ddp = DistributedDataParallel(tuned(name))
    train(ddp, name, our_half())
    state = ddp.state_dict()
    buffers = {f"module.{key}" for key, _ in base_network(name).named_buffers()}
    assert {key for key in state if "lora" not in key} == buffers
    assert sum("lora" in key for key in state) == len(list(ddp.module.parameters()))

    fresh = DistributedDataParallel(tuned(name, seed=2))
    incomplete = {key: value for key, value in state.items() if key != next(iter(state))}
    with pytest.raises(RuntimeError, match=next(iter(state))):
        fresh.load_state_dict(incomplete)
    fresh.load_state_dict(state)
    assert torch.equal(outputs_of(fresh, name), outputs_of(ddp, name))

    plain = tuned(name, seed=3)
    consume_prefix_in_state_dict_if_present(state, "module.")
    plain.load_state_dict(state)
    assert torch.equal(outputs_of(plain, name), outputs_of(ddp, name))


# --- FSDP2 ---------------------------------------------------------------------------------------


@scenario("transformer")
def fsdp_of_plain_networks(name: str, folder: Path) -> None:
    network, mesh = base_network(name), init_device_mesh("cpu", (2,))
    fully_shard(network, mesh=mesh)
    if NO_SHARDS:
        with pytest.raises(AttributeError, match="record_event"):
            outputs_of(network, name)
    else:
        assert_near(outputs_of(network, name), outputs_of(base_network(name), name))


@every_network
def fsdp_trains_as_one_process_does(name: str, folder: Path) -> None:
    network = shard(tuned(name))
    train(network, name, our_half())
    assert_near(dict(full_state(network)), dict(trained_alone(name).state_dict()))


@every_network
def fsdp_sees_the_adapter_in_every_evaluation(name: str, folder: Path) -> None:
    alone, network = trained_alone(name), tuned(name)
    network.load_state_dict(alone.state_dict())
    optimizer = adam(shard(network))  # FSDP2 wants it before any forward
    expected = outputs_of(alone, name)
    assert not torch.allclose(expected, outputs_of(base_network(name), name))
    for _ in range(3):
        assert_near(outputs_of(network, name), expected)
    train(network, name, our_half(), 1, optimizer)
    train(alone, name, steps=1)
    for _ in range(2):
        assert_near(outputs_of(network, name), outputs_of(alone, name))


@every_network
def fsdp_full_state_has_deltas_and_buffers_and_loads_anywhere(name: str, folder: Path) -> None:
    network = shard(tuned(name))
    train(network, name, our_half())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(network, options=options)
    plain = tuned(name, seed=2)
    if dist.get_rank() == 0:
        assert set(state) == set(plain.state_dict())
        plain.load_state_dict(state)
        assert_same(plain.state_dict(), state)
    full = full_state(network)

    fresh = shard(tuned(name, seed=2))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, state, options=options)
    assert_same(full_state(fresh), full)
    assert torch.equal(outputs_of(fresh, name), outputs_of(network, name))


@every_network
def fsdp_checkpoint_restores_network_and_optimizer(name: str, folder: Path) -> None:
    network = shard(tuned(name))
    optimizer = train(network, name, our_half())
    saved = {
        "model": get_model_state_dict(network),
        "optimizer": get_optimizer_state_dict(network, optimizer),
    }
    dcp.save(saved, checkpoint_id=folder / "both")
    stored = dcp.FileSystemReader(folder / "both").read_metadata().state_dict_metadata
    assert {key for key in stored if key.startswith("model.")} == {
        f"model.{key}" for key in tuned(name).state_dict()
    }

    fresh = shard(tuned(name, seed=2))
    fresh_optimizer = adam(fresh)
    loaded = {
        "model": get_model_state_dict(fresh),
        "optimizer": get_optimizer_state_dict(fresh, fresh_optimizer),
    }
    dcp.load(loaded, checkpoint_id=folder / "both")
    set_model_state_dict(fresh, loaded["model"])
    set_optimizer_state_dict(fresh, fresh_optimizer, loaded["optimizer"])
    assert_same(full_state(fresh), full_state(network))
    train(network, name, our_half(), 1, optimizer)
    train(fresh, name, our_half(), 1, fresh_optimizer)
    assert_same(full_state(fresh), full_state(network))


@every_network
def fsdp_network_is_itself_a_stateful_object_of_a_checkpoint(name: str, folder: Path) -> None:
    network, fresh = shard(tuned(name)), shard(tuned(name, seed=2))
    train(network, name, our_half())
    dcp.save({"net": network}, checkpoint_id=folder / "net")
    dcp.load({"net": fresh}, checkpoint_id=folder / "net")
    assert_same(full_state(fresh), full_state(network))


@scenario("transformer")
def fsdp_computes_inputs_again_as_one_process_does(name: str, folder: Path) -> None:
    """Layers need not keep their inputs, and gradients are those of layers that do."""
    gradients = []
    for recomputes in (True, False):
        network = base_network(name)
        torch.manual_seed(1)
        enable_fine_tuning(network, LoRAAllFineTuningStrategy(rank=1), recompute_inputs=recomputes)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1)
        sharded = shard(network)
        kept = kept_inputs(sharded, examples(name)[0])
        assert kept
        assert all(source == "input" for source in kept.values()) is not recomputes
        train(sharded, name, our_half(), steps=1)
        gradients.append({n: p.grad.full_tensor() for n, p in sharded.named_parameters()
                          if p.grad is not None})  # fmt: skip
    assert_close(*gradients, rtol=1e-12, atol=1e-14)


@scenario("transformer")
def fsdp_shards_float32_deltas_of_a_bf16_network(name: str, folder: Path) -> None:
    def half_precision() -> nn.Module:
        network = base_network(name).bfloat16()
        torch.manual_seed(1)
        enable_fine_tuning(network, LoRAAllFineTuningStrategy(rank=1))
        return network

    alone, network = half_precision(), shard(half_precision())
    train(alone, name)
    train(network, name, our_half())
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert outputs_of(network, name).dtype == torch.bfloat16
    # Rounding to 8 bits may come out otherwise in batches of another size.
    assert_close(dict(full_state(network)), dict(alone.state_dict()), rtol=0.05, atol=1e-2)


# --- all methods ---------------------------------------------------------------------------------


def by_method(method: str, seed: int = 1) -> nn.Module:
    """The transformer, adapted by a method with its defaults."""
    network = base_network("transformer")
    torch.manual_seed(seed)
    strategy = STRATEGIES[f"{METHODS[method].strategy_prefix}AllFineTuningStrategy"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)  # deltas larger than their small weights
        enable_fine_tuning(network, strategy())
    return network


def by_method_alone(method: str) -> nn.Module:
    network = by_method(method)
    train(network, "transformer")
    return network


SHARING = tuple(name for name, method in METHODS.items() if method().shared)


@scenario(*SHARING)
def parameters_that_layers_share_are_refused_in_several_groups_of_fsdp(
    method: str, folder: Path
) -> None:
    network = shard(by_method(method))
    with pytest.raises(RuntimeError, match="FSDP2 has sharded it in several groups"):
        outputs_of(network, "transformer")


@scenario(*METHODS)
def a_method_under_ddp_trains_as_one_process_does(method: str, folder: Path) -> None:
    network = by_method(method, seed=1 + dist.get_rank())
    train(DistributedDataParallel(network), "transformer", our_half())
    assert_near(dict(network.state_dict()), dict(by_method_alone(method).state_dict()))


@scenario(*(name for name in METHODS if name not in SHARING))
def a_method_under_fsdp_trains_as_one_process_does(method: str, folder: Path) -> None:
    network, alone = shard(by_method(method)), by_method_alone(method)
    train(network, "transformer", our_half())
    assert_near(dict(full_state(network)), dict(alone.state_dict()))
    # A large update amplifies the differences of its parameters.
    outputs = (outputs_of(one, "transformer") for one in (network, alone))
    assert_close(*outputs, rtol=1e-6, atol=1e-9)


# --- files ---------------------------------------------------------------------------------------


def assert_same_file(path: Path, other: Path) -> None:
    """The same header, with the digests of all tensors and of the base, and the same tensors."""
    (header, tensors), (expected, wanted) = read(path), read(other)
    assert header == expected
    assert_same(tensors, wanted)


def alone_with_the_values_of(network: nn.Module, name: str) -> nn.Module:
    """A network of this process alone with the trained values of one that is sharded."""
    alone = tuned(name, seed=3)
    alone.load_state_dict({key: value.clone() for key, value in full_state(network).items()})
    return alone


@every_network
def ddp_saves_the_file_of_one_process(name: str, folder: Path) -> None:
    network = tuned(name)
    ddp = DistributedDataParallel(network)
    train(ddp, name, our_half())
    gift.save(ddp, folder / "ddp")  # each process does: the file is whole whoever comes last
    gift.save(network, folder / f"alone-{dist.get_rank()}")
    dist.barrier()
    assert_same_file(folder / "ddp", folder / f"alone-{dist.get_rank()}")

    plain, wrapped = base_network(name), DistributedDataParallel(tuned(name, seed=2))
    for fresh in (plain, wrapped):
        gift.load(fresh, folder / "ddp")
        assert torch.equal(outputs_of(fresh, name), outputs_of(network, name))


@every_network
def fsdp_saves_the_file_of_one_process_and_loads_it(name: str, folder: Path) -> None:
    network = shard(tuned(name))
    train(network, name, our_half())
    alone = alone_with_the_values_of(network, name)
    gift.save(network, folder / "sharded")
    gift.save(alone, folder / f"alone-{dist.get_rank()}")
    assert_same_file(folder / "sharded", folder / f"alone-{dist.get_rank()}")

    fresh, plain = shard(tuned(name, seed=2)), base_network(name)
    gift.load(fresh, folder / "sharded")
    assert_same(full_state(fresh), full_state(network))
    assert torch.equal(outputs_of(fresh, name), outputs_of(network, name))
    gift.load(plain, folder / "sharded")
    assert_near(outputs_of(plain, name), outputs_of(network, name))


@scenario("recurrent")
def fsdp_with_full_fine_tuning_keeps_ties_in_the_file(name: str, folder: Path) -> None:
    def full(seed: int) -> nn.Module:
        network = base_network(name)
        enable_fine_tuning(network, FullFineTuningStrategy())
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_()
        return network

    alone, network, fresh = full(1), shard(full(1)), shard(full(2))
    gift.save(network, folder / "sharded")
    gift.save(alone, folder / f"alone-{dist.get_rank()}")
    assert_same_file(folder / "sharded", folder / f"alone-{dist.get_rank()}")
    gift.load(fresh, folder / "sharded")
    assert_same(full_state(fresh), full_state(network))


@every_network
def fsdp_refuses_other_files_in_all_processes(name: str, folder: Path) -> None:
    network, other = shard(tuned(name)), base_network(name)
    torch.manual_seed(1)
    enable_fine_tuning(other, LoRAAllFineTuningStrategy(rank=2))
    gift.save(other, folder / f"other-{dist.get_rank()}")
    before = {key: value.clone() for key, value in full_state(network).items()}
    with pytest.raises(DeltaFileError, match="'rank': 2"):
        gift.load(network, folder / f"other-{dist.get_rank()}")
    assert_same(full_state(network), before)


@scenario("convolutional")
def a_sharded_save_that_fails_fails_in_all_processes(name: str, folder: Path) -> None:
    """And none of them waits for ever for the one that writes."""
    network = shard(tuned(name))
    (folder / "taken").mkdir(exist_ok=True)
    with pytest.raises(OSError, match="directory"):
        gift.save(network, folder / "taken")
    gift.save(network, folder / "free")
    assert (folder / "free").is_file()
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    with pytest.raises(DeltaFileError, match="not finite"):
        gift.save(network, folder / "free")


# --- refusals ------------------------------------------------------------------------------------


def structure(network: nn.Module) -> list[Any]:
    """Classes, attributes and parameters by identity, and flags."""
    return [
        (
            path,
            type(part),
            {key: id(value) for key, value in vars(part).items()},
            [(n, id(p), p is not None and p.requires_grad) for n, p in part._parameters.items()],
        )
        for path, part in network.named_modules()
    ]


def assert_refused(function: Callable[[], Any], network: nn.Module, message: str) -> None:
    """An error that matches the message, and nothing changed."""
    before = structure(network)
    with pytest.raises((ValueError, RuntimeError), match=message):
        function()
    assert structure(network) == before


REFUSED = [
    LoRAAllFineTuningStrategy(rank=1),
    FreezeStrategy(),
    FullFineTuningStrategy(),
    HeadReplacementStrategy(5),
    FineTuningStrategy(para_caps=[(lambda *place: place[5] == "bias", pa_train())]),
]


@every_network
def enabling_a_sharded_network_is_refused(name: str, folder: Path) -> None:
    network = shard(base_network(name))
    expected = outputs_of(base_network(name), name)
    for strategy in REFUSED:
        enable = partial(enable_fine_tuning, network, strategy)
        assert_refused(enable, network, "already sharded.*before sharding")
    assert_near(outputs_of(network, name), expected)


@every_network
def enabling_a_ddp_wrapper_is_refused(name: str, folder: Path) -> None:
    ddp = DistributedDataParallel(base_network(name))
    for strategy in REFUSED:
        enable = partial(enable_fine_tuning, ddp, strategy)
        assert_refused(enable, ddp, "DistributedDataParallel.*network inside first")
    assert torch.equal(outputs_of(ddp, name), outputs_of(base_network(name), name))


@every_network
def disabling_a_sharded_network_is_refused(name: str, folder: Path) -> None:
    network = shard(tuned(name))
    train(network, name, our_half())
    before = outputs_of(network, name)
    assert_refused(partial(disable_fine_tuning, network), network, "fully_shard.*fresh network")
    assert torch.equal(outputs_of(network, name), before)
