"""Quantised weights, on the device on which they are quantised."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift.core.state_settings import without_settings
from tests.gpu.on_device import adapted, assert_near, gradients
from tests.test_quantised import matrix_of_4_bits, matrix_of_8_bits

Quantise = Callable[[nn.Linear, torch.device], Any]


def by_bitsandbytes(name: str, **options: Any) -> Quantise:
    def quantise(layer: nn.Linear, device: torch.device) -> Any:
        made = getattr(pytest.importorskip("bitsandbytes").nn, name)
        packed = made(layer.in_features, layer.out_features, **options)
        packed.load_state_dict(layer.state_dict())
        return packed.to(device)

    return quantise


def by_torchao(name: str) -> Quantise:
    def quantise(layer: nn.Linear, device: torch.device) -> Any:
        torchao = pytest.importorskip("torchao.quantization")
        layer = layer.to(device)
        torchao.quantize_(layer, getattr(torchao, name)())
        return layer

    return quantise


def dequantised(layer: Any) -> Tensor:
    return layer.weight.dequantize()


KINDS: dict[str, tuple[Quantise, Callable[[Any], Tensor]]] = {
    "bitsandbytes nf4": (by_bitsandbytes("LinearNF4"), matrix_of_4_bits),
    "bitsandbytes fp4": (by_bitsandbytes("LinearFP4"), matrix_of_4_bits),
    "bitsandbytes int8": (
        by_bitsandbytes("Linear8bitLt", has_fp16_weights=False),
        matrix_of_8_bits,
    ),
    "torchao int8": (by_torchao("Int8WeightOnlyConfig"), dequantised),
    "torchao float8": (by_torchao("Float8WeightOnlyConfig"), dequantised),
}
ROUNDED = 3e-2  # kernels may round their input to 8 bits, or compute in 16


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "pissa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_is_that_of_the_matrix_in_float64(
    kind: str, method: str, device: torch.device
) -> None:
    quantise, matrix = KINDS[kind]
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 128), torch.randn(16, 64)
    bias = layer.bias.detach().clone()
    packed = quantise(layer, device)
    packed(x.to(device))  # a layer of 8 bits has its scales from its first call on
    plain = nn.Linear(64, 128).double()
    with torch.no_grad():
        plain.weight.copy_(matrix(packed).cpu())
        plain.bias.copy_(bias)
    net, exact = adapted(packed, method), adapted(plain, method)
    exact.load_state_dict(without_settings(net.state_dict()), strict=False)
    found, expected = net(x.to(device)), exact(x.double())
    assert_near(found, expected, ROUNDED)
    found.float().mean().backward()
    expected.mean().backward()
    assert_near(gradients(net), gradients(exact), ROUNDED)
    with torch.no_grad():
        assert_near(net.eval()(x.to(device)), expected, ROUNDED)
