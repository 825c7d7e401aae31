"""`Method.low_rank` and `Method.multiplied`, for every method on matrices and batches of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gift.errors import AdaptationError
from gift.methods import method_of
from tests.cases.methods import METHODS, MethodCase
from tests.cases.selection import cells

everywhere = pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)
SHAPES = [(6, 8), (8, 4), (3, 6, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)

LOW_RANK = {
    "adalora",
    "fact",
    "tinylora",
    "lora",
    "rslora",
    "pissa",
    "olora",
    "lora_fa",
    "vera",
    "loha",
    "delora",
    "unilora",
    "vblora",
}
LOW_RANK |= {"guided", "lora_xs", "psoft"}
NO_MULTIPLE = {"dora", "deft", "oft", "boft", "hra", "psoft", "svdiff"}


def trained(case: MethodCase, shape: tuple[int, ...]) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """The method, a frozen matrix, and what it adds, as after some training."""
    matrix = torch.randn(shape, dtype=torch.float64)
    method = method_of(case.method, case.settings).fit(shape)
    parameters = method.init_parameters(matrix)
    for value in parameters.values():
        if value.is_floating_point() and not isinstance(value, torch.nn.Buffer):
            value += 0.3 * torch.randn_like(value)
    return method, matrix, parameters


def change(method: Any, matrix: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return method.effective_weight(matrix, parameters) - matrix


@everywhere
@shapes
def test_factors_multiply_to_the_delta(case: MethodCase, shape: tuple[int, ...]) -> None:
    method, matrix, parameters = trained(case, shape)
    factors = method.low_rank(parameters)
    assert (factors is not None) == (case.method in LOW_RANK)
    if factors is not None:
        expected = change(method, matrix, parameters)
        torch.testing.assert_close(factors[0] @ factors[1], expected, rtol=1e-12, atol=1e-12)
        assert expected.abs().max() > 1e-3


@cells(case=METHODS, shape=SHAPES, number=[0.0, 1.0, -2.5, 0.3])
def test_a_multiple_of_a_delta(case: MethodCase, shape: tuple[int, ...], number: float) -> None:
    method, matrix, parameters = trained(case, shape)
    if case.method in NO_MULTIPLE:
        with pytest.raises(AdaptationError, match=f"no parameters of {case.method}"):
            method.multiplied(parameters, number)
        return
    kept = {name: value.clone() for name, value in parameters.items()}
    made = method.multiplied(parameters, number)
    assert list(made) == list(parameters)
    for name, value in parameters.items():
        assert (made[name].shape, made[name].dtype) == (value.shape, value.dtype)
        assert torch.equal(value, kept[name])
    expected = number * change(method, matrix, parameters)
    torch.testing.assert_close(change(method, matrix, made), expected, rtol=1e-12, atol=1e-12)


@everywhere
def test_a_multiple_keeps_the_dtype(case: MethodCase) -> None:
    if case.method in NO_MULTIPLE:
        return
    for dtype in (torch.float32, torch.bfloat16):
        method = method_of(case.method, case.settings | {"dtype": dtype}).fit((6, 8))
        parameters = method.init_parameters(torch.randn(6, 8))
        made = method.multiplied(parameters, 0.5)
        assert {k: v.dtype for k, v in made.items()} == {k: v.dtype for k, v in parameters.items()}
