"""C3A: circular convolutions, whose matrices are circulant."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gift.kernels.checkpointed import checkpointed
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.merged_linear import through_weight
from gift.methods.base import Method, register_method, with_settings
from gift.methods.blocks import divisors, nearest
from gift.methods.settings import whole


@register_method
@dataclass(frozen=True)
class C3A(Method):
    r"""Circular convolution adaptation (Chen et al. 2024, https://arxiv.org/abs/2407.19342).

    .. math:: W' = W_0 + \frac{1}{d} \begin{bmatrix} C(w_{11}) & \cdots & C(w_{1n}) \\
        \vdots & & \vdots \\ C(w_{m1}) & \cdots & C(w_{mn}) \end{bmatrix}, \quad
        C(w)_{t,q} = w_{(q - t) \bmod b}

    Each block of the update is circulant, and so of full rank as a rule. For a matrix ``(rows,
    columns)`` it adds ``c3a_w (rows / b, columns / b, b)``, the first rows of the blocks, which
    start at zero. That is ``rows * columns / b`` parameters. `d` is the number of columns, by which
    PEFT and the authors' code divide.

    A linear layer with blocks of at least 16 multiplies in the frequency domain, in float32 or
    better, and makes neither a weight nor a gradient of its size.

    Args:
        block_size: `b`; a matrix gets the nearest size that divides both its rows and columns. None
            means the largest such size, which has the fewest parameters. If only 1 divides both,
            the update has one parameter for each element of the matrix.
        dtype: dtype of `w`, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "c3a"
    strategy_prefix: ClassVar[str] = "C3A"
    shows_matrix: ClassVar[bool] = True

    block_size: int | None = whole(None, found=True)

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its block size settled for a matrix ``(..., rows, columns)``."""
        rows, columns = shape[-2:]
        common = math.gcd(rows, columns)
        size = nearest(divisors(common), self.block_size or common)
        fitted: Self = with_settings(self, block_size=size)
        return fitted

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return zero kernels."""
        *groups, rows, columns = matrix.shape
        size = self.block_size
        assert size is not None
        blocks = rows // size, columns // size
        return {"c3a_w": torch.zeros(*groups, *blocks, size, **self.factory_kwargs(matrix))}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute ``W0 + C(w) / d``."""
        kernels = parameters["c3a_w"] / matrix.shape[-1]
        step = torch.arange(kernels.shape[-1], device=kernels.device)
        blocks = kernels[..., (step - step[:, None]) % len(step)]  # (m, n, t, q)
        return matrix + blocks.transpose(-3, -2).reshape(matrix.shape)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the kernels by the number."""
        return {"c3a_w": parameters["c3a_w"] * number}


_LEAST = 16  # blocks below which a transform costs more than the weight


def _linear(
    method: C3A,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Compute ``W0 x + bias`` plus the circular correlations of ``x`` with the kernels."""
    kernels = parameters["c3a_w"]
    if kernels.shape[-1] < _LEAST or kernels.is_complex():
        return through_weight(method, parameters, x, product, bias)
    output = product.output(x, bias)
    change = checkpointed(_correlations, x, [kernels], product.outputs, product.ways)
    return (output + change).to(output.dtype)


def _correlations(x: Tensor, kernels: Tensor) -> Tensor:
    """Compute the sums of circular correlations of blocks of ``x`` with the kernels."""
    size = kernels.shape[-1]
    dtype = torch.promote_types(kernels.dtype, torch.float32)  # no transform of 16 bits
    inputs = torch.fft.rfft(x.to(dtype).unflatten(-1, (-1, size)))
    filters = torch.fft.rfft(kernels.to(dtype) / x.shape[-1]).conj()
    change = torch.fft.irfft(torch.einsum("...nk,mnk->...mk", inputs, filters), n=size)
    joined: Tensor = change.flatten(-2)
    return joined


C3A.forwards = linear_forwards(_linear)
