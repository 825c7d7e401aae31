"""SSF: scaling and shifting the outputs of layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.kernels.conv_layers import conv_forwards
from gift.kernels.linear import Product, linear_forwards
from gift.kernels.output_scales import scaled_conv, scaled_linear
from gift.methods.base import Method, of_each_weight, register_method


@register_method
@dataclass(frozen=True)
class SSF(Method):
    r"""Scaling and shifting features (Lian et al. 2022, https://arxiv.org/abs/2210.08823).

    .. math:: y' = \gamma \odot (W_0 x + b) + \beta

    For a matrix ``(rows, columns)`` it adds ``ssf_gamma (rows, 1)``, one factor for each output,
    which starts at one, and for the layer's bias ``ssf_beta (rows, 1)``, which starts at zero. That
    is ``2 rows`` parameters, or `rows` for a layer without bias, which has nothing that could be
    shifted; nor has `pa_adapt`, which changes only the parameter that it is given. The paper starts
    both with noise of deviation 0.02 around these values.

    Args:
        dtype: dtype of factors and shifts, or its name; None means the weight's, but at least
            float32.
    """

    name: ClassVar[str] = "ssf"
    strategy_prefix: ClassVar[str] = "SSF"
    shows_matrix: ClassVar[bool] = True
    conv_layouts = ("out_as_h",)
    rows_are_outputs: ClassVar[bool] = True
    scales_outputs: ClassVar[bool] = True
    split_axes = {"ssf_gamma": (0, None), "ssf_beta": (0, None)}

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return factors that are all one."""
        shape = (*matrix.shape[:-1], 1)
        return {"ssf_gamma": torch.ones(shape, **self.factory_kwargs(matrix))}

    def init_bias_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return shifts that are all zero."""
        shape = (*matrix.shape[:-1], 1)
        return {"ssf_beta": torch.zeros(shape, **self.factory_kwargs(matrix))}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Multiply rows by their factors."""
        return matrix * parameters["ssf_gamma"]

    def effective_bias(self, bias: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Scale and shift."""
        each = of_each_weight(parameters)
        gamma, beta = (
            torch.cat([own[key] for own in each], -2) for key in ("ssf_gamma", "ssf_beta")
        )
        return bias * gamma + beta

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the factors' distance from one, and the shifts, by the number."""
        made = {"ssf_gamma": 1 + number * (parameters["ssf_gamma"] - 1)}
        if "ssf_beta" in parameters:
            made["ssf_beta"] = parameters["ssf_beta"] * number
        return made


def _linear(
    method: SSF,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Scale activations."""
    return scaled_linear(x, product, bias, parameters["ssf_gamma"])


def _conv(self: Any, input: Tensor) -> Tensor:
    """Scale channels."""
    _, parameters = self._gift_weights["weight"].delta_of(self)
    return scaled_conv(self, input, parameters["ssf_gamma"])


SSF.forwards = linear_forwards(_linear) | conv_forwards(_conv)
