"""The formulas of starts: from statistics of a layer to the factors of its LoRA."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gift.errors import AdaptationError
from gift.methods.factors import signed


class Layer(NamedTuple):
    """What a formula gets of one layer.

    Args:
        data: the second moment of the inputs ``(columns, columns)`` in double precision, or the
            gradient of the weight ``(rows, columns)``.
        weight: the frozen weight ``(rows, columns)``.
        rank: the rank of the factors.
        scaling: the number that multiplies their product.
        settings: further settings.
    """

    data: Tensor
    weight: Tensor
    rank: int
    scaling: float
    settings: dict[str, Any]


class Factors(NamedTuple):
    """Factors for a layer.

    Args:
        left: ``(rows, rank)``; None if it stays as it is.
        right: ``(rank, columns)``.
        share: the part of the data that the factors hold, between 0 and 1.
    """

    left: Tensor | None
    right: Tensor
    share: float


class Start(NamedTuple):
    """One start.

    Args:
        reads: what it needs of a layer: its inputs or the gradient of its weight.
        factors: the formula.
        methods: names of the methods whose factors it can set.
        settings: its settings, with defaults.
    """

    reads: Literal["inputs", "gradients"]
    factors: Callable[[Layer], Factors]
    methods: tuple[str, ...]
    settings: dict[str, Any]


def eva(layer: Layer) -> Factors:
    """Return the principal directions of the inputs, as rows of ``A``."""
    values, vectors = torch.linalg.eigh(layer.data)
    u, _, _ = signed(vectors.flip(-1), values.flip(-1), vectors.flip(-1).mT)
    values = values.flip(-1).clamp(min=0)
    return Factors(None, u[:, : layer.rank].mT, _share(values, layer.rank))


def corda(layer: Layer) -> Factors:
    """Return the parts of the weight that matter most, or least, for the inputs."""
    moment, damping = layer.data, 0.01
    unit = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if not bool(moment.diagonal().mean() > 0):
        raise AdaptationError("all of its inputs are zero")
    while True:  # as the authors do: until the inverse is one
        damped = moment + unit * (moment.diagonal().mean() * damping)
        inverse = torch.linalg.inv(damped)
        if float((damped @ inverse - unit).norm()) < 0.05:
            break
        damping *= 2
    u, sigma, vh = signed(*torch.linalg.svd(layer.weight @ damped, full_matrices=False))
    last = layer.settings["keep_knowledge"]
    part = slice(len(sigma) - layer.rank, None) if last else slice(layer.rank)
    root = (sigma[part] / layer.scaling).sqrt()
    right = root[:, None] * (vh[part] @ inverse)
    return Factors(u[:, part] * root, right, float(sigma[part].square().sum() / _all(sigma)))


def lora_ga(layer: Layer) -> Factors:
    """Return singular vectors of the gradient: the first step is like one of the whole weight."""
    rank = layer.rank
    if 2 * rank > min(layer.data.shape):
        raise AdaptationError(
            f"it needs 2 x {rank} singular vectors of a gradient of {tuple(layer.data.shape)}: "
            f"choose a rank of {min(layer.data.shape) // 2} at most"
        )
    u, sigma, vh = signed(*torch.linalg.svd(layer.data, full_matrices=False))
    if not bool(sigma[0] > 0):
        raise AdaptationError("the gradient of its weight is zero")
    scale = len(layer.data) ** 0.25 / layer.settings["gamma"] ** 0.5
    return Factors(u[:, rank : 2 * rank] * scale, vh[:rank] * scale, _share(sigma**2, 2 * rank))


def _share(values: Tensor, rank: int) -> float:
    return float(values[:rank].sum() / _all(values.sqrt()))


def _all(sigma: Tensor) -> Tensor:
    return sigma.square().sum().clamp(min=torch.finfo(sigma.dtype).tiny)


STARTS = {
    "eva": Start("inputs", eva, ("lora", "rslora", "dora", "lora_fa"), {}),
    "corda": Start("inputs", corda, ("guided",), {"keep_knowledge": False}),
    "lora_ga": Start("gradients", lora_ga, ("guided",), {"gamma": 16.0}),
}
