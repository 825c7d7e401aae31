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
from gift.core.weights.record import weight_deltas
from gift.factories import ma_adapt, mc_path, mc_type, pa_adapt, pc_path
from gift.strategies import (
    FineTuningStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)
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


# ------------------------------------------------------------------------------- ranks by EVA


class Uneven(nn.Module):
    """Four linear layers, whose inputs have spectra that differ, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.conv = nn.Conv1d(12, 4, 1)
        self.never = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        scales = torch.arange(12.0)
        for number, part in enumerate(self.parts):
            x = part(x * torch.exp(-0.15 * (number + 1) * scales))
        return self.conv(x[..., None])


RANKS = LoRALinearFineTuningStrategy


def uneven() -> tuple[Uneven, Tensor]:
    torch.manual_seed(0)
    net = Uneven()
    for part in net.parts:
        nn.init.orthogonal_(part.weight)
    return net, torch.randn(200, 12)


def only_parts(rank: int = 3, **settings: Any) -> FineTuningStrategy:
    return FineTuningStrategy([(mc_path(glob="parts.*"), ma_adapt("lora", rank=rank, **settings))])


@pytest.mark.parametrize(("rank", "rho"), [(3, 2.0), (2, 2.0), (3, 1.5), (2, 3.0), (4, 1.0)])
def test_ranks_are_those_of_peft(rank: int, rho: float) -> None:
    net, x = uneven()
    config = peft.LoraConfig(
        r=rank, init_lora_weights="eva", target_modules=r"parts\.\d",
        eva_config=EvaConfig(rho=rho, tau=0.9999, use_label_mask=False),
    )  # fmt: skip
    state = peft.get_eva_state_dict(
        copy.deepcopy(net), [{"x": x}] * 4, config, prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0].contiguous(), show_progress_bar=False,
    )  # fmt: skip
    theirs = {name: len(rows) for name, rows in state.items()}
    ours = gift.starts.allocate(net, [x], only_parts(rank), rho=rho).ranks
    assert ours == theirs
    assert sum(ours.values()) == 4 * rank
    if rho == 1:
        assert set(ours.values()) == {rank}
    else:
        assert len(set(ours.values())) > 1


def test_ranks_are_moved_as_the_shares_of_all_layers_say() -> None:
    """In several batches, which is exact here and not in PEFT; then enabled and initialised."""
    net, x = uneven()
    before = all_bits(net)
    found = gift.starts.allocate(net, x.split(50), only_parts(lora_alpha=6.0))
    assert all_bits(net) == before
    shares = []
    h = x
    for number in range(4):
        h = h * torch.exp(-0.15 * (number + 1) * torch.arange(12.0))
        _, sigma, _ = torch.linalg.svd((h - h.mean(0)).double(), full_matrices=False)
        own = sigma.square() / sigma.square().sum()
        shares += [(share, f"parts.{number}") for share in own[:6].tolist()]
        h = net.parts[number](h).detach()
    chosen = [path for _, path in sorted(shares, reverse=True)[:12]]
    assert found.ranks == {f"parts.{i}": chosen.count(f"parts.{i}") for i in range(4)}
    again = gift.load_strategy_from_config(found.strategy.to_config())
    for strategy in (found.strategy, again):
        gift.enable_fine_tuning(net, strategy)
        assert sum(p.numel() for p in net.parameters()) == found.parameters == 12 * 24
        for path, rank in found.ranks.items():
            method = weight_deltas(net.get_submodule(path))["weight"].method
            assert (method.rank, method.scaling) == (rank, 2.0)
        report = gift.initialise(net, x.split(50))
        assert list(report.shares) == [f"{path}.weight" for path in found.ranks]
        gift.disable_fine_tuning(net)
    fixed = gift.starts.allocate(net, [x], only_parts(lora_alpha=6.0), keep_scaling=False)
    gift.enable_fine_tuning(net, fixed.strategy)
    method = weight_deltas(net.parts[0])["weight"].method
    assert method.scaling == 6.0 / fixed.ranks["parts.0"]


def test_layers_of_rank_zero_stay_frozen() -> None:
    torch.manual_seed(0)
    two, x = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)]), torch.randn(500, 12)
    flat, few = x, x * torch.tensor([1.0] * 3 + [1e-3] * 9)
    found = gift.starts.allocate(two, [(flat, few)], RANKS(rank=1), call=lambda b: [
        layer(x) for layer, x in zip(two, b, strict=True)])  # fmt: skip
    assert found.ranks == {"0": 0, "1": 2}
    assert "frozen" in str(found)
    report = gift.enable_fine_tuning(two, found.strategy)
    assert report.trainable_after == found.parameters == 2 * 24
    assert [hasattr(layer, "lora_A") for layer in two] == [False, True]
    net, _ = uneven()
    strategy = gift.strategies.SizedStrategy(
        FineTuningStrategy(para_caps=[(pc_path(glob="parts.*.weight"), pa_adapt("lora"))]),
        {f"parts.{i}.weight": i for i in range(4)},
    )
    gift.enable_fine_tuning(net, strategy)
    assert [len(getattr(part, "lora_A", [])) for part in net.parts] == [0, 1, 2, 3]
    assert sum(p.numel() for p in net.parameters()) == 6 * 24


def test_other_layers_keep_their_rank() -> None:
    """Convolutions, and layers that no batch reached; layers with the same input share alike."""
    net, x = uneven()
    strategy = LoRAAllFineTuningStrategy(rank=2)
    with pytest.warns(gift.GiftWarning, match="no batch reached never, which keep their rank"):
        ranks = gift.starts.allocate(net, [x], strategy).ranks
    assert (ranks["conv"], ranks["never"]) == (2, 2)
    assert sum(ranks[f"parts.{i}"] for i in range(4)) == 8
    twins = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
    both = gift.starts.allocate(twins, [x], RANKS(rank=3), call=lambda x: [m(x) for m in twins])
    assert both.ranks == {"0": 3, "1": 3}


def test_what_cannot_be_allocated() -> None:
    net, x = uneven()
    before = all_bits(net)
    strategy = only_parts()
    for rho in (0.5, float("nan"), "2", True):
        with pytest.raises(ValueError, match=r"rho is .*, expected a number of at least 1"):
            gift.starts.allocate(net, [x], strategy, rho=rho)
    with pytest.raises(ValueError, match="there are no batches"):
        gift.starts.allocate(net, [], strategy)
    with pytest.raises(gift.AdaptationError, match=r"inputs of parts.0, .* are not finite"):
        gift.starts.allocate(net, [x * torch.inf], strategy)
    convs = FineTuningStrategy([(mc_path("conv"), ma_adapt("lora"))])
    with pytest.raises(gift.AdaptationError, match=r"between linear layers with lora .*are conv"):
        gift.starts.allocate(net, [x], convs)
    with pytest.raises(TypeError, match="expected a FineTuningStrategy"):
        gift.starts.allocate(net, [x], None)
    assert all_bits(net) == before
    assert not any(m._forward_pre_hooks for m in net.modules())
    gift.enable_fine_tuning(net, strategy)
    with pytest.raises(RuntimeError, match="already"):
        gift.starts.allocate(net, [x], strategy)


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
