"""Layers that do little: torch differentiates them itself. The reference is the plain layer."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.kernels import little
from gift.utils.info import forms, kept_inputs
from tests.common import bytes_kept, derivatives
from tests.test_fast_conv import LAYOUTS, adapted, trained, wrong
from tests.test_fast_conv_groups import LAYERS, SIZES, layer_of, with_weight
from tests.test_recomputed import names_of

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

USUAL: list[tuple[int, bool, dict[str, Any]]] = [
    (1, False, {"kernel_size": 3}),
    (2, False, {"kernel_size": 1}),
    (2, False, {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "bias": False}),
    (2, False, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"}),
    (3, False, {"kernel_size": 2, "stride": (1, 2, 1)}),
]


@pytest.fixture(autouse=True)
def _little(_as_large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(little, "LITTLE", 2**21)


def by_a_form(net: nn.Module, x: Tensor) -> bool:
    return any("LowRank" in name for name in names_of(net(x)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions(layout: str) -> None:
    failures = []
    for axes, transposed, options in (*USUAL, *LAYERS):
        base = layer_of(axes, transposed, options)
        net = adapted(base, rank=2, clip_rank=True, lora_alpha=3.0, conv_layout=layout)
        for batch in ((2,), ()):
            x = torch.randn(*batch, 4, *SIZES[axes], dtype=torch.float64, requires_grad=True)
            wanted = [x, *trained(net)]
            found = derivatives(partial(net, x), wanted)
            expected = derivatives(partial(with_weight, base, net, x), wanted)
            if problems := wrong(found, expected, 1e-12):
                failures.append(f"{axes} {transposed} {options} {batch}: {problems}")
            if layout == "out_as_h" and not transposed and "groups" not in options:
                assert not by_a_form(net, x), options
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias: bool, shape: tuple[int, ...]) -> None:
    base = nn.Linear(5, 7, bias=bias).double()
    net = adapted(base, rank=2, lora_alpha=3.0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def formula() -> Tensor:
        return F.linear(x, base.weight + 1.5 * net.lora_B @ net.lora_A, net.bias)

    wanted = [x, *trained(net)]
    assert not by_a_form(net, x)
    expected = derivatives(formula, wanted)
    assert not wrong(derivatives(lambda: net(x), wanted), expected, 1e-12)


def test_it_starts_exactly() -> None:
    for base, shape in (
        (nn.Conv2d(4, 8, 3), (2, 4, 6, 6)),
        (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
        (nn.Linear(5, 7), (3, 5)),
    ):
        x = torch.randn(shape)
        assert torch.equal(adapted(base, rank=1, std=0.0)(x), base(x))


def test_what_does_much_takes_a_form() -> None:
    """Much is many multiplications, or a large input; of linear layers a large input alone."""
    few, many = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 256, 3, padding=1)
    as_rows: dict[str, Any] = {"rank": 2, "conv_layout": "out_as_h"}
    assert not by_a_form(adapted(few, **as_rows), torch.randn(1, 16, 60, 60))
    assert by_a_form(adapted(few, **as_rows), torch.randn(2, 16, 60, 60))  # 115,200 elements
    assert not by_a_form(adapted(many, **as_rows), torch.randn(1, 16, 32, 32))  # 16,384 elements
    assert by_a_form(adapted(many, **as_rows), torch.randn(1, 16, 33, 33))  # 40 million
    linear = nn.Linear(16, 8)
    assert not by_a_form(adapted(linear, rank=2), torch.randn(1024, 16))
    assert by_a_form(adapted(linear, rank=2), torch.randn(1025, 16))


def test_a_form_that_is_asked_for_is_taken() -> None:
    for layer, x in (
        (nn.Linear(5, 7), torch.randn(3, 5)),
        (nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6)),
    ):
        assert by_a_form(adapted(layer, rank=2, form="merged"), x)


def test_no_effective_weight_is_kept_that_is_larger_than_the_input() -> None:
    base = nn.Conv2d(64, 64, 3, groups=2)
    net, x = adapted(base, rank=1), torch.randn(1, 64, 3, 3, requires_grad=True)
    assert base.weight.numel() > 10 * x.numel()
    assert bytes_kept(net, x) < base.weight.numel()  # a quarter of it


def test_information_says_so() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    net = adapted(net, rank=1, conv_layout="out_as_h")
    x = torch.randn(2, 4, 9, 9)
    assert forms(net, x) == {"0": "side", "2": "whole"}
    assert kept_inputs(net, x) == {"0": "input", "2": "input"}
