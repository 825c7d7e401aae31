"""LoRA, low-rank adaptation, and its rank-stabilised scaling."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.methods.base import AdaptationError, Method, dotted, register_method


@register_method
@dataclass(frozen=True)
class LoRA(Method):
    r"""Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    .. math:: W' = W_0 + \frac{\alpha}{r} B A

    For a matrix ``(rows, columns)`` it adds ``lora_B (rows, r)``, which starts at zero, and
    ``lora_A (r, columns)``, Kaiming-uniform with ``a = sqrt(5)``: the draw of ``nn.Linear`` itself,
    uniform in ``±1/sqrt(columns)``. A weight with groups has such a pair for each, with the group
    as first axis. That is ``r * (rows + columns)`` parameters for each matrix.

    Args:
        rank: `r`. None means 3, or less where a matrix is smaller.
        lora_alpha: :math:`\alpha`; None means `r`, so that the scaling is 1.
        lora_dropout: probability with which an input of the delta is dropped while training. Where
            the layer reads its weight itself (recurrent layers, attention, raw parameters) one mask
            over the input features serves the whole batch.
        use_rslora: scale by :math:`\alpha / \sqrt{r}` (Kalajdzievski 2023,
            https://arxiv.org/abs/2312.03732).
        clip_rank: give a matrix that cannot have the rank its largest one instead of refusing.
        dtype: of the factors, or its name; None means the weight's, but at least float32.

    Raises:
        ValueError: for settings out of range.
    """

    name: ClassVar[str] = "lora"
    default_rank: ClassVar[int] = 3

    rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    clip_rank: bool = False
    dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        rank, alpha, dropout = self.rank, self.lora_alpha, self.lora_dropout
        problems = []
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            problems.append(f"rank is {rank!r}, expected an integer of at least 1")
        if alpha is not None and not (_is_number(alpha) and math.isfinite(alpha)):
            problems.append(f"lora_alpha is {alpha!r}, expected a finite number or None")
        if not (_is_number(dropout) and 0 <= dropout < 1):
            problems.append(f"lora_dropout is {dropout!r}, expected a number in [0, 1)")
        dtype = _dtype(self.dtype)
        is_dtype = isinstance(dtype, torch.dtype)
        if self.dtype is not None and not (
            is_dtype and (dtype.is_floating_point or dtype.is_complex)
        ):
            problems.append(f"dtype is {self.dtype!r}, expected a floating-point torch dtype")
        if problems:
            raise ValueError("LoRA: " + "; ".join(problems))

    def fit(self, shape: tuple[int, ...]) -> Self:
        """The method with its rank settled for a matrix ``(..., rows, columns)``."""
        largest = min(shape[-2:])
        rank = self.default_rank if self.rank is None else self.rank
        if rank > largest:
            if self.rank is not None and not self.clip_rank:
                rows, columns = shape[-2:]
                raise AdaptationError(
                    f"rank {rank} is above {largest}, the largest that a matrix of "
                    f"{rows} x {columns} can have (a smaller rank, or clip_rank=True, would work)"
                )
            rank = largest
        return _of_rank(self, rank)

    @property
    def dropout(self) -> float:  # type: ignore[override]
        """The probability for `drop`."""
        return self.lora_dropout

    @property
    def scaling(self) -> float:
        """The factor before ``B A``."""
        rank = self.rank or self.default_rank
        alpha = rank if self.lora_alpha is None else self.lora_alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def meaning(self) -> dict[str, Any]:
        """Rank and scaling."""
        return {"rank": self.rank, "scaling": self.scaling}

    def delta_dtype(self, weight: Tensor) -> torch.dtype:
        """The dtype asked for, else the weight's, but at least 32 bits."""
        return super().delta_dtype(weight) if self.dtype is None else _dtype(self.dtype)

    def init(self, matrix: Tensor) -> dict[str, Tensor]:
        """``B`` zero and ``A`` random, so that the effective weight is the frozen one."""
        *groups, rows, columns = matrix.shape
        assert self.rank is not None
        like: dict[str, Any] = {"dtype": self.delta_dtype(matrix), "device": matrix.device}
        a = torch.empty(*groups, self.rank, columns, **like)
        # kaiming_uniform_(a=sqrt(5)) has this bound; called on a batch it would misread the fan-in.
        bound = 1 / math.sqrt(columns)
        return {
            "lora_B": torch.zeros(*groups, rows, self.rank, **like),
            "lora_A": a.uniform_(-bound, bound) if not a.is_complex() else _uniform(a, bound),
        }

    def weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        r""":math:`W_0 + s B A`."""
        return matrix + self.delta(parameters)

    def delta(self, parameters: Mapping[str, Tensor]) -> Tensor:
        r""":math:`s B A`."""
        return self.scaled(parameters["lora_B"]) @ parameters["lora_A"]

    def scaled(self, tensor: Tensor) -> Tensor:
        """`tensor` times the scaling, which is often 1."""
        return tensor if self.scaling == 1 else tensor * self.scaling

    def drop(self, parameters: dict[str, Tensor], input_axis: int) -> dict[str, Tensor]:
        """Drop input features: columns of ``A``, or rows of ``B`` for looked-up rows."""
        key = "lora_A" if input_axis == -1 else "lora_B"
        factor = parameters[key]
        features = factor.shape[input_axis]
        mask = F.dropout(factor.new_ones(features), self.lora_dropout)
        return parameters | {key: factor * (mask if input_axis == -1 else mask[:, None])}


@lru_cache(maxsize=512)
def _of_rank(method: Any, rank: int) -> Any:
    """One object for all weights that have the rank."""
    return replace(method, rank=rank)


def _dtype(given: torch.dtype | str | None) -> Any:
    return getattr(torch, given, None) if isinstance(given, str) else given


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _uniform(tensor: Tensor, bound: float) -> Tensor:
    torch.view_as_real(tensor).uniform_(-bound, bound)
    return tensor


# Fast paths. Each takes the place of the `forward` that it is named after.


def _side_path(input: Tensor, output: Tensor, module: Any) -> Tensor:
    """The output plus ``s B A dropout(input)``, in the delta's dtype, rounded once."""
    method, parameters = module._gift_adapters["weight"].delta_of(module)
    a, b = parameters["lora_A"], parameters["lora_B"]
    if method.lora_dropout and module.training:
        input = F.dropout(input, method.lora_dropout)
    hidden = F.linear(input.to(a.dtype), a)
    return (output + F.linear(hidden, method.scaled(b))).to(output.dtype)


def _linear(self: Any, input: Tensor) -> Tensor:
    frozen = self._gift_frozen("weight")
    return _side_path(input, F.linear(input, frozen, self.bias), self)


def _conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
    frozen = self._gift_frozen("weight")
    size = (*x.shape[:-1], self.nf)
    output = torch.addmm(self.bias, x.view(-1, x.size(-1)), frozen).view(size)
    return _side_path(x, output, self)


def _conv(self: Any, input: Tensor) -> Tensor:
    adapter = self._gift_adapters["weight"]
    if not (adapter.method.lora_dropout and self.training):
        return self._conv_forward(input, self.weight, self.bias)
    method, parameters = adapter.delta_of(self)
    delta = adapter.layout.to_weight(method.delta(parameters))
    output = self._conv_forward(input, self._gift_frozen("weight"), self.bias)
    dropped = F.dropout(input, method.lora_dropout).to(delta.dtype)
    return (output + self._conv_forward(dropped, delta, None)).to(output.dtype)


LoRA.forwards = {
    dotted(nn.Linear.forward): _linear,
    dotted(nn.Conv1d.forward): _conv,
    dotted(nn.Conv2d.forward): _conv,
    dotted(nn.Conv3d.forward): _conv,
    "transformers.pytorch_utils.Conv1D.forward": _conv1d_of_transformers,
}
