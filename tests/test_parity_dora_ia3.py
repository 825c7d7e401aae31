"""DoRA and (IA)^3 against PEFT, on the same tensors in double: outputs and gradients."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_name

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

RANK, ALPHA = 2, 5
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(2, 3, 8)),
    "Linear, no bias": (lambda: nn.Linear(8, 6, bias=False), lambda: torch.randn(4, 8)),
    "Conv1D of transformers": (lambda: Conv1D(6, 8), lambda: torch.randn(2, 3, 8)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 5, 5)),
    "Conv2d, 1x1": (lambda: nn.Conv2d(4, 6, 1), lambda: torch.randn(2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2, bias=False), lambda: torch.randn(2, 4, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(10, 6), lambda: torch.randint(0, 10, (3, 4))),
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(make: Callable[[], nn.Module], config: Any, method: str, **settings: Any) -> Any:
    """The layer by gift, PEFT's model around a copy, and PEFT's layer in it."""
    base = nn.Sequential(make())
    theirs = get_peft_model(copy.deepcopy(base), config)
    enable_fine_tuning(base, FineTuningStrategy([(mc_name("0"), ma_adapt(method, **settings))]))
    return base, theirs, theirs.base_model.model.get_submodule("0")


def assert_equal(ours: Any, theirs: Any, x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Outputs agree, and each parameter's gradient with that of PEFT's parameter."""
    for net in (ours, theirs):
        net(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    for mine, other in pairs:
        assert other.grad.abs().max() > 0
        expected = other.grad.reshape(-1) if mine.numel() != other.grad.numel() else other.grad
        torch.testing.assert_close(mine.grad.flatten(), expected.flatten(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("make", "inputs"), LAYERS.values(), ids=LAYERS)
def test_dora(make: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> None:
    transposed = isinstance(make(), Conv1D)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["0"], fan_in_fan_out=transposed
    )
    ours, theirs, layer = both(make, config, "dora", rank=RANK, lora_alpha=ALPHA)
    if isinstance(ours[0], nn.Embedding):
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        start = magnitude.clone().flatten()
        for parameter in (a, b):
            parameter.normal_(std=0.3)
        magnitude.add_(torch.rand_like(magnitude))
        ours[0].lora_A.copy_(a.flatten(1))
        ours[0].lora_B.copy_(b.flatten(1))
        ours[0].dora_delta_m.copy_((magnitude.flatten() - start)[:, None])
    pairs = [(ours[0].lora_A, a), (ours[0].lora_B, b), (ours[0].dora_delta_m, magnitude)]
    assert_equal(ours, theirs, inputs(), pairs)


# PEFT has no (IA)^3 for embeddings, and scales whole input channels of a convolution where gift
# scales each position in its kernel; the matrix compares both with the formula.
OUTPUTS = [name for name in LAYERS if name != "Embedding"]
INPUTS = [name for name in OUTPUTS if name not in ("Conv2d", "Conv3d")]


@pytest.mark.parametrize(
    ("layer", "feedforward"), [(n, False) for n in OUTPUTS] + [(n, True) for n in INPUTS]
)
def test_ia3(layer: str, feedforward: bool) -> None:
    make, inputs = LAYERS[layer]
    config = IA3Config(
        target_modules=["0"],
        feedforward_modules=["0"] if feedforward else [],
        fan_in_fan_out=isinstance(make(), Conv1D),
    )
    ours, theirs, wrapped = both(make, config, "ia3", feedforward=feedforward)
    scale = wrapped.ia3_l["default"]
    assert sum(p.numel() for p in ours.parameters()) == scale.numel()
    with torch.no_grad():
        scale.normal_(1, 0.3)
        ours[0].ia3_l.copy_(scale.reshape(ours[0].ia3_l.shape))
    assert_equal(ours, theirs, inputs(), [(ours[0].ia3_l, scale)])
