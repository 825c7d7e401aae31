"""Starts of LoRA that look at data: `gift.initialise`."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

import gift
from gift.factories import ma_adapt, mc_path, mc_type
from gift.strategies import FineTuningStrategy, LoRAAllFineTuningStrategy
from tests.common import all_bits

pytestmark = pytest.mark.filterwarnings("ignore:the delta has more")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.conv = nn.Conv1d(20, 20, 1)
        self.down = nn.Linear(20, 6)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.down(self.conv(self.up(x).mT).mT.tanh())


def setting(method: str = "guided", **settings: Any) -> tuple[Net, Any, Any]:
    """The base, the network, and batches with directions that differ."""
    torch.manual_seed(0)
    base = Net()
    net = copy.deepcopy(base)
    strategy = FineTuningStrategy([(mc_type(nn.Linear), ma_adapt(method, rank=3, **settings))])
    gift.enable_fine_tuning(net, strategy)
    scales = torch.linspace(0.2, 3, 12)
    return base, net, [torch.randn(4, 5, 12) * scales for _ in range(3)]


def inputs(base: Net, batches: Any) -> dict[str, Tensor]:
    """The inputs of both linear layers in the base, as rows."""
    x = torch.cat([b.reshape(-1, 12) for b in batches])
    return {"up": x, "down": base.conv(base.up(x)[..., None])[..., 0].tanh().detach()}


def alike(one: Tensor, other: Tensor, **tolerance: Any) -> None:
    """Rows are equal but for their signs."""
    signs = (one * other).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(one * signs, other, **tolerance)


# ------------------------------------------------------------------------------------------ EVA


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "lora_fa"])
def test_eva_starts_at_the_principal_directions_of_the_inputs(method: str) -> None:
    base, net, batches = setting(method)
    before = net(batches[0])
    report = gift.initialise(net, batches)
    for name, x in inputs(base, batches).items():
        _, sigma, vh = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
        layer = net.get_submodule(name)
        alike(layer.lora_A.double(), vh[:3], rtol=1e-4, atol=1e-4)
        share = sigma[:3].square().sum() / sigma.square().sum()
        assert report.shares[f"{name}.weight"] == pytest.approx(float(share), rel=1e-4)
    torch.testing.assert_close(net(batches[0]), before)


def _rows(x: Any, *_: Any) -> Tensor:
    rows: Tensor = x if torch.is_tensor(x) else x[0]
    return rows.contiguous()


def test_eva_agrees_with_peft() -> None:
    base, net, batches = setting("lora")
    config = peft.LoraConfig(
        r=3, init_lora_weights="eva", target_modules=["up", "down"],
        eva_config=EvaConfig(rho=1.0, tau=0.9999999, use_label_mask=False),
    )  # fmt: skip
    other = peft.get_peft_model(copy.deepcopy(base), config)
    whole = torch.cat([b.reshape(-1, 12) for b in batches])  # its incremental method is inexact
    rows = {"prepare_layer_inputs_fn": lambda x, *_: x[0].contiguous(), "show_progress_bar": False}
    peft.initialize_lora_eva_weights(
        other, [{"x": whole}] * 4, prepare_model_inputs_fn=None, **rows
    )
    gift.initialise(net, batches)
    for name in ("up", "down"):
        theirs = other.base_model.model.get_submodule(name).lora_A["default"].weight.detach()
        alike(net.get_submodule(name).lora_A.detach(), theirs, rtol=2e-2, atol=2e-2)


def test_padding_is_left_out() -> None:
    _base, net, batches = setting("lora")
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[:, 3:] = 0
    padded = batches[0].clone()
    padded[:, 3:] = 1e3
    gift.initialise(net, [{"x": padded, "attention_mask": mask}])
    x = padded[:, :3].reshape(-1, 12).double()
    _, _, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    alike(net.up.lora_A.double(), vh[:3], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------- CorDA


@pytest.mark.parametrize("kept", [False, True])
def test_corda_agrees_with_peft(kept: bool) -> None:
    base, net, batches = setting(lora_alpha=5)
    before = net(batches[0])
    config = peft.LoraConfig(
        r=3, lora_alpha=5, init_lora_weights="corda", target_modules=["up", "down"],
        corda_config=CordaConfig(corda_method="kpm" if kept else "ipm"),
    )  # fmt: skip
    twin = copy.deepcopy(base)
    flat = [b.reshape(-1, 12) for b in batches]  # it takes rows or one sequence

    def run() -> None:
        for batch in flat:
            twin(batch[None])

    preprocess_corda(twin, config, run_model=run)
    other = peft.get_peft_model(twin, config)
    gift.initialise(net, flat_batches(flat), "corda", keep_knowledge=kept)
    for name in ("up", "down"):
        layer, theirs = net.get_submodule(name), other.base_model.model.get_submodule(name)
        product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, product, rtol=1e-3, atol=1e-4)
        residual = layer.weight - 5 / 3 * (layer.lora_B @ layer.lora_A)
        torch.testing.assert_close(residual, theirs.base_layer.weight, rtol=1e-3, atol=1e-4)
    assert torch.equal(net(batches[0]), before)


def flat_batches(flat: list[Tensor]) -> list[Tensor]:
    return [batch[None] for batch in flat]


# -------------------------------------------------------------------------------------- LoRA-GA


def test_lora_ga_starts_at_singular_vectors_of_the_gradient() -> None:
    base, net, batches = setting(lora_alpha=6)
    before = net(batches[0])

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).square().mean()

    report = gift.initialise(net, batches, "lora_ga", loss=lambda batch: loss(net, batch), gamma=4)
    for batch in batches:
        loss(base, batch).backward()
    for name, rows in (("up", 20), ("down", 6)):
        gradient = base.get_submodule(name).weight.grad.double() / len(batches)
        u, sigma, vh = torch.linalg.svd(gradient)
        layer, scale = net.get_submodule(name), rows**0.25 / 2
        alike(layer.lora_A.double(), scale * vh[:3], rtol=1e-3, atol=1e-4)
        alike(layer.lora_B.mT.double(), scale * u[:, 3:6].mT, rtol=1e-3, atol=1e-4)
        share = sigma[:6].square().sum() / sigma.square().sum()
        assert report.shares[f"{name}.weight"] == pytest.approx(float(share), rel=1e-4)
    assert torch.equal(net(batches[0]), before)
    assert all(p.grad is None for p in nn.Module.parameters(net))


def test_a_bigger_first_step_than_lora() -> None:
    """What LoRA-GA is for: one step of gradient descent lowers the loss more."""
    left = {}
    for method in ("lora", "guided"):
        _, net, batches = setting(method)

        def loss(batch: Tensor, net: Any = net) -> Tensor:
            return (net(batch) - 1).square().mean()

        if method == "guided":
            gift.initialise(net, batches, "lora_ga", loss=loss)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        loss(batches[0]).backward()
        optimizer.step()
        left[method] = float(loss(batches[0]))
    assert left["guided"] < left["lora"]


# ------------------------------------------------------------------------------ files, refusals


def test_a_reload_needs_no_data(tmp_path: Path) -> None:
    base, net, batches = setting()
    gift.initialise(net, batches, "corda")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    gift.save(net, tmp_path / "delta.safetensors")
    gift.load(base, tmp_path / "delta.safetensors")
    assert torch.equal(base(batches[0]), net(batches[0]))


def test_what_is_left_is_named() -> None:
    net, (_, _, batches) = Net(), setting()
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy())
    report = gift.initialise(net, batches)
    assert report.left == ["conv.weight"]
    assert "conv.weight" in str(report)
    net = nn.ModuleDict({"used": Net(), "unused": nn.Linear(12, 12)})
    net.forward = lambda x: net["used"](x)  # type: ignore[method-assign]


def test_refusals_leave_the_network_as_it_was() -> None:
    _, net, batches = setting()
    bits = all_bits(net)
    for text, error, arguments in (
        ("unknown start 'evo'.*eva", ValueError, ("evo",)),
        ("guided.*lora|adapted by lora", gift.AdaptationError, ("eva",)),
        ("needs the loss", ValueError, ("lora_ga",)),
    ):
        with pytest.raises(error, match=text):
            gift.initialise(net, batches, *arguments)
    with pytest.raises(ValueError, match="no setting"):
        gift.initialise(net, batches, "corda", keep=True)
    with pytest.raises(ValueError, match="no batches"):
        gift.initialise(net, [], "corda")
    broken = [batches[0] * float("nan")]
    with pytest.raises(gift.AdaptationError, match=r"up.weight.*not finite"):
        gift.initialise(net, broken, "corda")
    with pytest.raises(RuntimeError, match="not"):
        gift.initialise(Net(), batches)
    assert all_bits(net) == bits
    small = FineTuningStrategy([(mc_path("down"), ma_adapt("guided", rank=4))])
    net = Net()
    gift.enable_fine_tuning(net, small)
    with pytest.raises(gift.AdaptationError, match="choose a rank of 3"):
        gift.initialise(net, batches, "lora_ga", loss=lambda batch: net(batch).sum())
