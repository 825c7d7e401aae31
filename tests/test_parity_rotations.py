"""OFT and HRA: against PEFT on the same tensors in double, and what makes a rotation one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import HRAConfig, OFTConfig, get_peft_model
from torch import Tensor, nn

from gift import FineTuningStrategy, enable_fine_tuning
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_any, mc_name
from gift.methods import METHODS, Method
from tests.common import assert_only_the_weight_is_kept, trainable

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

DOUBLE = {"dtype": torch.float64}
Make, Inputs = Callable[[], nn.Module], Callable[[], Tensor]
LINEAR: tuple[Make, Inputs] = (
    lambda: nn.Linear(12, 5, **DOUBLE),
    lambda: torch.randn(2, 3, 12, **DOUBLE),
)
UNBIASED: tuple[Make, Inputs] = (
    lambda: nn.Linear(12, 5, bias=False, **DOUBLE),
    lambda: torch.randn(4, 12, **DOUBLE),
)
POINTWISE: tuple[Make, Inputs] = (
    lambda: nn.Conv2d(12, 5, 1, **DOUBLE),
    lambda: torch.randn(2, 12, 4, 4, **DOUBLE),
)
CONV: tuple[Make, Inputs] = (
    lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, **DOUBLE),
    lambda: torch.randn(2, 4, 5, 5, **DOUBLE),
)
EMBEDDING: tuple[Make, Inputs] = (
    lambda: nn.Embedding(10, 12, **DOUBLE),
    lambda: torch.randint(0, 10, (3, 4)),
)


class Pair:
    """A layer, fine-tuned by gift and by PEFT."""

    def __init__(self, make: Make, config: Any, method: str, **settings: Any) -> None:
        self.ours = nn.Sequential(make())
        self.theirs = get_peft_model(copy.deepcopy(self.ours), config).double()
        action = ma_adapt(method, **settings)
        enable_fine_tuning(self.ours, FineTuningStrategy([(mc_name("0"), action)]))
        (self.mine,) = (p for p in self.ours.parameters() if p.requires_grad)
        (self.other,) = (p for p in self.theirs.parameters() if p.requires_grad)
        assert self.mine.numel() == self.other.numel()

    def copy_theirs(self, change: Callable[[Tensor], Tensor], std: float) -> None:
        """Give both the same random parameters; `change` makes ours of PEFT's."""
        with torch.no_grad():
            self.mine.copy_(change(self.other.normal_(std=std)))

    def assert_equal(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        """Outputs and gradients, under a loss that sees rotated outputs."""
        weights = None
        for net in (self.ours, self.theirs):
            output = net(x)
            weights = torch.randn_like(output) if weights is None else weights
            (weights * output.square()).sum().backward()
        torch.testing.assert_close(self.ours(x), self.theirs(x), rtol=1e-10, atol=1e-10)
        assert self.other.grad is not None
        assert self.other.grad.abs().max() > 1e-3
        expected = change(self.other.grad)
        torch.testing.assert_close(self.mine.grad, expected, rtol=1e-9, atol=1e-9)

    def assert_equal_merged(self) -> None:
        merged = self.theirs.merge_and_unload().get_submodule("0").weight
        torch.testing.assert_close(self.ours[0].weight, merged, rtol=1e-10, atol=1e-10)


def oft(size: int, share: bool, series: bool) -> OFTConfig:
    """PEFT's, by a long series, which it cuts after the fourth power by default, or exactly."""
    return OFTConfig(
        oft_block_size=size, block_share=share, use_cayley_neumann=series,
        num_cayley_neumann_terms=40, target_modules=["0"],
    )  # fmt: skip


@pytest.mark.parametrize("series", [True, False], ids=["default", "exact"])
@pytest.mark.parametrize("share", [False, True], ids=["blocks", "shared"])
@pytest.mark.parametrize("size", [3, 12])
@pytest.mark.parametrize(
    ("make", "inputs"), [LINEAR, UNBIASED, POINTWISE, EMBEDDING],
    ids=["linear", "unbiased", "pointwise", "embedding"],
)  # fmt: skip
def test_oft_is_that_of_peft(
    make: Make, inputs: Inputs, size: int, share: bool, series: bool
) -> None:  # fmt: skip
    """PEFT turns the other way where it computes exactly, and, of embeddings, always."""
    pair = Pair(make, oft(size, share, series), "oft", block_size=size, block_share=share)
    sign = (1 if series else -1) * (-1 if isinstance(make(), nn.Embedding) else 1)
    pair.copy_theirs(lambda q: sign * q, std=0.03)
    pair.assert_equal(inputs(), lambda q: sign * q)
    pair.assert_equal_merged()


def test_oft_of_a_convolution_is_that_of_peft_after_merging() -> None:
    """Before that, PEFT sums overlapping patches of the input, which is another convolution."""
    pair = Pair(CONV[0], oft(9, False, False), "oft", block_size=9)
    pair.copy_theirs(torch.neg, std=0.3)
    pair.assert_equal_merged()


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize(
    ("make", "inputs"), [LINEAR, UNBIASED, POINTWISE, CONV],
    ids=["linear", "unbiased", "pointwise", "conv"],
)  # fmt: skip
def test_hra_is_that_of_peft(make: Make, inputs: Inputs, rank: int) -> None:
    torch.set_default_dtype(torch.float64)  # PEFT makes its unit matrix in the default dtype
    try:
        pair = Pair(make, HRAConfig(r=rank, target_modules=["0"]), "hra", rank=rank)
        pair.copy_theirs(torch.t, std=1.0)
        pair.assert_equal(inputs(), torch.t)
        pair.assert_equal_merged()
    finally:
        torch.set_default_dtype(torch.float32)


def test_hra_starts_as_in_peft() -> None:
    """Equal pairs, drawn uniformly within ``1 / sqrt(columns)``."""
    u = METHODS["hra"](rank=40).init_parameters(torch.zeros(3, 900))["hra_u"]
    assert torch.equal(u[0::2], u[1::2])
    assert u.abs().max() <= 1 / 30
    torch.testing.assert_close(u.std().item(), 1 / 30 / 3**0.5, rtol=0.02, atol=0)
    assert len(u.unique(dim=0)) == 20


ROTATIONS: dict[str, Method] = {
    "oft": METHODS["oft"](),
    "oft_blocks": METHODS["oft"](block_size=3),
    "oft_shared": METHODS["oft"](block_size=5, block_share=True),
    "hra": METHODS["hra"](),
    "hra_pair": METHODS["hra"](rank=2),
    "hra_largest": METHODS["hra"](rank=14),
}
rotations = pytest.mark.parametrize("method", ROTATIONS.values(), ids=ROTATIONS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("delta", [None, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@rotations
def test_the_start_is_exact(method: Method, dtype: torch.dtype, delta: torch.dtype | None) -> None:
    """Weight and output, also of inputs that lie in memory the other way round."""
    base = nn.Linear(15, 7, dtype=dtype)
    net = copy.deepcopy(base)
    settings = method.settings | {"dtype": delta}
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt(method.name, **settings))]))
    for x in (torch.randn(4, 15), torch.randn(15, 4).T, torch.randn(15), torch.randn(0, 15)):
        assert torch.equal(net(x.to(dtype)), base(x.to(dtype)))
    assert torch.equal(net.weight, base.weight)


def matrix_of(method: Method, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    """The orthogonal matrix of a trained delta."""
    torch.manual_seed(1)
    one = torch.eye(15, dtype=dtype)
    method = method.fit(one.shape)
    return method.effective_weight(
        one, {k: v.normal_(std=std) for k, v in method.init_parameters(one).items()}
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@rotations
def test_neurons_keep_their_lengths_and_angles(method: Method, dtype: torch.dtype) -> None:
    """Large parameters make a rotation, or a unitary matrix, and no reflection."""
    matrix = matrix_of(method, dtype)
    one = torch.eye(15, dtype=dtype)
    assert (matrix - one).abs().max() > 0.1
    torch.testing.assert_close(matrix @ matrix.mH, one, rtol=0, atol=1e-13)
    if not dtype.is_complex:
        torch.testing.assert_close(torch.det(matrix).item(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_butterflies_mix_twice_as_many_inputs_with_each_factor(
    factors: int, dtype: torch.dtype
) -> None:
    """Of 16 inputs each meets 2, 4, 8, or all; lengths and angles stay."""
    method = METHODS["boft"](block_size=2, n_factors=factors, rescale=False)
    one = torch.eye(16, dtype=dtype)
    parameters = {k: v.normal_() for k, v in method.fit((16, 16)).init_parameters(one).items()}
    matrix = method.effective_weight(one, parameters)
    assert ((matrix.abs() > 1e-12).sum(0) == 2**factors).all()
    torch.testing.assert_close(matrix @ matrix.mH, one, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "columns", "message"),
    [
        ({"n_factors": 3}, 12, "n_factors 3 needs a multiple of 8 columns, and its matrix has 12"),
        ({"n_factors": 2}, 9, "n_factors 2 needs a multiple of 4 columns, and its matrix has 9"),
        ({"block_size": 6}, 16, "block_size 6 is odd, or 2 times as much does not divide the 16"),
        ({"block_size": 3}, 12, r"block_size 3 is odd, .* \(2 or 6 would"),
        ({"block_size": 4}, 9, "block_size 4 does not divide the 9 columns"),
        ({}, 1, "one column has nothing to rotate"),
    ],
)
def test_butterflies_that_do_not_fit_are_refused(
    settings: dict[str, Any], columns: int, message: str
) -> None:
    with pytest.raises(AdaptationError, match=message):
        METHODS["boft"](**settings, clip_block_size=False).fit((5, columns))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_product_of_reflections(dtype: torch.dtype) -> None:
    """``H_1 H_2 ... H_r``, written out, for each matrix of a batch."""
    method = METHODS["hra"](rank=6)
    w, u = torch.randn(3, 4, 9, dtype=dtype), torch.randn(3, 6, 9, dtype=dtype)
    for one, vectors, got in zip(w, u, method.effective_weight(w, {"hra_u": u}), strict=True):
        for v in vectors:
            one = one @ (torch.eye(9, dtype=dtype) - 2 * torch.outer(v, v.conj()) / v.norm() ** 2)
        torch.testing.assert_close(got, one, rtol=0, atol=1e-13)


def test_reflections_that_are_nearly_equal_keep_their_difference() -> None:
    """A change of 1e-4 is right to five digits of its own in single precision."""
    method = METHODS["hra"](rank=4)
    u = method.init_parameters(torch.zeros(5, 30))["hra_u"]
    u[1::2] += 1e-5 * torch.randn(2, 30)
    left, right = method.factors({"hra_u": u})
    one = torch.eye(30, dtype=torch.float64)
    expected = method.effective_weight(one, {"hra_u": u.double()}) - one
    scale = expected.abs().max().item()
    assert 1e-6 < scale < 1e-3
    torch.testing.assert_close((left @ right).double(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("columns", "size"),
    [(64, 32), (768, 32), (147, 21), (27, 27), (50, 25), (9, 9), (2, 2), (37, 37), (74, 37),
     (1009, 1009), (1369, 37), (40, 40), (48, 24)],
)  # fmt: skip
def test_the_default_block_size_is_the_divisor_nearest_to_32(columns: int, size: int) -> None:
    """Never one, which would rotate nothing."""
    fitted = METHODS["oft"]().fit((5, columns))
    assert fitted.block_size == size
    q = fitted.init_parameters(torch.empty(5, columns, device="meta"))["oft_Q"]
    assert q.shape == (columns // size, size * (size - 1) // 2)


@pytest.mark.parametrize(
    ("columns", "size", "near"),
    [(12, 5, "4 or 6 would"), (12, 24, "(12 would"), (37, 4, "(37 would"), (147, 32, "21 or 49")],
)
def test_a_block_size_that_does_not_divide_names_those_that_do(
    columns: int, size: int, near: str
) -> None:
    message = f"block_size {size} does not divide the {columns} columns"
    with pytest.raises(AdaptationError, match=message) as caught:
        METHODS["oft"](block_size=size).fit((5, columns))
    assert near in str(caught.value)
    adjusted = METHODS["oft"](block_size=size, clip_block_size=True).fit((5, columns))
    assert columns % adjusted.block_size == 0
    assert str(adjusted.block_size) in near


@pytest.mark.parametrize("rank", [1, 3, 0, -2, 2.0, True])
def test_an_odd_number_of_reflections_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"HRA: rank is .*, expected an even number"):
        METHODS["hra"](rank=rank)


def test_more_reflections_than_columns_are_refused() -> None:
    assert METHODS["hra"]().fit((5, 7)).rank == 6
    assert METHODS["hra"](rank=10, clip_rank=True).fit((5, 7)).rank == 6
    with pytest.raises(AdaptationError, match="rank 8 is above 6"):
        METHODS["hra"](rank=8).fit((5, 7))


@pytest.mark.parametrize("method", ["oft", "hra"])
def test_a_linear_layer_keeps_nothing_of_its_weights_size(method: str) -> None:
    """It rotates its input: of what is kept for the backward pass, only the frozen weight is."""
    net = nn.Linear(64, 48)
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt(method))]))
    assert len(trainable(net)) == 1
    assert_only_the_weight_is_kept(net, torch.randn(2, 64))


@pytest.mark.parametrize("size", [9, 12])
def test_a_lazy_layer_takes_a_block_size_that_fits_its_shape(size: int) -> None:
    net = nn.LazyLinear(4)
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt("oft", block_size=size))]))
    net(torch.randn(2, 36))
    assert net.oft_Q.shape == (36 // size, size * (size - 1) // 2)
