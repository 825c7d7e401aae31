"""Extract a LoRA from a network that was fine-tuned whole."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gift.bank.combining import Combination, LowRankSum, combination_of, fill, group_for
from gift.core.dynamic_class import joined, spec_of
from gift.core.state import whole_state
from gift.engine.enable import enabling_trained
from gift.errors import AdaptationError, refuse, some
from gift.layers.layouts import LayoutOptions
from gift.layers.table import layout_of
from gift.methods import LoRA
from gift.methods.settings import is_integer, is_number
from gift.quantization import dequantised, is_quantised, shape_of
from gift.strategies.resolved import ResolvedStrategy
from gift.support.tensors import is_inexact, wide

_REFUSED = "no LoRA can be extracted, the network is unchanged"


def extract(
    base: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor],
    rank: int | None = None,
    error: float | None = None,
    iterations: int | None = None,
) -> Combination:
    r"""Fine-tune `base` by a LoRA that turns it into `tuned`, as well as its rank allows.

    For each weight, the factors are the truncated singular value decomposition of the difference,
    which is the best approximation of that rank in the Frobenius norm:

    .. math:: W_{\text{tuned}} - W_0 \approx B A, \quad
        B = U_r \Sigma_r^{1/2}, \quad A = \Sigma_r^{1/2} V_r^H

    Convolutions are read as matrices as LoRA reads them. What differs and has no use for factors
    (biases, norms, weights that are not larger than their factors would be) is trained in place and
    gets the tuned values, as do buffers. Weights that are equal get no delta. Afterwards `base` is
    an ordinary fine-tuned network: it can be trained further, saved, and exported.

    Args:
        base: the plain base network; it is changed in place. It may be quantised.
        tuned: a network of the same architecture, or its whole ``state_dict()``.
        rank: the rank of each weight, or less for weights that need less.
        error: instead, the largest relative error of each weight's change, between 0 and 1; each
            weight gets the smallest rank that keeps it.
        iterations: None decomposes exactly, in double precision: for a matrix of 4096 times 4096
            about a minute on a processor. A number computes the largest singular vectors alone, by
            a randomised method with so many power iterations (Halko et al. 2011,
            https://arxiv.org/abs/0909.4061), in a hundredth of the time. 4 are usually enough.

    Returns:
        The rank and the relative error of each weight, in the Frobenius norm; it prints as a table.
        Errors are those of what was stored, whatever the method.

    Raises:
        ValueError: if not exactly one of `rank` and `error` is given, or one is out of range.
        RuntimeError: if `base` is being fine-tuned.
        AdaptationError: naming everything that `tuned` lacks or has in another shape, or that has
            no finite values, or if both are equal.

    Example:
        >>> import gift, torch
        >>> from torch import nn
        >>> base, tuned = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)
        >>> _ = tuned.load_state_dict({"weight": base.weight + torch.ones(32, 64) / 64})
        >>> gift.extract(base, tuned, rank=4).ranks  # a matrix of ones has rank 1
        {'weight': 1}
        >>> torch.allclose(base.weight, tuned.weight, atol=1e-6)
        True
    """
    _check(base, rank, error, iterations)
    with torch.no_grad():
        found = _Differences()
        refuse(AdaptationError, _REFUSED, _read(base, _state_of(tuned), found))
        sums = {
            name: _factors(one, found.base[name], rank, error, iterations)
            for name, one in found.weights.items()
        }
        whole = {name for name, made in sums.items() if made is None}
        kept = {name: made for name, made in sums.items() if made is not None}
        trained = [name for name in (*found.values, *whole) if name in found.parameters]
        strategy = ResolvedStrategy([group_for(name, made) for name, made in kept.items()], trained)
        values = found.values | {name: found.tuned(name) for name in whole}
        with enabling_trained(base, strategy):
            fill(base, kept, {name: (*found.places[name], value) for name, value in values.items()})
    return combination_of(kept)


def _check(base: nn.Module, rank: Any, error: Any, iterations: Any) -> None:
    if not isinstance(base, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as the base, got {type(base).__name__}")
    if any(any(spec_of(part)) for part in base.modules()):
        raise RuntimeError("the base is being fine-tuned: a LoRA is extracted for a plain base")
    if (rank is None) == (error is None):
        raise ValueError(f"expected either a rank or an error, got {rank!r} and {error!r}")
    if rank is not None and not (is_integer(rank) and rank >= 1):
        raise ValueError(f"rank is {rank!r}, expected an integer of at least 1")
    if error is not None and not (is_number(error) and 0 < error < 1):
        raise ValueError(f"error is {error!r}, expected a number between 0 and 1")
    if iterations is not None and not (is_integer(iterations) and iterations >= 0):
        raise ValueError(f"iterations is {iterations!r}, expected an integer of at least 0 or None")
    if iterations is not None and error is not None:
        raise ValueError("to find a rank for an error, all singular values are needed: omit "
                         "iterations")  # fmt: skip


def _state_of(tuned: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not isinstance(tuned, nn.Module):
        return tuned
    if any(any(spec_of(part)) for part in tuned.modules()):
        raise RuntimeError("the tuned network has a delta already: save that, or merge it first")
    return whole_state(tuned)


@dataclass(frozen=True)
class _Difference:
    """A weight that differs, and how LoRA reads it."""

    tuned: Tensor
    options: LayoutOptions
    layout: Any


@dataclass
class _Differences:
    """What differs between two networks, by the first names of tensors.

    Args:
        weights: weights for which there may be factors.
        values: tuned values of all else.
        places: module and name of each tensor.
        base: the base's values of `weights`.
        parameters: the names that are parameters.
    """

    weights: dict[str, _Difference] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)

    def tuned(self, name: str) -> Tensor:
        """The tuned values of a weight."""
        return self.weights[name].tuned


def _read(base: nn.Module, state: Mapping[str, Tensor], found: _Differences) -> Iterator[str]:
    """Collect what differs, and yield what makes the two incomparable."""
    known = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    known |= set(whole_state(base))
    if more := sorted(name for name in state if name not in known):
        yield f"the tuned network has {len(more)} tensors that the base lacks: {some(more)}"
    seen: set[int] = set()
    for path, module in base.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            own = joined(path, name)
            if tensor is None or id(tensor) in seen or name in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))  # a tied tensor counts under its first name
            if (value := state.get(own)) is None:
                yield f"it lacks {own}"
            elif problem := _compare(own, module, name, tensor, value, found):
                yield problem
    if not (found.weights or found.values):
        yield "both networks are equal"


def _compare(
    own: str, module: nn.Module, name: str, tensor: Any, value: Tensor, found: _Differences
) -> str | None:
    """Add a tensor to `found` if it differs; return why it cannot be compared, if so."""
    value = dequantised(value)
    if value.shape != shape_of(tensor):
        return f"{own} is {tuple(value.shape)}, in the base it is {tuple(shape_of(tensor))}"
    before = dequantised(tensor, module)
    value = value.to(before.device)
    if is_inexact(value) and not bool(torch.isfinite(value).all()):
        return f"{own} has numbers that are not finite"
    if torch.equal(before, value.to(before.dtype)) and not is_quantised(tensor):
        return None
    found.places[own] = module, name
    if name in module._parameters:
        found.parameters.add(own)
    if name in module._parameters and tensor.dim() >= 2:
        options = LayoutOptions().settled(LoRA.conv_layouts, LoRA.rows_are_outputs)
        layout = layout_of(module, name, shape_of(tensor), options)
        found.weights[own] = _Difference(value, options, layout)
        found.base[own] = before
    elif is_quantised(tensor):
        return f"{own} is quantised and no matrix, so it can have no factors"
    else:
        found.values[own] = value
    return None


def _factors(
    one: _Difference, base: Tensor, rank: int | None, error: float | None, iterations: int | None
) -> LowRankSum | None:
    """The factors of a difference; None if the weight itself is smaller."""
    matrix = one.layout.to_matrix(wide(one.tuned) - wide(base))
    rows, columns = matrix.shape[-2:]
    smaller = math.ceil(rows * columns / (rows + columns))  # a rank that needs as many numbers
    if iterations is None:
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        rank = _rank_for(sigma, error) if rank is None else min(rank, _numerical_rank(sigma))
    else:
        assert rank is not None
        rank = min(rank, rows, columns)
        u, sigma, v = torch.svd_lowrank(matrix, min(rank + 8, rows, columns), niter=iterations)
        vh, rank = v.mH, min(rank, _numerical_rank(sigma))
    if rank >= smaller and not is_quantised(base):
        return None
    root = sigma[..., :rank].sqrt()
    dtype = torch.promote_types(base.dtype, torch.float32)
    left = (u[..., :rank] * root[..., None, :]).to(dtype)
    right = (root[..., None] * vh[..., :rank, :]).to(dtype)
    lost = float((matrix - wide(left) @ wide(right)).abs().square().sum())
    return LowRankSum(one.options, one.layout, wide(left), wide(right), dtype, lost)


def _numerical_rank(sigma: Tensor) -> int:
    """The number of singular values above the rounding errors of single precision."""
    return max(1, int((sigma > 1e-7 * sigma.amax()).sum(-1).max()))


def _rank_for(sigma: Tensor, error: float | None) -> int:
    """The smallest rank with at most that relative error; groups share a rank."""
    assert error is not None
    squares = sigma.square().reshape(-1, sigma.shape[-1]).sum(0)
    left = squares.flip(0).cumsum(0).flip(0)  # at i: what is lost with rank i
    enough = left <= error**2 * squares.sum()
    return max(1, int(enough.int().argmax()) if bool(enough.any()) else len(squares))
