"""Random chains of operations between layers whose rows differ: right, or refused."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.test_bank_rows import bank_of, lora
from tests.test_bank_rows_ways import NAMES, constant, outcome

Step = Callable[[Tensor, Tensor, int], Tensor]  # of two tensors and any number


def turned(size: int, p: int) -> Tensor:
    return torch.arange(size).roll(p)


def axis(x: Tensor, p: int) -> int:
    return p % max(x.ndim, 1)


def put(x: Tensor, p: int, write: Callable[[Tensor], Any]) -> Tensor:
    x = x.clone()
    write(x)
    return x


def view_written(x: Tensor, y: Tensor, p: int) -> Tensor:
    x = x.clone()
    x.narrow(axis(x, p), 0, 1).copy_(y.narrow(axis(y, p), -1, 1))
    return x


def set_in_zeros(x: Tensor, y: Tensor, p: int) -> Tensor:
    zeros = torch.zeros(x.shape, dtype=x.dtype)
    zeros[(*[slice(None)] * axis(x, p), turned(x.shape[axis(x, p)], p // 7))] = y
    return zeros


def both(x: Tensor, y: Tensor, p: int) -> Tensor:
    return torch.einsum(
        ("bi,bj->bij", "ij,kj->ik", "bij,bjk->bik", "ij,jk->ki", "...i,i...->...")[p % 5], x, y
    )


STEPS: dict[str, Step] = {
    "sin": lambda x, y, p: x.sin(),
    "add": lambda x, y, p: x + y,
    "where": lambda x, y, p: torch.where(x > 0, x, y),
    "add_in_place": lambda x, y, p: x.clone().add_(y),
    "constant": lambda x, y, p: x + constant(*x.shape),
    "small_constant": lambda x, y, p: x * constant(x.shape[-1]),
    "cat": lambda x, y, p: torch.cat([x, y], axis(x, p)),
    "stack": lambda x, y, p: torch.stack([x, y], p % (x.ndim + 1)),
    "transpose": lambda x, y, p: x.transpose(axis(x, p), axis(x, p // 5)),
    "to_last": lambda x, y, p: x.movedim(axis(x, p), -1),
    "flatten": lambda x, y, p: x.flatten(p % (x.ndim - 1), p % (x.ndim - 1) + 1),
    "unflatten": lambda x, y, p: x.unflatten(axis(x, p), (-1, 2 + p % 2)),
    "view_as": lambda x, y, p: x.reshape(y.shape),
    "unsqueeze": lambda x, y, p: x.unsqueeze(p % (x.ndim + 1)),
    "squeeze": lambda x, y, p: x.squeeze(),
    "flip": lambda x, y, p: x.flip(axis(x, p)),
    "roll": lambda x, y, p: x.roll(1, axis(x, p)),
    "softmax": lambda x, y, p: x.softmax(axis(x, p)),
    "cumsum": lambda x, y, p: x.cumsum(axis(x, p)),
    "sort": lambda x, y, p: x.sort(axis(x, p)).values,
    "ranks": lambda x, y, p: y.gather(axis(x, p), x.argsort(axis(x, p))),
    "sum": lambda x, y, p: x.sum(axis(x, p)),
    "mean": lambda x, y, p: x.mean(axis(x, p), keepdim=True),
    "largest": lambda x, y, p: x.max(axis(x, p)).values,
    "select": lambda x, y, p: x.select(axis(x, p), p // 5 % x.shape[axis(x, p)]),
    "first_of_two": lambda x, y, p: x.chunk(2, axis(x, p))[p // 5 % 2],
    "narrow": lambda x, y, p: x.narrow(axis(x, p), 1, x.shape[axis(x, p)] - 1),
    "every_second": lambda x, y, p: x[(*[slice(None)] * axis(x, p), slice(p // 5 % 2, None, 2))],
    "index_select": lambda x, y, p: x.index_select(axis(x, p), turned(x.shape[axis(x, p)], p // 5)),
    "index": lambda x, y, p: x[(*[slice(None)] * axis(x, p), turned(x.shape[axis(x, p)], p // 5))],
    "two_indices": lambda x, y, p: x[turned(min(x.shape[:2]), p), turned(min(x.shape[:2]), p // 5)],
    "index_apart": lambda x, y, p: x[turned(2, p), :, turned(2, p // 5)],
    "index_grid": lambda x, y, p: x[torch.arange(x.shape[0])[:, None], turned(x.shape[1], p)],
    "expand": lambda x, y, p: x.unsqueeze(axis(x, p)).expand(
        *x.shape[: axis(x, p)], 3, *x.shape[axis(x, p) :]
    ),
    "repeat": lambda x, y, p: x.repeat([2 if a == axis(x, p) else 1 for a in range(x.ndim)]),
    "interleave": lambda x, y, p: x.repeat_interleave(2, axis(x, p)),
    "matmul": lambda x, y, p: x @ y,
    "matmul_transposed": lambda x, y, p: x @ y.mT,
    "einsum": both,
    "by_constant": lambda x, y, p: constant(x.shape[-2], x.shape[-2]) @ x,
    "layer_norm": lambda x, y, p: F.layer_norm(x, x.shape[axis(x, p) :]),
    "attention": lambda x, y, p: F.scaled_dot_product_attention(x, y, y),
    "conv": lambda x, y, p: F.conv1d(x, constant(4, x.shape[1], 1)),
    "pool": lambda x, y, p: F.avg_pool1d(x, 2),
    "normalize": lambda x, y, p: F.normalize(x, dim=axis(x, p)),
    "unbound": lambda x, y, p: torch.stack(
        x.unbind(axis(x, p))[:: 1 if p % 2 else -1], p // 7 % x.ndim
    ),
    "index_add": lambda x, y, p: torch.zeros_like(x).index_add(
        axis(x, p), turned(x.shape[axis(x, p)], p // 5), y
    ),
    "set": lambda x, y, p: put(x, p, lambda z: z.__setitem__(p % len(x), y[p // 5 % len(y)])),
    "set_all": set_in_zeros,
    "masked": lambda x, y, p: x.masked_fill(y > 0, 0.5),
    "set_where": lambda x, y, p: put(x, p, lambda z: z.__setitem__(y > 0, 0.5)),
    "through_a_view": view_written,
    "scatter": lambda x, y, p: torch.zeros_like(x).scatter(axis(x, p), x.argsort(axis(x, p)), y),
    "diagonal": lambda x, y, p: x.diagonal(0, axis(x, p), axis(x, p // 5)),
    "pad": lambda x, y, p: F.pad(x, (1, 0, *[0, p % 2] * (p % 3))),
    "strided": lambda x, y, p: (
        x.as_strided(x.shape, x.stride()[::-1]) if p % 2 else x.as_strided(x.shape, x.stride())
    ),
}


@dataclass(frozen=True)
class Taken:
    """A step, which two of the tensors until now it takes, and its number."""

    name: str
    first: int
    second: int
    number: int


class Chain(nn.Module):
    """Steps between layers, which are skipped where they do not fit; every third has a layer."""

    def __init__(self, steps: list[Taken]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        known = [self.layers[0](x)]
        for number, step in enumerate(self.steps):
            one, other = (known[-1 - place % len(known)] for place in (step.first, step.second))
            try:
                made = STEPS[step.name](one, other, step.number)
            except (RuntimeError, IndexError, TypeError, ZeroDivisionError):
                continue
            if 0 < made.numel() < 2000 and made.ndim < 6:
                if number % 3 == 2 and made.ndim and made.shape[-1] == 4:
                    made = self.layers[1](made)
                known.append(made)
        last = known[-1]
        return self.layers[2](
            last if last.ndim and last.shape[-1] == 4 else last[..., None].expand(*last.shape, 4)
        )


CHAINS = st.lists(
    st.builds(
        Taken, st.sampled_from(sorted(STEPS)), st.integers(0, 2), st.integers(0, 3),
        st.integers(0, 60),
    ),
    min_size=1, max_size=7,
)  # fmt: skip


@settings(max_examples=int(os.environ.get("GIFT_EXAMPLES", 40)), deadline=None, derandomize=True)
@given(CHAINS, st.sampled_from([(3, 4), (3, 5, 4), (4, 4, 4), (3, 3, 2, 4)]), st.integers(0, 99))
def test_a_chain_of_operations_is_right_or_refused(
    steps: list[Taken], shape: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    bank = bank_of(Chain(steps).double(), a=lora(), b=lora(2))
    names: list[str | None] = [*NAMES, "a"][: shape[0]]
    outcome(bank, torch.randn(shape).double(), names)
