"""Trainable tokens: some rows of an embedding, trained as they are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.errors import AdaptationError
from gift.kernels.linear import Product, linear_forwards
from gift.layers.table import forwards_of
from gift.methods.base import Method, register_method
from gift.methods.settings import flag, is_integer, setting

Rows = str | int | Iterable[int]


def _is_rows(value: object) -> bool:
    try:
        return bool(_ranges(value))
    except (ValueError, TypeError, AttributeError):
        return False


def _ranges(value: Any) -> list[tuple[int, int]]:
    """Return the first and last row of each range in a text, in ascending order."""
    found: list[tuple[int, int]] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        pair = int(first), int(last if dash else first)
        if not 0 <= pair[0] <= pair[1] or (found and pair[0] <= found[-1][1]):
            raise ValueError(f"{part!r} is not a range after the one before it")
        found.append(pair)
    return found


def rows_as_text(rows: Rows) -> Any:
    """Return rows as a text of ranges, such as ``3,7,32000-32009``; wrong ones stay as they are."""
    if isinstance(rows, str):
        return rows
    listed: list[Any] = [rows] if isinstance(rows, int) else list(rows)
    if not listed or not all(is_integer(row) and row >= 0 for row in listed):
        return listed
    ranges: list[list[int]] = []
    for row in sorted(set(listed)):
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


@register_method
@dataclass(frozen=True)
class TrainableTokens(Method):
    r"""Rows of a matrix that are trained, all others frozen (PEFT's trainable tokens).

    .. math:: W'_i = W_{0,i} + T_i \text{ for the chosen rows } i, \qquad
        W'_i = W_{0,i} \text{ otherwise}

    For an embedding, rows are tokens. A head that is tied to it has the same rows. For a matrix
    ``(rows, columns)`` it adds ``tokens_T (k, columns)`` for `k` chosen rows, which starts at zero:
    ``k * columns`` parameters. A buffer ``tokens_R (k,)`` has their numbers; it is not saved.

    Rows that ``resize_token_embeddings`` added start at numbers that no checkpoint has. With
    ``new=True`` a buffer ``tokens_S (k, columns)`` has their start, which takes the place of
    :math:`W_{0,i}` and is saved with the delta. `gift.load` then does not compare these rows. (A
    head computes them apart, so its outputs at the start are equal up to rounding.)

    Args:
        rows: the rows: numbers, a `range`, or a text such as ``"3,7,32000-32009"``, which it
            becomes.
        new: whether the start of these rows is saved with the delta.
        dtype: dtype of the rows, or its name; None means the weight's, but at least float32.
    """

    name: ClassVar[str] = "trainable_tokens"
    strategy_prefix: ClassVar[str] = "TrainableTokens"

    rows: str = setting("0", "numbers of at least 0, or a text such as '3,7-9'", _is_rows)
    new: bool = flag()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", rows_as_text(self.rows))
        super().__post_init__()

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        """Whether the start of the rows is copied."""
        return self.new

    @property
    def numbers(self) -> list[int]:
        """The chosen rows in ascending order."""
        return [row for first, last in _ranges(self.rows) for row in range(first, last + 1)]

    @property
    def replaced_rows(self) -> list[int]:  # type: ignore[override]
        """The rows whose frozen values do not matter."""
        return self.numbers if self.new else []

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method, if the matrix has these rows."""
        *_, (_, last) = _ranges(self.rows)
        if last >= shape[-2]:
            raise AdaptationError(f"it has {shape[-2]} rows, there is no row {last}")
        return self

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return zeros for the chosen rows."""
        numbers = torch.tensor(self.numbers, device=matrix.device)
        rows = numbers.expand(*matrix.shape[:-2], -1).clone()
        like = self.factory_kwargs(matrix)
        shape = (*rows.shape, matrix.shape[-1])
        made = {
            "tokens_T": torch.zeros(shape, **like),
            "tokens_R": nn.Buffer(rows, persistent=False),
        }
        if self.new:
            start = matrix.detach().index_select(-2, numbers).to(**like)
            made["tokens_S"] = nn.Buffer(start.clone())
        return made

    def rows_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the chosen rows if their start is kept, else what they have more."""
        change = parameters["tokens_T"]
        return parameters["tokens_S"] + change if self.new else change

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix with the trained rows."""
        rows, places = self.rows_of(parameters).to(matrix.dtype), parameters["tokens_R"]
        places = places.unsqueeze(-1).expand(rows.shape)
        return (
            matrix.scatter(-2, places, rows) if self.new else matrix.scatter_add(-2, places, rows)
        )

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the differences by the number."""
        return {**parameters, "tokens_T": parameters["tokens_T"] * number}


def _linear(
    method: TrainableTokens,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    product: Product,
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Add what the chosen rows give more to the outputs of the frozen matrix, or replace these."""
    output = product.output(x, bias)
    rows, places = method.rows_of(parameters), parameters["tokens_R"]
    own = F.linear(x.to(rows.dtype), rows)
    if method.new:
        own = own if bias is None else own + bias[places]
        return output.index_copy(-1, places, own.to(output.dtype))
    kind = torch.promote_types(output.dtype, own.dtype)
    return output.to(kind).index_add(-1, places, own.to(kind)).to(output.dtype)


def _lookup(self: Any, input: Tensor) -> Tensor:
    """Look up rows of the frozen matrix, and add what the chosen ones have more."""
    delta: Any = getattr(self, "_gift_weights", {}).get("weight")
    usual = self.max_norm is None and not self.scale_grad_by_freq
    if delta is None or not usual or not delta.layout.is_trivial or delta.mesh_axes:
        plain = getattr(type(self), "_gift_plain", type(self))
        found: Tensor = plain.forward(self, input)
        return found
    method, parameters = delta.delta_of(self)
    places, rows = parameters["tokens_R"], method.rows_of(parameters)
    if self.padding_idx is not None:  # its row gets no gradient
        rows = torch.where((places == self.padding_idx)[:, None], rows.detach(), rows)
    frozen = F.embedding(input, self._gift_frozen("weight"), self.padding_idx)
    number = torch.searchsorted(places, input.contiguous()).clamp(max=len(places) - 1)
    own = F.embedding(number, rows)
    if not method.new:
        own = frozen.to(torch.promote_types(frozen.dtype, own.dtype)) + own
    return torch.where((places[number] == input)[..., None], own.to(frozen.dtype), frozen)


TrainableTokens.forwards = linear_forwards(_linear) | dict.fromkeys(
    forwards_of("embedding"), _lookup
)
