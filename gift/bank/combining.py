"""Combine several deltas into one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from gift.bank.changes import Change, Changes, changes_of, trained_values
from gift.core.delta import put_values
from gift.core.undo.undo import tensor_of
from gift.core.undo.unload import UnloadedDelta
from gift.core.weights.record import weight_deltas
from gift.engine.enable import enabling_trained
from gift.errors import AdaptationError, refuse
from gift.layers.layouts import Layout, LayoutOptions
from gift.layers.table import layout_of
from gift.methods import LoRA
from gift.methods.settings import is_integer, is_number
from gift.strategies.resolved import ResolvedStrategy, group_of
from gift.support.tensors import dtype_name, is_inexact, wide


@dataclass(frozen=True)
class Combination:
    """The ranks and errors of a combined delta; prints as a table.

    Args:
        ranks: rank of each weight that it changes, by path.
        errors: relative error of each weight's change against the exact sum, in the Frobenius norm.
        error: relative error of all changes together.
    """

    ranks: dict[str, int]
    errors: dict[str, float]
    error: float

    def __str__(self) -> str:
        rows = [(n, str(rank), f"{self.errors[n]:.2e}") for n, rank in self.ranks.items()]
        rows.append(("all", "", f"{self.error:.2e}"))
        return tabulate(rows, headers=["weight", "rank", "error"], disable_numparse=True)


def combine(
    net: nn.Module,
    deltas: Mapping[str, Any],
    weights: Mapping[str, float],
    rank: int | None,
) -> tuple[UnloadedDelta, Combination]:
    """Return the weighted sum of deltas as a LoRA, unloaded from the base `net`."""
    _check(weights, rank)
    read = {name: changes_of(net, delta, dense=rank is not None) for name, delta in deltas.items()}
    problems = [f"{name}: {what}" for name, changes in read.items() for what in changes.foreign]
    parts: dict[str, list[tuple[float, Change]]] = {}
    for name, changes in read.items():
        for change in changes.weights.values():
            parts.setdefault(change.name, []).append((weights[name], change))
    trained = list(dict.fromkeys(name for c in read.values() for name in trained_values(c)))
    whole = {path: parts.pop(path) for path in trained if path in parts}
    if rank is None:
        problems += [
            f"{path} is changed by a method whose delta has no factors: give a rank"
            for path, terms in (parts | whole).items()
            if any(change.factors is None for _, change in terms)
        ]
    refuse(AdaptationError, "the deltas cannot be summed", problems)
    modules = dict(net.named_modules())
    sums = {
        path: low_rank_sum(modules[path.rpartition(".")[0]], terms, rank)
        for path, terms in parts.items()
    }
    values = summed_values(read, weights, whole)
    strategy = ResolvedStrategy([group_for(path, made) for path, made in sums.items()], trained)
    with enabling_trained(net, strategy):
        fill(net, sums, values)
        combination = combination_of(sums)
        return UnloadedDelta(net), combination


def _check(weights: Mapping[str, float], rank: int | None) -> None:
    wrong = {name: weight for name, weight in weights.items() if not is_number(weight)}
    if wrong or not weights:
        raise ValueError(f"expected finite numbers by name, got {wrong or 'none'}")
    check_rank(rank)


def check_rank(rank: int | None) -> None:
    """Raise a ValueError unless a rank is None or at least 1."""
    if rank is not None and not (is_integer(rank) and rank >= 1):
        raise ValueError(f"rank is {rank!r}, expected an integer of at least 1 or None")


@dataclass(frozen=True)
class LowRankSum:
    """A sum of changes in low-rank form.

    Args:
        options, layout: how LoRA reads the weight.
        left, right: the factors, in double precision.
        dtype: dtype of the delta.
        lost: squared norm of the truncated part.
    """

    options: LayoutOptions
    layout: Layout
    left: Tensor
    right: Tensor
    dtype: torch.dtype
    lost: float = 0.0

    @property
    def square(self) -> float:
        """The squared norm of the whole sum."""
        kept = (self.left.mH @ self.left) * (self.right @ self.right.mH).mT
        return float(kept.sum().real) + self.lost


def low_rank_sum(
    module: nn.Module, terms: list[tuple[float, Change]], rank: int | None
) -> LowRankSum:
    """Concatenate factors, or find the best approximation of that rank; groups share a rank."""
    first = terms[0][1]
    options = first.options.settled(LoRA.conv_layouts, LoRA.rows_are_outputs)
    layout = layout_of(
        module, first.name.rpartition(".")[2], torch.Size(first.layout.shape), options
    )
    dtype = reduce(torch.promote_types, (change.dtype for _, change in terms))
    factors = [pair for _, change in terms if (pair := _factors(change, layout)) is not None]
    if len(factors) == len(terms):
        left = torch.cat([w * wide(b) for (w, _), (b, _) in zip(terms, factors, strict=True)], -1)
        right = torch.cat([wide(a) for _, a in factors], -2)
        largest = min(layout.matrix[-2:])
        rank = min(rank or largest, largest)
        if rank >= left.shape[-1]:
            return LowRankSum(options, layout, left, right, dtype)
    else:  # others read the same weight as another matrix
        parts = [weight * change.layout.to_weight(change.dense()) for weight, change in terms]
        left = layout.to_matrix(torch.stack(parts).sum(0))
        right = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
        right = right.expand(*left.shape[:-2], -1, -1)
    left, right, lost = _compressed(left, right, rank)
    return LowRankSum(options, layout, left, right, dtype, lost)


def _factors(change: Change, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """Return a change's factors in that layout; None if they belong to another matrix."""
    own = change.layout
    if change.factors is None or (own.view, own.order, own.matrix) == (
        layout.view, layout.order, layout.matrix
    ):  # fmt: skip
        return change.factors
    if own.view == layout.view and len(own.view) == 2:  # transposed
        left, right = change.factors
        return right.mT, left.mT
    return None


def _compressed(left: Tensor, right: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Return the best low-rank approximation of a product, by the SVD of a small matrix.

    A rank of None keeps everything above rounding errors. The right factor has no zero rows, so
    that a zero product can still be trained.
    """
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.mT)
    u, sigma, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    if rank is None:
        rank = max(1, int((sigma > 1e-13 * sigma.amax()).sum(-1).max()))
    made_left = q1 @ (u[..., :, :rank] * sigma[..., None, :rank])
    made_right = vh[..., :rank, :] @ q2.mT
    return made_left, made_right, float(sigma[..., rank:].square().sum())


def group_for(path: str, made: LowRankSum) -> dict[str, Any]:
    """Describe a LoRA of one weight, as `ResolvedStrategy` takes it."""
    method = LoRA(rank=made.left.shape[-1], dtype=dtype_name(made.dtype))
    return group_of(method, made.options) | {"tensors": {path: list(made.layout.matrix)}}


def summed_values(
    read: Mapping[str, Changes],
    weights: Mapping[str, float],
    whole: Mapping[str, list[tuple[float, Change]]],
) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Return trained parameters and buffers: the base plus the weighted differences.

    Args:
        read: the changes of each delta.
        weights: the weight of each delta.
        whole: weighted changes of parameters that other deltas train as they are.
    """
    made: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for name, changes in read.items():
        for path, (module, own, base, now) in changes.values.items():
            *_, value = made.get(path, (module, own, wide(base) if is_inexact(base) else base))
            if is_inexact(base):
                value = value + weights[name] * (wide(now) - wide(base))
            made[path] = module, own, value
    for path, terms in whole.items():
        place = terms[0][1]
        base = wide(tensor_of(place.module, place.tensor))
        *_, value = made.get(path, (place.module, place.tensor, base))
        for weight, change in terms:
            value = value + weight * change.layout.to_weight(change.dense())
        made[path] = place.module, place.tensor, value
    wrong = [
        path for path, (*_, v) in made.items() if path.endswith("running_var") and (v < 0).any()
    ]
    if wrong:
        raise ValueError(f"with these numbers, variances would be negative: {wrong}")
    return made


def fill(net: nn.Module, sums: Mapping[str, LowRankSum], values: Mapping[str, Any]) -> None:
    """Write factors into the LoRAs of a network, and values into other tensors.

    Args:
        net: the network.
        sums: factors by the path of the weight.
        values: for each path, the module, the name there and the value.
    """
    paths = dict(net.named_modules())
    for path, made in sums.items():
        holder, _, tensor = path.rpartition(".")
        module = paths[holder]
        names = weight_deltas(module)[tensor].names
        put_values(module, {names["lora_B"]: made.left, names["lora_A"]: made.right})
    for module, name, value in values.values():
        put_values(module, {name: value})


def combination_of(sums: Mapping[str, LowRankSum]) -> Combination:
    """Return the ranks and errors of changes."""
    squares, losses = sum(s.square for s in sums.values()), sum(s.lost for s in sums.values())
    return Combination(
        ranks={path: made.left.shape[-1] for path, made in sums.items()},
        errors={path: _root(made.lost, made.square) for path, made in sums.items()},
        error=_root(losses, squares),
    )


def _root(lost: float, square: float) -> float:
    return (lost / square) ** 0.5 if square else 0.0
