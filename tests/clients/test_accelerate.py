"""accelerate: its loop, its states, and weights that it sends elsewhere."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gift
from gift import FineTuningStrategy, GiftWarning, enable_fine_tuning
from gift.factories import ma_adapt, mc_layer, mc_path
from gift.methods import METHODS
from gift.strategies import BottleneckFineTuningStrategy, LoRAAllFineTuningStrategy
from tests.clients._properties import Client
from tests.common import all_bits, full_state, trainable

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import remove_hook_from_submodules  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import set_module_tensor_to_device  # noqa: E402

X = torch.linspace(-1, 1, 256).reshape(16, 16)
Y = X[:, :2].sin()


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(X)


def tuned(method: str = "lora") -> Any:
    net = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        enable_fine_tuning(net, FineTuningStrategy([(mc_layer(), ma_adapt(method))]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net


def test_its_loop_and_its_states(tmp_path: Path) -> None:
    net, strategy = made(), LoRAAllFineTuningStrategy(rank=1)
    client = Client(net, lambda: output(net))
    client.enable(strategy)
    loop = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    data = DataLoader(TensorDataset(X, Y), batch_size=16)
    model, optimizer, data = loop.prepare(net, optimizer, data)
    losses = []
    for _ in range(9):
        for x, y in data:
            loss = nn.functional.mse_loss(model.train()(x)[:, :2], y)
            loop.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    def reload() -> Tensor:
        loop.save_state(str(tmp_path))
        fresh = made()
        enable_fine_tuning(fresh, strategy)
        other = accelerate.Accelerator(cpu=True)
        again = other.prepare(fresh, torch.optim.AdamW(fresh.parameters(), lr=0.02))
        other.load_state(str(tmp_path))
        return output(again[0])

    client.check(losses, reload, exact=True)


def offload(net: nn.Module, where: str, folder: Path) -> None:
    """To the processor's memory, to files, or the last layer to files."""
    if where == "cpu":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    elif where == "disk":
        accelerate.disk_offload(net, str(folder), execution_device=torch.device("cpu"))
    else:
        places = {"0": "cpu", "1": "cpu", "2": "cpu", "3": "disk"}
        accelerate.dispatch_model(net, places, offload_dir=str(folder))


@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
def test_a_merged_network_is_offloaded(where: str, tmp_path: Path) -> None:
    net = tuned()
    expected = output(net)
    merged = gift.merge(net)
    offload(merged, where, tmp_path)
    assert any(parameter.is_meta for parameter in merged.parameters())
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
def test_a_tuned_network_is_offloaded(where: str, method: str, outer: bool, tmp_path: Path) -> None:
    """Frozen tensors and deltas are fetched for each module, and come back when hooks go."""
    net = tuned(method)
    named = nn.Module.named_parameters(net, remove_duplicate=False)
    if len([name for name, p in named if p.requires_grad]) > len(trainable(net)):
        with pytest.raises(RuntimeError, match="modules share parameters of their deltas"):
            offload(nn.Sequential(net) if outer and where != "both" else net, where, tmp_path)
        return
    expected, before, flags = output(net), all_bits(net), trainable(net)
    state = list(net.state_dict())
    model = nn.Sequential(net, nn.Identity()) if outer else net
    if outer and where == "both":
        accelerate.dispatch_model(model, {"0": "disk", "1": "cpu"}, offload_dir=str(tmp_path))
    else:
        offload(model, where, tmp_path)
    assert net[3].get_parameter("weight").is_meta
    for _ in range(2):
        assert torch.equal(output(model), expected)
    assert list(net.state_dict()) == state
    for refused in (gift.disable_fine_tuning, gift.merge, gift.reference):
        with pytest.raises(RuntimeError, match="offloaded by accelerate"):
            refused(net)
    with pytest.raises(RuntimeError, match="offloaded by accelerate"):
        gift.save(net, tmp_path / "deltas.safetensors")
    with pytest.raises(RuntimeError, match="offloaded by accelerate"):
        net.load_state_dict({})
    for entered in (gift.merged, gift.disabled):
        with pytest.raises(RuntimeError, match="offloaded by accelerate"), entered(net):
            pass
    assert torch.equal(output(model), expected)
    remove_hook_from_submodules(model)
    assert all_bits(net) == before
    assert trainable(net) == flags
    gift.disable_fine_tuning(net)
    assert all_bits(net) == all_bits(made())


def test_moving_an_adapted_weight_moves_the_frozen_tensor() -> None:
    """The effective one would have the delta added again."""
    net = tuned()
    before = all_bits(net)
    for name in ("weight", "bias", "lora_B"):
        frozen = net[0].get_parameter(name)
        set_module_tensor_to_device(net[0], name, "meta")
        assert net[0].get_parameter(name).is_meta
        assert net[0].get_parameter(name).requires_grad == frozen.requires_grad
        set_module_tensor_to_device(net[0], name, "cpu", value=frozen.detach())
    assert all_bits(net) == before
    assert trainable(net) == trainable(tuned())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


@pytest.mark.filterwarnings("ignore::gift.GiftWarning")
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize(
    ("net", "strategy", "message"),
    [
        (Tied, LoRAAllFineTuningStrategy(rank=1), r"\['head'\] have the delta of a tied tensor"),
        (made, BottleneckFineTuningStrategy(2, after=mc_path("0")), r"\['0'\] are wrapped"),
    ],
)
def test_what_cannot_be_fetched_by_module_is_refused(
    net: Any, strategy: Any, message: str, where: str, tmp_path: Path
) -> None:
    """In words, and before any weight was sent elsewhere."""
    net = net()
    enable_fine_tuning(net, strategy)
    before = full_state(net)
    with pytest.raises(RuntimeError, match=message):
        offload(net, where, tmp_path)
    assert full_state(net) == before


@pytest.mark.parametrize("places", [{"": "cpu"}, {"0": "cpu", "1": "cpu", "2": "cpu", "3": "disk"}])
def test_the_base_is_loaded_before_it_is_fine_tuned(places: Any, tmp_path: Path) -> None:
    base, file = made(), str(tmp_path / "model.safetensors")
    save_file(base.state_dict(), file, {"format": "pt"})
    folder = str(tmp_path / "weights")
    with accelerate.init_empty_weights():
        empty, net = made(), made()
    enable_fine_tuning(empty, LoRAAllFineTuningStrategy(rank=1))
    before = full_state(empty)
    with pytest.raises(RuntimeError, match="load it before enable_fine_tuning"):
        accelerate.load_checkpoint_and_dispatch(empty, file, dict(places), offload_folder=folder)
    assert full_state(empty) == before
    accelerate.load_checkpoint_and_dispatch(net, file, {"": "cpu"})
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    accelerate.dispatch_model(net, places, offload_dir=folder)
    assert torch.equal(output(net), output(base))


def test_deltas_are_loaded_as_a_checkpoint(tmp_path: Path) -> None:
    net = tuned()
    file = str(tmp_path / "model.safetensors")
    save_file(net.state_dict(), file, {"format": "pt"})
    fresh = made()
    enable_fine_tuning(fresh, FineTuningStrategy([(mc_layer(), ma_adapt("lora"))]))
    accelerate.load_checkpoint_in_model(fresh, file)
    assert torch.equal(output(fresh), output(net))


@pytest.mark.parametrize("where", ["cpu", "disk", "dispatch"])
def test_an_offloaded_network_is_not_fine_tuned(where: str, tmp_path: Path) -> None:
    net = made()
    expected = output(net)
    offload(net, where, tmp_path)
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    assert torch.equal(output(net), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_send_nothing_elsewhere(when: str) -> None:
    net = made()
    if when == "before":
        accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)
    client = Client(net, lambda: output(net))
    client.enable(LoRAAllFineTuningStrategy(rank=1))
    if when == "after":
        accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = nn.functional.mse_loss(net.train()(X)[:, :2], Y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    client.check(losses, None)
    remove_hook_from_submodules(net)
    assert torch.equal(output(net), client.base_output)
