"""Give several low-rank deltas one form: the same weights, ranks and scalings."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import nn

from gift.bank.changes import Change, changes_of, trained_values
from gift.bank.combining import (
    LowRankSum,
    check_rank,
    fill,
    group_for,
    low_rank_sum,
    summed_values,
)
from gift.core.undo.unload import UnloadedDelta
from gift.engine.enable import enabling_trained
from gift.errors import AdaptationError, refuse
from gift.strategies.resolved import ResolvedStrategy


def padded(net: nn.Module, deltas: Mapping[str, Any], rank: int | None) -> dict[str, UnloadedDelta]:
    """Return low-rank deltas as LoRAs of the same weights with the same ranks, unloaded from `net`.

    What a delta lacks is zero: columns and rows of factors, and changes of weights that others
    change. A scaling becomes a part of the first factor.
    """
    check_rank(rank)
    read = {name: changes_of(net, delta, dense=False) for name, delta in deltas.items()}
    problems = [f"{name}: {what}" for name, changes in read.items() for what in changes.foreign]
    problems += [
        f"{name}: {path} is changed by a method whose delta has no factors"
        for name, changes in read.items()
        for path, change in changes.weights.items()
        if change.factors is None
    ]
    refuse(AdaptationError, "the deltas cannot be padded", problems)
    trained = list(dict.fromkeys(name for c in read.values() for name in trained_values(c)))
    modules = dict(net.named_modules())
    sums: dict[str, dict[str, LowRankSum]] = {name: {} for name in deltas}
    whole: dict[str, dict[str, list[tuple[float, Change]]]] = {name: {} for name in deltas}
    for name, changes in read.items():
        for change in changes.weights.values():
            if change.name in trained:
                whole[name][change.name] = [(1.0, change)]
            else:
                module = modules[change.name.rpartition(".")[0]]
                sums[name][change.name] = low_rank_sum(module, [(1.0, change)], None)
    forms = _forms(sums, rank)
    made = {}
    for name, own in sums.items():
        full = {path: _in_form(own.get(path), form) for path, form in forms.items()}
        values = summed_values({name: read[name]}, {name: 1.0}, whole[name])
        groups = [group_for(path, one) for path, one in full.items()]
        with enabling_trained(net, ResolvedStrategy(groups, trained)):
            fill(net, full, values)
            made[name] = UnloadedDelta(net)
    return made


def _forms(sums: Mapping[str, Mapping[str, LowRankSum]], rank: int | None) -> dict[str, LowRankSum]:
    """Return a change of zero for each weight, of the rank and the dtype that fit all deltas."""
    found: dict[str, dict[str, LowRankSum]] = {}
    for name, own in sums.items():
        for path, one in own.items():
            found.setdefault(path, {})[name] = one
    forms, problems = {}, []
    for path, by_name in found.items():
        (first, form), *_ = by_name.items()
        ranks = {name: one.left.shape[-1] for name, one in by_name.items()}
        wanted = min(rank or max(ranks.values()), *form.layout.matrix[-2:])
        for name, one in by_name.items():
            if ranks[name] > wanted:
                problems.append(f"{name}: {path} has rank {ranks[name]}, expected {wanted} or less")
            if (one.layout.matrix, one.layout.order) != (form.layout.matrix, form.layout.order):
                problems.append(f"{path} is one matrix in {first} and another one in {name}")
        left, right = form.left, form.right
        forms[path] = replace(
            form,
            left=left.new_zeros(*left.shape[:-1], wanted),
            right=right.new_zeros(*right.shape[:-2], wanted, right.shape[-1]),
            dtype=reduce(torch.promote_types, (one.dtype for one in by_name.values())),
            lost=0.0,
        )
    refuse(AdaptationError, "the deltas cannot be padded", problems)
    return forms


def _in_form(own: LowRankSum | None, form: LowRankSum) -> LowRankSum:
    """Return a change with the rank of a form, to which zeros are added."""
    if own is None:
        return form
    left, right = form.left.clone(), form.right.clone()
    left[..., : own.left.shape[-1]] = own.left
    right[..., : own.right.shape[-2], :] = own.right
    return replace(form, left=left, right=right)
