"""Writing LoRA, rsLoRA and DoRA for PEFT, and LoRA-FA, PiSSA and OLoRA as LoRA."""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.dynamic_class import plain_class
from gift.core.weights.record import weight_deltas
from gift.interop.factors import Pair, for_outputs
from gift.interop.peft.forms import (
    Tensors,
    Written,
    dropout_of,
    plain,
    same,
    sizes,
)  # fmt: skip
from gift.interop.peft.layers import CONVOLUTIONS, AdaptedTensor, kind_of
from gift.layers.layouts import Layout, raw_layout
from gift.layers.table import row_of
from gift.methods.anchored import AnchoredLoRA
from gift.methods.dora import DoRA
from gift.methods.lora import LoRA

_NO_DIRECTION = (
    "it has rows of infinite norm, or rows of zeros, of which gift and PEFT make different things "
    "in DoRA"
)
OUT_PROJ = "base_layer.out_proj."  # inside an attention that PEFT wraps


def write_lora(items: list[AdaptedTensor]) -> Written:
    """Write each layer as a plain LoRA with the same product."""
    written = Written()
    dora = [item.delta.method.name == "dora" for item in items]
    stabilised = all(_method(item).use_rslora for item in items)
    found: dict[str, tuple[int, float]] = {}
    same("use_dora", dora, written)
    for item in items:
        if item.is_layer and item.attention is None:
            b, a = _as_outputs_by_inputs(item)
            written.add(item.path, _keys(item, b, a))
            method: Any = item.delta.method
            if "dora_squares" in item.values and not method.directed(item.values).all():
                written.problems.append(f"{item.name}: {_NO_DIRECTION}")
            found[item.path] = len(a), _alpha(item, len(a), stabilised)
    for path in dict.fromkeys(p.attention for p in items if p.attention is not None):
        found[path] = _write_attention(
            path, [p for p in items if p.attention == path], stabilised, written
        )
    for item in items:
        if not item.is_layer and item.attention is None:
            found[item.name] = _write_parameter(item, stabilised, written)
    transposed = {kind_of(p.module) == "transposed" for p in items if p.is_layer}
    if True in transposed and written.parameters:
        written.problems.append("PEFT cannot adapt Conv1D layers and single parameters at once")
    written.config = sizes(found, "lora_alpha") | {
        "lora_dropout": 0.0 if written.parameters else dropout_of(items),  # PEFT has none there
        "use_rslora": stabilised,
        "use_dora": dora[0],
        "fan_in_fan_out": transposed == {True},
        "init_lora_weights": True,
        "target_parameters": written.parameters or None,
    }
    return written


def _method(item: AdaptedTensor) -> LoRA:
    return cast(LoRA, item.delta.method)


def _alpha(item: AdaptedTensor, rank: int, stabilised: bool) -> float:
    """Return the alpha that gives the same scaling at that rank."""
    method = _method(item)
    if rank == method.rank and stabilised == method.use_rslora:
        return plain(rank if method.lora_alpha is None else method.lora_alpha)
    return alpha_for(method.scaling, rank, stabilised)


def alpha_for(scaling: float, rank: int, stabilised: bool) -> float:
    """Return the alpha that gives that scaling."""
    return plain(scaling * (math.sqrt(rank) if stabilised else rank))


def _factors(item: AdaptedTensor) -> Pair:
    """Return ``B`` and ``A``, or factors of twice the rank whose product is ``B A - B0 A0``."""
    values, method = item.values, item.delta.method
    if isinstance(method, AnchoredLoRA):
        values = method.difference(values)
    return values["lora_B"], values["lora_A"]


def _as_outputs_by_inputs(item: AdaptedTensor) -> Pair:
    """Return the factors of a matrix with one row for each output."""
    b, a = _factors(item)
    kind = kind_of(item.module)
    if kind == "embedding" and item.delta.method.name != "dora":
        return a.T, b.T  # gift's rows are the entries
    if kind in CONVOLUTIONS:
        return for_outputs(b, a, item.shape[0])
    return b, a


def _keys(item: AdaptedTensor, b: Tensor, a: Tensor) -> Tensors:
    """Return the factors by PEFT's names, in the shapes of its layers."""
    kind = kind_of(item.module)
    ones = (1,) * (len(item.shape) - 2) if kind in CONVOLUTIONS else ()
    if kind == "embedding":
        tensors = {"lora_embedding_A": a, "lora_embedding_B": b}
    elif kind in CONVOLUTIONS:
        a, b = a.unflatten(1, item.shape[1:]), b.reshape(*b.shape, *ones)
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
    else:
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
    method = item.delta.method
    if isinstance(method, DoRA):
        shape = (1, len(b), *ones) if ones else (len(b),)
        tensors["lora_magnitude_vector"] = method.magnitude(item.values).reshape(shape)
    return tensors


def _write_attention(
    path: str, pair: list[AdaptedTensor], stabilised: bool, written: Written
) -> tuple[int, float]:  # fmt: skip
    """Write both projections, which share rank and scaling in PEFT; one may be missing here."""
    if any(item.delta.method.name == "dora" for item in pair):
        written.problems.append(f"{path}: PEFT has no DoRA for nn.MultiheadAttention")
    scalings = {_method(item).scaling for item in pair}
    scaling = scalings.pop() if len(scalings) == 1 else None
    factors = {}
    for item in pair:
        b, a = _factors(item)
        if b.ndim == 3:  # query, key and value separately
            b, a = torch.block_diag(*b), a.flatten(0, 1)
        factors[item.tensor] = b if scaling is not None else b * _method(item).scaling, a
    if "weight" in factors and torch.count_nonzero(torch.matmul(*factors["weight"])):
        written.problems.append(f"{path}: {TWICE}")
    rank, size = max(len(a) for _, a in factors.values()), pair[0].shape[-1]
    none = b.new_zeros(0, 0)
    for tensor, inside, rows in (("in_proj_weight", "", 3 * size), ("weight", OUT_PROJ, size)):
        b, a = factors.get(tensor, (none, none))
        b = F.pad(b, (0, rank - b.shape[1], 0, rows - len(b)))
        a = F.pad(a, (0, size - a.shape[1], 0, rank - len(a)))
        written.add(path, {f"{inside}lora_A.weight": a, f"{inside}lora_B.weight": b})
    return rank, alpha_for(1.0 if scaling is None else scaling, rank, stabilised)


TWICE = (
    "PEFT adds the delta of an attention's out_proj twice, so that only the in_proj_weight can be "
    "adapted in both"
)


def _write_parameter(item: AdaptedTensor, stabilised: bool, written: Written) -> tuple[int, float]:
    """Write a matrix or a batch of matrices; PEFT nests the wrappers of several in one module."""
    b, a = _factors(item)
    rank = a.shape[-2]
    if b.ndim == 3:
        if is_transposed(item.module):
            b, a = a.mT, b.mT
        b, a = b.permute(1, 2, 0).flatten(1), a.flatten(0, 1)
    own = [name for name in item.module._parameters if name in weight_deltas(item.module)]
    inside = "base_layer." * (len(own) - 1 - own.index(item.tensor))
    for suffix, factor in (("lora_A.weight", a), ("lora_B.weight", b)):
        written.tensors[f"{item.path}.{inside}{suffix}"] = factor
    written.parameters.append(item.name)
    assert item.delta.layout is not None
    problems = list(parameter_incompatibilities(item.module, item.delta.layout))
    if item.delta.method.name == "dora":
        problems.append("PEFT has no DoRA for single parameters")
    if kind_of(item.module) and "weight" in own:
        problems.append("PEFT cannot adapt a layer and a single parameter of it at once")
    written.problems += [f"{item.name}: {problem}" for problem in problems]
    return rank, _alpha(item, rank, stabilised)


def is_transposed(module: Any) -> bool:
    """Whether a module says that its batches of matrices have inputs as rows."""
    return bool(getattr(module, "is_transposed", False))


def parameter_incompatibilities(module: Any, layout: Layout) -> Iterator[str]:
    """Yield why PEFT cannot adapt a single parameter as gift does."""
    raw = raw_layout(layout.shape)
    if len(layout.shape) not in (2, 3):
        yield f"of single parameters PEFT adapts matrices and batches of them, not {layout.shape}"
    elif (layout.matrix, layout.order) != (raw.matrix, raw.order):
        yield f"PEFT reads a single parameter {layout.shape} in another way than gift this one"
    cls: Any = plain_class(type(module))
    if cls.forward is nn.Module.forward:
        yield f"PEFT adapts it in calls of the {cls.__name__}, which has no forward"
    row = row_of(cls)
    if row is not None and row.keeps_weights:
        yield "PEFT does not adapt the weights of recurrent layers"
    if is_transposed(module) and len(layout.matrix) != len(layout.shape):
        yield "PEFT would misread a single matrix that is transposed"
