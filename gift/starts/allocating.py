"""Ranks for layers by what batches say of their inputs."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gift.budget import Suggestion
from gift.budget.layers import Choice
from gift.budget.suggestion import open_choices, suggestion_of, twin_of
from gift.errors import AdaptationError, GiftWarning, some
from gift.methods.settings import is_number
from gift.starts.collecting import Inputs
from gift.starts.formulas import STARTS
from gift.starts.initialise import called, is_linear
from gift.strategies.base import FineTuningStrategy


def allocate(
    net: nn.Module,
    batches: Iterable[Any],
    strategy: FineTuningStrategy,
    rho: float = 2.0,
    keep_scaling: bool = True,
    call: Callable[[Any], Any] | None = None,
) -> Suggestion:
    r"""Move ranks between layers by the variance of their inputs, as EVA does, before enabling.

    (Paischer et al. 2024, https://arxiv.org/abs/2410.07170.) The inputs of a layer have the
    principal components :math:`\sigma_1^2 \ge \sigma_2^2 \ge \dots` around their mean. Of the
    shares

    .. math:: \sigma_i^2 / \textstyle\sum_j \sigma_j^2, \quad i \le \rho r

    of all layers, where `r` is the rank that the strategy gives a layer, as many of the largest are
    chosen as the ranks of the strategy sum up to. The rank of a layer is the number of its own
    among them. With ``rho=1`` no rank moves. A layer of which none is chosen stays frozen. Ties, as
    of layers with the same input, go round in the order of the network.

    Linear layers with LoRA, rsLoRA, LoRA-FA and DoRA take part; all other layers, and those that
    share a weight, keep the rank of the strategy. The network is called, and not changed::

        suggestion = gift.starts.allocate(net, batches, LoRALinearFineTuningStrategy(rank=8))
        gift.enable_fine_tuning(net, suggestion.strategy)
        gift.initialise(net, batches)  # EVA

    While data are read, memory grows by 8 bytes for each element of ``(in, in)`` of each layer.

    Args:
        net: the plain network. It is called in the mode in which it is: ``eval()`` omits dropout.
        batches: as for `initialise`.
        strategy: gives the layers, the method and the ranks.
        rho: how many times its rank a layer can get at most, 1 or more.
        keep_scaling: whether an alpha of the strategy follows the rank of a layer, so that the
            scaling of all layers stays that of the strategy.
        call: calls the network with a batch, if it is not called as described.

    Returns:
        The ranks, and a strategy that gives exactly these.

    Raises:
        TypeError: if the network is not a module, or the strategy not a strategy.
        ValueError: if `rho` is out of range, if `batches` is empty, or if no layer has a size to
            choose.
        RuntimeError: if the network is already being fine-tuned.
        AdaptationError: if no layer takes part, or the inputs of one are not finite.

    Example:
        >>> import gift, torch
        >>> from torch import nn
        >>> from gift.strategies import LoRALinearFineTuningStrategy
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(16, 10))
        >>> _ = torch.manual_seed(0)
        >>> batches = [torch.randn(32, 64) for _ in range(4)]
        >>> strategy = LoRALinearFineTuningStrategy(rank=4)
        >>> gift.starts.allocate(net, batches, strategy).ranks
        {'0': 0, '1': 6, '2': 6}
    """
    if not (is_number(rho) and rho >= 1):
        raise ValueError(f"rho is {rho!r}, expected a number of at least 1")
    twin = twin_of(net, strategy)
    _, choices = open_choices(twin, strategy)
    for choice in choices:
        choice.size = choice.sizes.at_most(choice.proportion)
    parts = {choice.paths[0]: choice for choice in choices if _takes_part(net, choice)}
    if not parts:
        raise AdaptationError(
            f"ranks are moved between linear layers with {' or '.join(STARTS['eva'].methods)}; the "
            f"layers are {some([path for choice in choices for path in choice.paths])}"
        )
    seen = Inputs({path: net.get_submodule(path) for path in parts}, normalised=False)
    if not seen.run(call or (lambda batch: called(net, batch)), batches):
        raise ValueError("there are no batches: give a list or a loader, not an exhausted iterator")
    moments = {path: total for path, (total, _) in seen.centred().items()}
    if missed := [path for path in parts if path not in moments]:
        warnings.warn(
            f"no batch reached {some(missed)}, which keep their rank", GiftWarning, stacklevel=2
        )
    if wrong := [path for path, total in moments.items() if not bool(total.isfinite().all())]:
        raise AdaptationError(f"the inputs of {some(wrong)} are not finite")
    reached = {path: parts[path] for path in moments}
    _share_out(reached, {path: shares(total) for path, total in moments.items()}, rho)
    return suggestion_of(twin, strategy, choices, keep_scaling=keep_scaling)


def _takes_part(net: nn.Module, choice: Choice) -> bool:
    """Whether the rank of a choice can be moved: that of one weight of one linear layer."""
    if len(choice.paths) > 1 or choice.sizes.method.name not in STARTS["eva"].methods:
        return False
    try:
        module = net.get_submodule(choice.paths[0])
    except AttributeError:  # a parameter
        return False
    return is_linear(module) and len(choice.sizes.weights) == 1


def shares(moment: Tensor) -> list[float]:
    """Return the shares of the principal components in the variance, the largest first."""
    values = torch.linalg.eigvalsh(moment).flip(-1).clamp(min=0)
    return (values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).tolist()


def _share_out(parts: dict[str, Choice], found: dict[str, list[float]], rho: float) -> None:
    """Set the sizes of the choices."""
    candidates = [
        (-share, number, place, choice)
        for place, (path, choice) in enumerate(parts.items())
        for number, share in enumerate(found[path][: _limit(choice, rho)])
    ]
    budget = sum(choice.size for choice in parts.values())
    for choice in parts.values():
        choice.size = 0
    for *_, choice in sorted(candidates, key=lambda one: one[:3])[:budget]:
        choice.size += 1


def _limit(choice: Choice, rho: float) -> int:
    """Return the largest rank that a layer can get."""
    return choice.sizes.at_most(round(choice.size * rho))
