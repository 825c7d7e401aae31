"""Full deltas, (IA)^3 and GLoRA in kohya files: their tensors, and how these map to gift."""

import torch

from gift.interop.factors import smallest
from gift.interop.kohya.forms import KohyaMethod, Parts, ReadDelta, Shapes
from gift.interop.kohya.layers import Incompatible, Target
from gift.layers.layouts import Layout, LayoutOptions
from gift.layers.table import layout_of


def _layout(target: Target) -> Layout:
    return layout_of(
        target.module, "weight", target.weight.shape, LayoutOptions("out_as_h")
    )  # fmt: skip


# Full.


def _full_shapes(parts: Parts, target: Target) -> Shapes:
    shapes: Shapes = {"diff": tuple(target.weight.shape)}
    if "diff_b" not in parts:
        return shapes
    if getattr(target.module, "bias", None) is None:
        raise Incompatible("it has diff_b, a change of a bias that the layer does not have")
    return shapes | {"diff_b": (len(target.weight),)}


def _full(parts: Parts, scaling: float, target: Target) -> ReadDelta:
    bias = parts.get("diff_b")
    if bias is not None and not bias.any():
        bias = None  # LyCORIS writes one for each bias
    values = {"full_delta": _layout(target).to_matrix(parts["diff"])}
    return ReadDelta("full_delta", {}, values, bias)


FULL = KohyaMethod("full", {"diff"}, [{"diff"}], {"diff_b"}, [], _full_shapes, _full)


# (IA)^3: ``W (1 + w)``, for outputs or inputs; biases are not scaled.


def _ia3_shapes(parts: Parts, target: Target) -> Shapes:
    if _scales_inputs(parts) and target.groups > 1:
        raise Incompatible("LyCORIS has no (IA)^3 of the inputs of a convolution with groups")
    size = target.weight.shape[1] if _scales_inputs(parts) else len(target.weight)
    shape = (size,) if parts["weight"].ndim == 1 else (1, size)
    return {"weight": shape, "on_input": tuple(parts["on_input"].shape)}


def _scales_inputs(parts: Parts) -> bool:
    return bool(parts["on_input"])


def _ia3(parts: Parts, scaling: float, target: Target) -> ReadDelta:
    factors, inputs = 1 + parts["weight"].flatten(), _scales_inputs(parts)
    *groups, rows, columns = _layout(target).matrix
    if inputs:
        factors = factors.repeat_interleave(columns // len(factors))  # for each kernel position
    shape = (*groups, 1, columns) if inputs else (*groups, rows, 1)
    values = {"ia3_l": factors.reshape(shape)}
    return ReadDelta("ia3", {"feedforward": inputs}, values, weight_only=True)


_IA3_NAMES = {"weight", "on_input"}
IA3 = KohyaMethod("(IA)^3", _IA3_NAMES, [_IA3_NAMES], set(), [], _ia3_shapes, _ia3)


# GLoRA of LyCORIS: ``W + W A + B``. The first term mixes inputs of the frozen weight, which is not
# the function of GLoRA in the paper, but for a frozen weight it is a LoRA.


def _glora_shapes(parts: Parts, target: Target) -> Shapes:
    if target.groups > 1:
        raise Incompatible("LyCORIS has no GLoRA of a convolution with groups")
    outputs, inputs, *kernel = target.weight.shape
    rank = parts["a2.weight"].shape[0]
    return {
        "a1.weight": (inputs, rank),
        "a2.weight": (rank, inputs),
        "b1.weight": (outputs, rank),
        "b2.weight": (rank, inputs, *kernel),
    }


def _glora(parts: Parts, scaling: float, target: Target) -> ReadDelta:
    kernel = target.weight[0, 0].numel()
    frozen = target.weight.double().flatten(2) if kernel > 1 else target.weight.double().flatten(1)
    mixed = torch.einsum("oi...,ij->oj...", frozen, parts["a1.weight"].double()).flatten(1)
    spread = torch.kron(parts["a2.weight"], torch.eye(kernel).to(parts["a2.weight"]))
    left = torch.cat([mixed.to(parts["b1.weight"].dtype), parts["b1.weight"]], 1) * scaling
    b, a = smallest(left, torch.cat([spread, parts["b2.weight"].flatten(1)]))
    return ReadDelta("lora", {"rank": b.shape[-1]}, {"lora_B": b, "lora_A": a})


_GLORA_NAMES = {"a1.weight", "a2.weight", "b1.weight", "b2.weight"}
GLORA = KohyaMethod(
    "GLoRA", _GLORA_NAMES, [_GLORA_NAMES], set(), [("a2.weight", 0)], _glora_shapes, _glora
)
