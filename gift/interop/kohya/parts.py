"""Converting a delta of gift to the tensors of one layer in a kohya file."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gift.core.weights.record import WeightDelta, present_weight_deltas
from gift.interop.factors import Pair, product
from gift.interop.kohya.factors import for_whole
from gift.interop.kohya.kronecker import as_one, is_split_of_lycoris, joined
from gift.interop.kohya.layers import Incompatible, Target
from gift.methods.anchored import AnchoredLoRA
from gift.methods.lokr import LoKr
from gift.support.sharding import is_sharded

Values = Mapping[str, Tensor]


def parts_of(delta: WeightDelta, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a delta, by their names after the layer's.

    Args:
        delta: delta of the layer's weight.
        module: the layer.
        weight: its frozen weight.

    Raises:
        Incompatible: if kohya files have no counterpart.
    """
    write = _WRITERS.get(delta.method.name)
    if write is None:
        raise Incompatible(
            f"such files have no counterpart of {delta.method.name!r}; they have one of "
            f"{', '.join(_WRITERS)}"
        )
    values = {key: value.detach() for key, value in delta.tensors(module).items()}
    if any(value.is_complex() for value in values.values()):
        raise Incompatible("its factors are complex")
    if any(value.is_meta or is_sharded(value) for value in values.values()):
        raise Incompatible(
            "its factors have no values here: they are on the meta device or sharded"
        )
    values = {key: value.cpu() for key, value in values.items()}
    return write(delta, values, Target(module, weight.detach()))


def _whole(delta: WeightDelta, pair: Pair, target: Target) -> Pair:
    assert delta.layout is not None
    return for_whole(*pair, delta.layout, len(target.weight))


def _lora(delta: WeightDelta, values: Values, target: Target) -> dict[str, Tensor]:
    method: Any = delta.method
    if isinstance(method, AnchoredLoRA):
        values = method.difference(values)
    up, down = _whole(delta, (values["lora_B"], values["lora_A"]), target)
    rank, kernel = len(down), target.kernel
    up, alpha = _scaled(up, method.scaling * rank, rank)
    return {
        "lora_up.weight": up.reshape(*up.shape, *[1] * len(kernel)),
        "lora_down.weight": down.reshape(rank, -1, *kernel),
        "alpha": alpha,
    }


def _dora(delta: WeightDelta, values: Values, target: Target) -> dict[str, Tensor]:
    """Return LoRA with ``dora_scale``, the magnitudes of the rows.

    A row without direction (its norm is zero or infinite) has no magnitude of its own; it keeps
    the norm of its update.
    """
    parts = _lora(delta, values, target)
    method: Any = delta.method
    magnitude = method.magnitude(values)
    size = method.delta({key: value.double() for key, value in values.items()}).norm(
        dim=-1, keepdim=True
    )
    magnitude = torch.where(method.directed(values), magnitude, size.to(magnitude))
    return parts | {"dora_scale": magnitude.reshape(-1, 1, *[1] * len(target.kernel))}


def _loha(delta: WeightDelta, values: Values, target: Target) -> dict[str, Tensor]:
    method: Any = delta.method
    first, second = (
        _whole(delta, (values[f"loha_B{n}"], values[f"loha_A{n}"]), target) for n in (1, 2)
    )
    rank = len(first[1])
    left, alpha = _scaled(first[0], method.scaling * rank, rank)
    return {
        "hada_w1_a": left,
        "hada_w1_b": first[1],
        "hada_w2_a": second[0],
        "hada_w2_b": second[1],
        "alpha": alpha,
    }


def _lokr(delta: WeightDelta, values: Values, target: Target) -> dict[str, Tensor]:
    """Return LoKr in the form that LyCORIS expects.

    LyCORIS rebuilds its module from the shapes, so factors that it would not decompose are not
    decomposed in the file. It has one product for a convolution as a whole and splits the inputs.
    Where gift has one for each group, or splits the matrix in a way that LyCORIS has not, the first
    factor is one number, and the second is the whole delta or its factors.
    """
    assert delta.layout is not None
    kernel, method = target.kernel, cast(LoKr, delta.method)
    outputs, inputs = target.weight.shape[:2]
    shape, first = _first(values)
    whole = delta.layout.matrix == (outputs, target.columns)
    if not (whole and is_split_of_lycoris(outputs, inputs, shape, target.columns, values)):
        factors = _whole(delta, joined(values), target)
        values, first = as_one(factors, "lokr_w2" in values), 0
        shape = 1, 1
    (a, c), b, d = shape, outputs // shape[0], inputs // shape[1]
    w1 = values["lokr_w1"] if not first else product(values["lokr_w1_a"], values["lokr_w1_b"])
    if "lokr_w2" in values:
        return _full(w1, values["lokr_w2"], (b, d, *kernel))
    left, right = values["lokr_w2_a"], values["lokr_w2_b"]
    rank = len(right)
    if rank >= max(b, d) / 2 or rank * (b + right.shape[1]) >= b * right.shape[1]:
        return _full(w1, product(left, right) * method.scaling, (b, d, *kernel))
    left, alpha = _scaled(left, method.scaling * rank, rank)
    parts = {"lokr_w2_a": left, "lokr_w2_b": right, "alpha": alpha}
    if first == rank < max(a, c) / 2:
        return {name: values[name] for name in ("lokr_w1_a", "lokr_w1_b")} | parts
    return {"lokr_w1": w1} | parts


def _full_delta(delta: WeightDelta, values: Values, target: Target) -> dict[str, Tensor]:
    assert delta.layout is not None
    return {"diff": delta.layout.to_weight(values["full_delta"])}


def _ia3(delta: WeightDelta, values: Values, target: Target) -> dict[str, Tensor]:
    """Return what factors add to one; LyCORIS has one for each output or each input channel."""
    method: Any = delta.method
    if "bias" in present_weight_deltas(target.module):
        raise Incompatible(
            "(IA)^3 of LyCORIS does not scale biases, which ma_adapt adapts: pa_adapt adapts the "
            "weight alone"
        )
    if method.feedforward and target.groups > 1:
        raise Incompatible("LyCORIS has no (IA)^3 of the inputs of a convolution with groups")
    assert delta.layout is not None
    factors = delta.layout.to_weight(values["ia3_l"].expand(delta.layout.matrix))
    channels = (factors[0] if method.feedforward else factors).reshape(
        factors.shape[1 if method.feedforward else 0], -1
    )
    if method.feedforward and not (channels == channels[:, :1]).all():
        raise Incompatible(
            "LyCORIS scales input channels as a whole, here the positions in the kernel have "
            "factors of their own"
        )
    shape = (1, -1, *[1] * len(target.kernel)) if target.kernel else (-1,)
    on_input = torch.tensor(int(method.feedforward))
    return {"weight": (channels[:, 0] - 1).reshape(shape), "on_input": on_input}


def _first(values: Values) -> tuple[tuple[int, int], int]:
    if "lokr_w1" in values:
        return (values["lokr_w1"].shape[0], values["lokr_w1"].shape[1]), 0
    left, right = values["lokr_w1_a"], values["lokr_w1_b"]
    return (left.shape[0], right.shape[1]), len(right)


def _full(w1: Tensor, w2: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"lokr_w1": w1, "lokr_w2": w2.reshape(shape), "alpha": _number(1.0, w2)}


def _scaled(factor: Tensor, alpha: float, rank: int) -> Pair:
    """Return the factor and alpha; an alpha of 0 would be ignored, so the factor is set to 0."""
    if alpha == 0:
        return torch.zeros_like(factor), _number(rank, factor)
    return factor, _number(alpha, factor)


def _number(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.promote_types(like.dtype, torch.float32))


_WRITERS: dict[str, Callable[[WeightDelta, Values, Target], dict[str, Tensor]]] = {
    **dict.fromkeys(("lora", "rslora", "lora_fa", "pissa", "olora", "guided"), _lora),
    "dora": _dora,
    "loha": _loha,
    "lokr": _lokr,
    "full_delta": _full_delta,
    "ia3": _ia3,
}
