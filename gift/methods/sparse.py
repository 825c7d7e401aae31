"""Methods whose update is a transform of a few coefficients: FourierFT and WaveFT."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gift.methods.base import Method
from gift.methods.draws import entries, seeded_buffer
from gift.methods.settings import flag, number, whole


@dataclass(frozen=True)
class SparseMethod(Method):
    r"""Base class of methods with a few coefficients at entries that are drawn from a seed.

    The coefficients ``<name>_c (n,)`` start at zero. The buffer ``<name>_E (n,)`` holds their
    entries in the flattened matrix.

    Args:
        n_frequency: `n`, up to ``rows * columns``. None means `default_n_frequency`, or less for a
            smaller matrix.
        scaling: a factor of the update.
        seed: seed for the choice of the entries.
        clip_n_frequency: whether a matrix with fewer entries than `n_frequency` gets all of them
            instead of an error.
        dtype: dtype of the coefficients, or its name; None means the weight's, but at least
            float32.
    """

    size_setting: ClassVar[str | None] = "n_frequency"
    default_n_frequency: ClassVar[int]

    n_frequency: int | None = whole(None)
    scaling: float = number(1.0)
    seed: int = whole(777, least=0)
    clip_n_frequency: bool | None = flag(None, enters_weight=False, kw_only=True)

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its number of coefficients settled."""
        rows, columns = shape[-2:]
        wanted = self.default_n_frequency if self.n_frequency is None else self.n_frequency
        return self.settled(
            min(wanted, rows * columns),
            f"n_frequency {wanted} is above {rows * columns}, the entries of a matrix of "
            f"{rows} x {columns} (a smaller one, or clip_n_frequency=True, would work)",
        )

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return zero coefficients, at entries drawn from the seed."""
        assert self.n_frequency is not None
        shape = (*matrix.shape[:-2], self.n_frequency)
        size = math.prod(matrix.shape[-2:])
        return {
            f"{self.name}_c": torch.zeros(shape, **self.factory_kwargs(matrix)),
            f"{self.name}_E": seeded_buffer(entries, self.seed, shape, size, device=matrix.device),
        }

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Multiply the coefficients by the number."""
        coefficients = f"{self.name}_c"
        return {**parameters, coefficients: parameters[coefficients] * number}
