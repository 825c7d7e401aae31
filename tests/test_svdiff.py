"""SVDiff: factors that come out the same again, whatever computed them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift import enable_fine_tuning
from gift.methods import factors
from gift.strategies import SVDiffAllFineTuningStrategy

torch.manual_seed(0)
Q = torch.linalg.qr(torch.randn(12, 12)).Q
MATRICES: dict[str, Tensor] = {
    "random": torch.randn(9, 6),
    "wide": torch.randn(5, 11),
    "identity": torch.eye(8),
    "orthogonal": Q,
    "two_clusters": Q @ torch.diag(torch.tensor([3.0] * 4 + [1.0] * 5 + [0.5, 0.2, 0.1])) @ Q.T,
    "nearly_equal": torch.eye(8) + 1e-6 * torch.randn(8, 8),
    "zero": torch.zeros(6, 4),
    "zero_rows": torch.randn(10, 6) * torch.tensor([[1.0]] * 3 + [[0.0]] * 7),
    "rank_one": torch.outer(torch.arange(1.0, 8), torch.ones(5)),
    "repeated_filters": torch.randn(3, 7).repeat(3, 1),
    "bfloat16_values": torch.randn(16, 16).bfloat16().float(),
    "complex": torch.randn(6, 4, dtype=torch.complex64),
    "complex_unitary": torch.linalg.qr(torch.randn(6, 6, dtype=torch.complex64)).Q,
    "batch": torch.stack([torch.eye(4), torch.zeros(4, 4), torch.randn(4, 4)]),
    "depthwise": torch.randn(32, 1, 9),
}
everywhere = pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)


@everywhere
def test_the_factors_are_a_singular_value_decomposition(matrix: Tensor) -> None:
    u, sigma, vh = factors.svd(matrix)
    one = torch.eye(sigma.shape[-1], dtype=u.dtype)
    torch.testing.assert_close(u.mH @ u, one.expand_as(u.mH @ u), rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.mH, one.expand_as(vh @ vh.mH), rtol=0, atol=1e-12)
    product = (u * sigma.unsqueeze(-2)) @ vh
    torch.testing.assert_close(product, matrix.to(u.dtype), rtol=0, atol=1e-7)
    expected = torch.linalg.svdvals(matrix.to(u.dtype))
    torch.testing.assert_close(sigma, expected, rtol=0, atol=1e-12)


def another_library(work: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A decomposition of the same matrix whose vectors differ in all that rounding may decide.

    Rows and columns are turned by reflections first, and back afterwards, so that values which are
    equal or zero get vectors that have nothing to do with those of the matrix as it is.
    """
    torch.manual_seed(5)

    def reflection(size: int) -> Tensor:
        x = torch.randn(size, 1, dtype=work.dtype)
        return torch.eye(size, dtype=work.dtype) - 2 * x @ x.mH / (x.mH @ x).real

    left, right = reflection(work.shape[-2]), reflection(work.shape[-1])
    u, sigma, vh = SVD(left @ work @ right, full_matrices=False)
    return left.mH @ u, sigma, vh @ right.mH


SVD = torch.linalg.svd


@everywhere
def test_another_library_gives_the_same_weight(
    matrix: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifts that differ for each singular value make the same weight with the vectors of both."""
    u, sigma, vh = factors.svd(matrix)
    shifts = torch.linspace(-1, 2, sigma.shape[-1], dtype=torch.float64)
    mine = (u * shifts) @ vh
    monkeypatch.setattr(torch.linalg, "svd", another_library)
    u, sigma, vh = factors.svd(matrix)
    # float32 precision of a weight whose shifts are of the order of one
    torch.testing.assert_close((u * shifts) @ vh, mine, rtol=0, atol=2e-7)


def test_without_the_rule_equal_values_would_differ() -> None:
    """The test above can fail: vectors as the library gives them do not make the same weight."""
    shifts = torch.linspace(-1, 2, 12, dtype=torch.float64)
    exact = torch.eye(12, dtype=torch.float64)
    (u, _, vh), (v, _, wh) = SVD(exact), another_library(exact)
    assert ((u * shifts) @ vh - (v * shifts) @ wh).abs().max() > 0.1


def test_a_state_holds_the_shifts_only() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    enable_fine_tuning(net, SVDiffAllFineTuningStrategy())
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == {
        "0.svdiff_delta": (8,),
        "2.svdiff_delta": (5,),
    }


def test_a_reload_over_equal_singular_values_is_the_same_bit_for_bit() -> None:
    base = nn.Linear(12, 12)
    nn.init.orthogonal_(base.weight)
    nets = []
    for _ in range(2):
        net = nn.Linear(12, 12)
        net.load_state_dict(base.state_dict())
        enable_fine_tuning(net, SVDiffAllFineTuningStrategy())
        nets.append(net)
    net, fresh = nets
    with torch.no_grad():
        net.svdiff_delta.copy_(torch.linspace(-0.5, 0.5, 12))
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(4, 12)
    assert torch.equal(fresh(x), net(x))
    assert not torch.allclose(net(x), base(x), atol=1e-2)


def test_a_base_that_is_loaded_later_has_its_own_factors() -> None:
    """Enable, then load a base, then a delta: as if the base had been there before."""
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    right = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    right.load_state_dict(base.state_dict())
    enable_fine_tuning(right, SVDiffAllFineTuningStrategy())
    with torch.no_grad():
        for parameter in right.parameters():
            parameter.normal_()
    late = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    enable_fine_tuning(late, SVDiffAllFineTuningStrategy())
    late.load_state_dict(base.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(late(x), base(x))
    late.load_state_dict(right.state_dict())
    assert torch.equal(late(x), right(x))


def test_a_shift_below_minus_sigma_takes_the_direction_away() -> None:
    net = nn.Linear(6, 6, bias=False)
    enable_fine_tuning(net, SVDiffAllFineTuningStrategy())
    with torch.no_grad():
        net.svdiff_delta.fill_(-100.0)
    torch.testing.assert_close(net.weight, torch.zeros(6, 6), rtol=0, atol=1e-5)


def test_a_zero_weight_can_be_trained() -> None:
    net = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(net.weight)
    enable_fine_tuning(net, SVDiffAllFineTuningStrategy())
    net(torch.randn(3, 4)).sum().backward()
    assert net.svdiff_delta.grad.abs().sum() > 0
