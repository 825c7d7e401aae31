"""What C3A, DeLoRA, GraLoRA, HiRA, LoRA-XS, MiSS and RoAd promise beside their formulas.

The formulas are in `tests.cases.methods`, and PEFT's code on the same tensors is in
`tests.cases.exchange`.
"""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import PsoftConfig, RandLoraConfig, get_peft_model
from torch import Tensor, nn

from gift import FineTuningStrategy, enable_fine_tuning
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_any
from gift.methods import METHODS
from tests.cases.exchange import randomised
from tests.common import assert_only_the_weight_is_kept

DOUBLE = {"dtype": torch.float64}


def trained(name: str, shape: tuple[int, ...], **settings: Any) -> tuple[Any, Tensor, Any]:
    """The method, a frozen matrix and parameters, as after training."""
    matrix = torch.randn(shape, **DOUBLE)
    method = METHODS[name](**settings).fit(shape)
    parameters = method.init_parameters(matrix)
    for value in parameters.values():
        if not isinstance(value, nn.Buffer):
            value.normal_()
    return method, matrix, parameters


def update(name: str, shape: tuple[int, ...], **settings: Any) -> tuple[Tensor, Tensor]:
    """A frozen matrix, and what is added to it."""
    method, matrix, parameters = trained(name, shape, **settings)
    return matrix, method.effective_weight(matrix, parameters) - matrix


@pytest.mark.parametrize(
    ("name", "settings", "rank"),
    [
        ("lora", {"rank": 4}, 4),
        ("gralora", {"rank": 4, "n_blocks": 1}, 4),
        ("gralora", {"rank": 4, "n_blocks": 2}, 8),
        ("gralora", {"rank": 4, "n_blocks": 4}, 16),
        ("miss", {"rank": 4}, 4),
        ("delora", {"rank": 4}, 4),
        ("lora_xs", {"rank": 4}, 4),
        ("hira", {"rank": 1}, 20),
        ("c3a", {"block_size": 20}, 20),
    ],
)
def test_the_rank_of_the_update(name: str, settings: dict[str, Any], rank: int) -> None:
    """For as many parameters, blocks, circulants and products with the weight have more of it."""
    _, delta = update(name, (20, 40), **settings)
    assert torch.linalg.matrix_rank(delta) == rank


def test_the_strength_bounds_the_update_of_delora() -> None:
    """However large its factors are; where they are all alike, it is reached."""
    method, matrix, parameters = trained("delora", (12, 9), rank=4)
    bound = parameters["delora_lambda"].abs().item()

    def scaled() -> Tensor:
        return (method.effective_weight(matrix, parameters) - matrix) / matrix.norm(dim=0)

    for size in (1e-3, 1.0, 1e3):
        parameters["delora_B"].normal_(std=size)
        assert 0 < scaled().norm().item() <= bound
    parameters["delora_B"].copy_(7 * torch.eye(12, **DOUBLE)[:, :4])
    parameters["delora_A"].copy_(3 * torch.eye(9, **DOUBLE)[:4])
    torch.testing.assert_close(scaled().norm().item(), bound / math.sqrt(4))
    parameters["delora_B"].copy_(torch.ones(12, 4, **DOUBLE))
    parameters["delora_A"].copy_(torch.ones(4, 9, **DOUBLE))
    torch.testing.assert_close(scaled().norm().item(), bound)


def test_hira_leaves_pruned_elements_pruned() -> None:
    method, matrix, parameters = trained("hira", (6, 8), rank=3)
    matrix[torch.rand(6, 8) < 0.5] = 0
    moved = method.effective_weight(matrix, parameters)
    assert torch.equal(moved == 0, matrix == 0)


def test_road_turns_pairs_and_leaves_infinite_outputs() -> None:
    """With scales of one, lengths of pairs stay; a partner of infinity does not turn to NaN."""
    method, _, parameters = trained("road", (8, 1), group_size=4)
    parameters["road_alpha"].fill_(1)
    y = torch.randn(8, 5, **DOUBLE)
    turned = method.effective_weight(y, parameters)
    pairs = [(0, 2), (1, 3), (4, 6), (5, 7)]
    for pair in pairs:
        torch.testing.assert_close(turned[[*pair]].norm(dim=0), y[[*pair]].norm(dim=0))
        assert not torch.allclose(turned[[*pair]], y[[*pair]])
    y[2] = -math.inf
    turned = method.effective_weight(y, parameters)
    assert torch.equal(turned[2], y[2])
    torch.testing.assert_close(turned[0], y[0] * parameters["road_theta"][0].cos())


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_lora_xs_mixes_the_largest_singular_directions(shape: tuple[int, ...]) -> None:
    """The factors multiply to the best approximation of that rank, whichever signs LAPACK has."""
    matrix = torch.randn(shape, **DOUBLE)
    method = METHODS["lora_xs"](rank=3)
    factors = method.derived(matrix)
    u, sigma, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    best = torch.from_numpy((u[:, :3] * sigma[:3]) @ vh[:3])
    torch.testing.assert_close(factors["xs_B"] @ factors["xs_A"], best)
    torch.testing.assert_close(factors["xs_A"] @ factors["xs_A"].mT, torch.eye(3, **DOUBLE))
    rows = torch.randperm(shape[0])
    mixed = method.derived(matrix[rows])  # the same right vectors, from another computation
    torch.testing.assert_close(mixed["xs_A"], factors["xs_A"])
    torch.testing.assert_close(mixed["xs_B"], factors["xs_B"][rows])


def test_lora_xs_has_one_basis_where_singular_values_are_equal() -> None:
    q = torch.linalg.qr(torch.randn(8, 8, **DOUBLE))[0]
    method = METHODS["lora_xs"](rank=3)
    one, other = method.derived(q), method.derived(q + 1e-13 * torch.randn(8, 8, **DOUBLE))
    torch.testing.assert_close(one["xs_A"], other["xs_A"], rtol=0, atol=1e-9)
    torch.testing.assert_close(one["xs_B"], other["xs_B"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sides", [(7, 12), (12, 7), (6, 6)])
def test_randlora_is_that_of_peft_with_other_columns(
    sides: tuple[int, int], double: None
) -> None:  # fmt: skip
    """PEFT flattens the two bases in different orders, which pairs other columns of a random B."""
    inputs, outputs = sides
    base = nn.Sequential(nn.Linear(inputs, outputs))
    config = RandLoraConfig(r=2, randlora_alpha=3, target_modules=["0"])
    theirs = randomised(get_peft_model(copy.deepcopy(base), config))
    layer = theirs.base_model.model[0]
    parts = (layer.randlora_A, layer.randlora_B, layer.randlora_lambda, layer.randlora_gamma)
    a, b, scales, sides_scaled = (part["default"].detach().double() for part in parts)
    count = b.shape[1]
    paired = b.flatten(1).unflatten(1, (2, count)).permute(2, 0, 1)
    parameters = {
        "randlora_lambda": scales.T, "randlora_gamma": sides_scaled,
        "randlora_A": a[:, 0], "randlora_B": paired,
    }  # fmt: skip
    method = METHODS["randlora"](rank=2, alpha=3)
    made = method.init_parameters(base[0].weight.detach())
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in parameters.items()}
    own = method.effective_weight(base[0].weight.detach(), parameters)
    torch.testing.assert_close(own - base[0].weight, layer.get_delta_weight("default"))


def test_psoft_is_that_of_peft_with_the_same_signs() -> None:
    """PEFT takes the signs that LAPACK gives, in single precision."""
    base = nn.Sequential(nn.Linear(9, 7))
    theirs = randomised(get_peft_model(copy.deepcopy(base), PsoftConfig(r=4, target_modules=["0"])))
    layer = theirs.base_model.model[0]
    turn, weight = layer.psoft_R["default"], base[0].weight.detach()
    method = METHODS["psoft"](rank=4)
    factors = method.derived(weight)
    vh = torch.linalg.svd(weight, full_matrices=False)[2][:4]
    signs = (vh * factors["psoft_A"]).sum(1).sign()
    row, column = torch.triu_indices(4, 4, 1)
    parameters = factors | {
        "psoft_Q": turn.weight * signs[row] * signs[column],
        "psoft_beta": turn.vector_b, "psoft_alpha": turn.vector_a,
    }  # fmt: skip
    own = method.effective_weight(weight, parameters) - weight
    torch.testing.assert_close(own, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_psoft_keeps_the_singular_values_of_the_principal_part(dtype: torch.dtype) -> None:
    """Rotated left of the values and right of the vectors, without scales."""
    matrix = torch.randn(6, 9, dtype=dtype)
    method = METHODS["psoft"](rank=3, rescale=False)
    parameters = method.init_parameters(matrix)
    parameters["psoft_Q"].normal_()
    moved = method.effective_weight(matrix, parameters)
    rest = matrix - parameters["psoft_B"] @ parameters["psoft_A"]
    found, expected = torch.linalg.svdvals(moved - rest), torch.linalg.svdvals(matrix)[:3]
    assert not torch.allclose(moved, matrix)
    torch.testing.assert_close(found[3:], torch.zeros(3, **DOUBLE))
    torch.testing.assert_close(found[:3].prod(), expected.prod())
    torch.testing.assert_close(found[:3].square().sum(), expected.square().sum())


REFUSED: dict[str, tuple[str, dict[str, Any], tuple[int, ...], str]] = {
    "blocks that do not fit": (
        "gralora", {"n_blocks": 4}, (8, 6), "n_blocks 4 does not divide both sides",
    ),
    "a rank that blocks cannot share": (
        "gralora", {"rank": 3, "clip_rank": False}, (8, 6), r"rank 3 is not a multiple of 2 .*\(2,",
    ),
    "a rank above a side": (
        "hira", {"rank": 7, "clip_rank": False}, (8, 6), "rank 7 is above 6",
    ),
    "a shard longer than the inputs": (
        "miss", {"rank": 7, "clip_rank": False}, (8, 6), "rank 7 is above 6",
    ),
    "more directions than there are": (
        "lora_xs", {"rank": 7, "clip_rank": False}, (8, 6), "rank 7 is above 6",
    ),
    "a rotation of one direction": (
        "psoft", {"rank": 1, "rescale": False}, (8, 6), "one singular direction has nothing",
    ),
    "more coefficients than elements": (
        "waveft", {"n_frequency": 49, "clip_n_frequency": False}, (8, 6),
        "n_frequency 49 is above 48",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "shape", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(
    name: str, settings: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(AdaptationError, match=message):
        METHODS[name](**settings).fit(shape)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("c3a", {"block_size": 0}, "block_size is 0, expected an integer of at least 1"),
        ("delora", {"delora_lambda": math.inf}, "delora_lambda is inf, expected a finite number"),
        ("gralora", {"n_blocks": 0, "alpha": "x"}, "alpha is 'x'.*; n_blocks is 0"),
        ("road", {"variant": "road_3", "group_size": 5}, "variant is 'road_3'.*group_size is 5"),
        ("waveft", {"scaling": math.nan, "seed": -1}, "scaling is nan.*; seed is -1"),
    ],
)
def test_settings_out_of_range_are_named_together(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[name](**settings)


@pytest.mark.parametrize("name", ["boft", "c3a", "gralora", "miss"])
def test_a_linear_layer_keeps_nothing_of_its_weights_size(name: str) -> None:
    """The update is applied to its input: only the frozen weight is kept for the backward pass."""
    net = nn.Linear(64, 48)
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt(name))]))
    assert_only_the_weight_is_kept(net, torch.randn(2, 64, requires_grad=True))
