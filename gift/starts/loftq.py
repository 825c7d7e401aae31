"""LoftQ: LoRAs of a quantised base that start at what quantising loses."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gift.core.delta import put_values
from gift.core.dynamic_class import spec_of
from gift.core.record import fine_tuned_part
from gift.core.state import whole_state
from gift.core.undo.snapshot import transaction
from gift.core.undo.temporary_state import refuse_meanwhile
from gift.core.weights.frozen import present_tensor
from gift.core.weights.record import WeightDelta
from gift.errors import AdaptationError, refuse, some
from gift.methods.settings import is_integer
from gift.quantization import dequantised, is_quantised, requantised, shape_of
from gift.starts.places import REFUSED, Initialised, Places, places_of
from gift.support.tensors import is_finite, wide

_METHODS = ("lora", "rslora", "lora_fa")


class _Started(NamedTuple):
    """The start of one layer.

    Args:
        left: ``B``, in double precision.
        right: ``A``.
        frozen: the quantised weight.
        share: the part of the squared error of quantising that the factors take away.
    """

    left: Tensor
    right: Tensor
    frozen: nn.Parameter
    share: float


def loftq(
    net: nn.Module, original: nn.Module | Mapping[str, Tensor], rounds: int = 1
) -> Initialised:
    r"""Set the start of LoRAs on a quantised base, so that both are near the original weights.

    LoftQ (Li et al. 2023, https://arxiv.org/abs/2310.08659) alternates between quantising and a
    truncated singular value decomposition, from :math:`B_0 A_0 = 0`:

    .. math:: Q_t = q(W - s B_{t-1} A_{t-1}), \quad s B_t A_t \approx W - Q_t, \quad
        B_t = U_r \sqrt{\Sigma_r / s}, \quad A_t = \sqrt{\Sigma_r / s} \, V_r^\top

    with the scaling `s`. The base is :math:`Q_1 = q(W)` already, so that one round sets the factors
    alone. With more rounds the base becomes :math:`Q_T`, quantised in the same way: save it along
    with the delta, or call this again before the delta is loaded. Disabling leaves :math:`Q_T`.

    Each round takes one decomposition of each weight in double precision, for 4096 by 4096 about a
    minute on a processor; memory grows by one weight of float64 at a time.

    Args:
        net: a network with a quantised base that is being fine-tuned, or a bigger module around
            one. LoRA, rsLoRA and LoRA-FA of quantised weights are set; all else keeps its start.
        original: the base before it was quantised, or its whole ``state_dict()``.
        rounds: `T`; the paper uses 5.

    Returns:
        For each weight, the part of the squared error of quantising, :math:`\|W - Q_1\|^2`, that
        is gone.

    Raises:
        RuntimeError: if nothing in `net` is being fine-tuned, or `original` is.
        ValueError: if `rounds` is out of range.
        AdaptationError: naming all weights that `original` lacks or has in another shape, that are
            not finite, or cannot be quantised again. The network is unchanged then.
    """
    network = fine_tuned_part(net)
    refuse_meanwhile(network)
    if not (is_integer(rounds) and rounds >= 1):
        raise ValueError(f"rounds is {rounds!r}, expected an integer of at least 1")
    places, left = places_of(network, _fits)
    if not places:
        raise AdaptationError(
            f"loftq starts quantised weights that are adapted by {' or '.join(_METHODS)}; the "
            f"adapted weights are {some(left)}"
        )
    weights = _weights_of(original)
    problems: list[str] = []
    started: dict[str, _Started] = {}
    with torch.no_grad():
        for path, (module, delta) in places.items():
            try:
                started[path] = _start(weights, path, module, delta, rounds)
            except AdaptationError as error:
                problems.append(f"{path}: {error}")
        refuse(AdaptationError, REFUSED, problems)
        _write(network, places, started)
    return Initialised("loftq", 0, {path: one.share for path, one in started.items()}, left)


def _fits(module: nn.Module, delta: WeightDelta) -> bool:
    quantised = is_quantised(module._parameters.get("weight"))
    return quantised and delta.method.name in _METHODS and delta.below is None


def _weights_of(original: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not isinstance(original, nn.Module):
        return original
    if any(any(spec_of(part)) for part in original.modules()):
        raise RuntimeError("the original network is being fine-tuned: give it as a plain network")
    return whole_state(original)


def _start(
    weights: Mapping[str, Tensor], path: str, module: nn.Module, delta: WeightDelta, rounds: int
) -> _Started:
    frozen: Any = present_tensor(module, "weight")
    method: Any = delta.method
    assert delta.layout is not None
    if method.scaling == 0:
        raise AdaptationError("its scaling is 0, so that its factors have no effect")
    weight = _original(weights, path, frozen)
    sign = 1 if method.scaling > 0 else -1
    first = error = wide(weight - wide(dequantised(frozen, module)))
    made = torch.zeros_like(weight)
    for number in range(rounds):
        if number:
            frozen = requantised(frozen, weight - made)
            error = weight - wide(dequantised(frozen, module))
        u, sigma, vh = torch.linalg.svd(delta.layout.to_matrix(error), full_matrices=False)
        root = (sigma[: method.rank] / abs(method.scaling)).sqrt()
        left, right = u[:, : method.rank] * root * sign, root[:, None] * vh[: method.rank]
        made = delta.layout.to_weight(method.scaling * (left @ right))
    whole, rest = (float(part.square().sum()) for part in (first, error - made))
    return _Started(left, right, frozen, 1 - rest / whole if whole else 1.0)


def _original(weights: Mapping[str, Tensor], path: str, frozen: Tensor) -> Tensor:
    """Return the weight before it was quantised, in double precision."""
    weight = weights.get(path)
    if weight is None:
        raise AdaptationError("the original network has no such weight")
    if is_quantised(weight) or not weight.is_floating_point():
        raise AdaptationError("it is quantised in the original network too")
    if weight.shape != shape_of(frozen):
        raise AdaptationError(
            f"it is {tuple(weight.shape)} in the original network, here {tuple(shape_of(frozen))}"
        )
    if not is_finite(weight):
        raise AdaptationError("it is not finite in the original network")
    return wide(weight.detach()).to(frozen.device)


def _write(
    network: nn.Module,
    places: Places,
    started: Mapping[str, _Started],
) -> None:
    written = [
        tensor
        for module, delta in places.values()
        for tensor in delta.tensors(module).values()
    ]  # fmt: skip
    with transaction(network, writes=written):
        for path, one in started.items():
            module, delta = places[path]
            put_values(module, {delta.names["lora_B"]: one.left, delta.names["lora_A"]: one.right})
            module._parameters["weight"] = one.frozen
