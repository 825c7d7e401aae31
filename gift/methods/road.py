"""RoAd: rotations of pairs of output features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.kernels.checkpointed import checkpointed
from gift.kernels.linear import Product, linear_forwards
from gift.methods.base import Method, of_each_weight, register_method
from gift.methods.blocks import divisors, nearest
from gift.methods.settings import choice, is_integer, setting


def _is_even(value: Any) -> bool:
    return is_integer(value) and value >= 2 and value % 2 == 0


@register_method
@dataclass(frozen=True)
class RoAd(Method):
    r"""Two-dimensional rotary adaptation (Liao and Monz 2024, https://arxiv.org/abs/2409.00119).

    .. math:: y' = R (W_0 x + b), \quad \begin{bmatrix} y'_i \\ y'_j \end{bmatrix} =
        \begin{bmatrix} \alpha \cos \theta & -\alpha \sin \theta \\
        \alpha \sin \theta & \alpha \cos \theta \end{bmatrix}
        \begin{bmatrix} y_i \\ y_j \end{bmatrix}

    Outputs are taken in groups of `g`, and each output of the first half of a group is a pair with
    one of the second half, ``j = i + g / 2``. For a matrix ``(rows, columns)`` it adds
    ``road_theta``, which starts at zero, and ``road_alpha``, which starts at one, with one entry
    for each pair, output, or output and column of the rotations: ``rows``, ``2 rows`` or ``4 rows``
    parameters. An odd number of outputs counts as if a zero followed, so that the last output of a
    weight is scaled alone. Rotated outputs include the layer's bias, so `ma_adapt` adapts the bias
    too. An infinite bias stays as it is, and its partner is not rotated.

    Args:
        variant: ``"road_1"``: both outputs of a pair share angle and scale, ``"road_2"``: each
            output has its own, ``"road_4"``: cosines and sines have their own too.
        group_size: `g`, an even number; groups get the nearest size that divides the outputs.
        dtype: dtype of angles and scales, or its name; None means the weight's, but at least
            float32. They are real for complex weights.
    """

    name: ClassVar[str] = "road"
    strategy_prefix: ClassVar[str] = "RoAd"
    conv_layouts = ("out_as_h",)
    rows_are_outputs: ClassVar[bool] = True
    scales_outputs: ClassVar[bool] = True

    variant: str = choice("road_1", "road_2", "road_4")
    group_size: int = setting(64, "an even number of at least 2", _is_even)

    def size_of_groups(self, parameters: Mapping[str, Tensor]) -> int:
        """Return the size of the groups of a weight with these parameters.

        It is not settled for a shape, as a tied weight has one method for both of its readings.
        """
        outputs = 2 * parameters["road_theta"].shape[-1] // int(self.variant[-1])
        return nearest([2 * half for half in divisors(outputs // 2)], self.group_size)

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return angles of zero and scales of one."""
        *groups, rows, _ = matrix.shape
        count = int(self.variant[-1]) * (rows + rows % 2) // 2
        dtype = self.delta_dtype(matrix).to_real()
        zeros = torch.zeros(*groups, count, dtype=dtype, device=matrix.device)
        return {"road_theta": zeros, "road_alpha": torch.ones_like(zeros)}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``R W0``."""
        # A bias that belongs to several weights has the rotations of each, one after the other.
        each = of_each_weight(parameters)
        parts = matrix.chunk(len(each), -2)
        changes = [self.change(one, own) for one, own in zip(parts, each, strict=True)]
        return matrix + torch.cat(changes, -2)

    def change(self, features: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return ``(R - I) y`` for features ``(..., rows, columns)``; infinite ones count as 0."""
        rows, half = features.shape[-2], self.size_of_groups(parameters) // 2
        finite = torch.where(features.isfinite(), features, 0)
        padded = F.pad(finite, (0, 0, 0, rows % 2))
        first, second = padded.unflatten(-2, (-1, 2, half)).unbind(-3)
        across = torch.stack([-second, first], -3).flatten(-4, -2)
        cosine, sine = (each.unsqueeze(-1) for each in self.of_outputs(parameters))
        return ((cosine - 1) * padded + sine * across)[..., :rows, :]

    def of_outputs(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return scaled cosines and sines for each output."""
        theta, alpha = parameters["road_theta"], parameters["road_alpha"]
        size = self.size_of_groups(parameters)
        if self.variant == "road_4":
            groups = [each.unflatten(-1, (-1, 2, size)) for each in (theta, alpha)]
            (theta, other), (alpha, more) = (each.unbind(-2) for each in groups)
            cosine, sine = alpha * theta.cos(), more * other.sin()
            return cosine.flatten(-2), sine.flatten(-2)
        cosine, sine = alpha * theta.cos(), alpha * theta.sin()
        if self.variant == "road_2":
            return cosine, sine
        return _of_both(cosine, size), _of_both(sine, size)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the difference of each rotation from the identity by the number."""
        theta, alpha = parameters["road_theta"], parameters["road_alpha"]
        cosine, sine = 1 + number * (alpha * theta.cos() - 1), number * alpha * theta.sin()
        if self.variant != "road_4":
            return {"road_theta": sine.atan2(cosine), "road_alpha": cosine.hypot(sine)}
        # Cosines are read from the first half of each group's entries, sines from the second.
        size = self.size_of_groups(parameters)
        of_cosine = torch.arange(theta.shape[-1], device=theta.device) % (2 * size) < size
        return {
            "road_theta": torch.where(of_cosine, 0, torch.pi / 2).expand_as(theta).to(theta.dtype),
            "road_alpha": torch.where(of_cosine, cosine, sine),
        }


def _of_both(of_pairs: Tensor, size: int) -> Tensor:
    """Repeat entries of pairs for both of their outputs."""
    halves = of_pairs.unflatten(-1, (-1, 1, size // 2))
    both: Tensor = torch.cat([halves, halves], -2).flatten(-3)
    return both


def _linear(
    method: RoAd,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``R (W0 x)`` plus the bias, which is rotated already."""
    output, tensors = product.output(x, bias), [parameters["road_theta"], parameters["road_alpha"]]

    def rotated(output: Tensor, theta: Tensor, alpha: Tensor, *bias: Tensor) -> Tensor:
        features = output.to(torch.promote_types(output.dtype, theta.dtype))
        for one in bias:
            features = features - one
        given = {"road_theta": theta, "road_alpha": alpha}
        return (output + method.change(features.unsqueeze(-1), given).squeeze(-1)).to(output.dtype)

    # The gradient of the factors needs the outputs, which no graph of a frozen layer keeps.
    tensors += [] if bias is None else [bias]
    return checkpointed(rotated, output, tensors, product.outputs, product.ways)


RoAd.forwards = linear_forwards(_linear)
