"""LoRA, LoHa and LoKr in kohya files: their tensors, and how these map to gift; all methods."""

from typing import Any

from torch import Tensor

from gift.interop.factors import Pair, magnitude_change, product, smallest
from gift.interop.kohya.factors import for_groups, without_core
from gift.interop.kohya.forms import KohyaMethod, Parts, ReadDelta, Shapes, trimmed
from gift.interop.kohya.layers import Incompatible, Target
from gift.interop.kohya.whole_weights import FULL, GLORA, IA3
from gift.layers.layouts import LayoutOptions
from gift.layers.table import layout_of
from gift.methods.lokr import factorization


def _ranked(
    method: str, rank: int, scaling: float, values: dict[str, Tensor], **more: Any
) -> ReadDelta:
    settings: dict[str, Any] = {"rank": rank} | more
    if scaling != 1:
        settings["lora_alpha" if method in ("lora", "dora") else "alpha"] = scaling * rank
    return ReadDelta(method, settings, values)


# LoRA.


def _lora_shapes(parts: Parts, target: Target) -> Shapes:
    outputs, inputs, *kernel = target.weight.shape
    rank = parts["lora_down.weight"].shape[0]
    down = {"lora_down.weight": (rank, inputs, *kernel)}
    if "lora_mid.weight" in parts:
        down = {"lora_down.weight": (rank, inputs), "lora_mid.weight": (rank, rank, *kernel)}
    shapes: Shapes = {"lora_up.weight": (outputs, rank), **down}
    if "dora_scale" in parts:
        shape = trimmed(parts["dora_scale"].shape)
        if shape == trimmed((1, inputs, *[1] * len(kernel))) != (outputs, 1):
            raise Incompatible(
                "dora_scale has magnitudes of inputs (LyCORIS: wd_on_output=False); those of "
                "gift's DoRA are of outputs"
            )
        shapes["dora_scale"] = (outputs, 1)
    return shapes


def _lora(parts: Parts, scaling: float, target: Target) -> ReadDelta:
    up, down = parts["lora_up.weight"], parts["lora_down.weight"].flatten(1)
    if "lora_mid.weight" in parts:
        down = without_core(parts["lora_mid.weight"], down)
    b, a = smallest(*for_groups(up, down, target.groups))
    values = {"lora_B": b, "lora_A": a}
    if "dora_scale" not in parts:
        return _ranked("lora", b.shape[-1], scaling, values)
    options = LayoutOptions("out_as_h")
    layout = layout_of(target.module, "weight", target.weight.shape, options)
    try:
        change = magnitude_change(parts["dora_scale"], layout.to_matrix(target.weight))
    except ValueError as error:
        raise Incompatible(str(error)) from None
    values["dora_delta_m"] = change
    return _ranked("dora", b.shape[-1], scaling, values)


# LoHa.


def _loha_shapes(parts: Parts, target: Target) -> Shapes:
    outputs, inputs, *kernel = target.weight.shape
    rank = parts["hada_w1_b"].shape[0]
    shapes: Shapes = {}
    for w, t in (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2")):
        if t in parts:
            shapes |= {f"{w}_a": (rank, outputs), f"{w}_b": (rank, inputs)}
            shapes[t] = (rank, rank, *kernel)
        else:
            shapes |= {f"{w}_a": (outputs, rank), f"{w}_b": (rank, target.columns)}
    return shapes


def _loha(parts: Parts, scaling: float, target: Target) -> ReadDelta:
    values: dict[str, Tensor] = {}
    for n in (1, 2):
        left, right = _pair(parts, f"hada_w{n}", f"hada_t{n}")
        b, a = smallest(*for_groups(left, right, target.groups))
        values |= {f"loha_B{n}": b, f"loha_A{n}": a}
    return _ranked("loha", b.shape[-1], scaling, values)


def _pair(parts: Parts, name: str, core: str) -> Pair:
    """Return two factors, with Tucker's core merged into the second."""
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        return left.T, without_core(parts[core], right)
    return left, right


# LoKr.


def _lokr_shapes(parts: Parts, target: Target) -> Shapes:
    outputs, inputs, *kernel = target.weight.shape
    shapes: Shapes = {}
    (a, c), first = _outer(parts, "lokr_w1")
    if outputs % a or inputs % c:
        raise Incompatible(
            f"its first factor is {a} x {c}, which does not divide the layer's {outputs} outputs "
            f"and {inputs} inputs"
        )
    b, d, size = outputs // a, inputs // c, target.columns // c
    shapes |= {"lokr_w1": (a, c)} if not first else {"lokr_w1_a": (a, first)}
    shapes |= {"lokr_w1_b": (first, c)} if first else {}
    if "lokr_w2" in parts:
        return shapes | {"lokr_w2": (b, d, *kernel)}
    if "lokr_t2" in parts:
        rank = parts["lokr_w2_a"].shape[0]
        shapes["lokr_t2"] = (rank, rank, *kernel)
        return shapes | {"lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d)}
    rank = parts["lokr_w2_a"].shape[1]
    return shapes | {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, size)}


def _outer(parts: Parts, name: str) -> tuple[tuple[int, int], int]:
    """Return the rows and columns of a factor, and its rank if it is itself a product."""
    if name in parts:
        return (parts[name].shape[0], parts[name].shape[1]), 0
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    return (left.shape[0], right.shape[1]), left.shape[1]


def _lokr(parts: Parts, scaling: float, target: Target) -> ReadDelta:
    if target.groups > 1:
        return _lokr_of_groups(parts, scaling, target)
    (a, c), first = _outer(parts, "lokr_w1")
    factors = _factors((a, len(target.weight) // a), (c, target.columns // c))
    if "lokr_w2" in parts:
        w1 = product(parts["lokr_w1_a"], parts["lokr_w1_b"]) if first else parts["lokr_w1"]
        w2 = parts["lokr_w2"].flatten(1) * scaling  # gift's full matrices have no scaling
        values = {"lokr_w1": w1, "lokr_w2": w2}
        return ReadDelta("lokr", {"full_matrix": True} | factors, values)
    left, right = smallest(*_pair(parts, "lokr_w2", "lokr_t2"))
    rank = left.shape[1]
    both = first == rank <= min(a, c)
    if both:
        values = {name: parts[name] for name in ("lokr_w1_a", "lokr_w1_b")}
    elif first:
        values = {"lokr_w1": product(parts["lokr_w1_a"], parts["lokr_w1_b"])}
    else:
        values = {"lokr_w1": parts["lokr_w1"]}
    values |= {"lokr_w2_a": left, "lokr_w2_b": right}
    return _ranked("lokr", rank, scaling, values, decompose_both=both, **factors)


def _lokr_of_groups(parts: Parts, scaling: float, target: Target) -> ReadDelta:
    """Return LoKr of each group, of the product for the whole matrix.

    A group has some rows of the first factor and the whole second one, or a part of one row, where
    the groups are more.
    """
    (a, c), first = _outer(parts, "lokr_w1")
    outputs, groups = len(target.weight), target.groups
    w1 = product(parts["lokr_w1_a"], parts["lokr_w1_b"]) if first else parts["lokr_w1"]
    if a % groups and groups % a:
        raise Incompatible(
            f"its first factor has {a} rows, the convolution {groups} groups, so that a group has "
            "parts of several rows; gift's LoKr has a product for each group"
        )
    own, each = max(a // groups, 1), max(groups // a, 1)
    factors = _factors((own, outputs // groups // own), (c, target.columns // c))

    def shared(second: Tensor) -> Tensor:
        """Return the part of the second factor for each group: its rows, if a group has some."""
        return second.unflatten(0, (each, -1)).repeat(groups // each, 1, 1)

    values = {"lokr_w1": w1.reshape(min(a, groups), own, c).repeat_interleave(each, 0)}
    if "lokr_w2" in parts:
        values["lokr_w2"] = shared(parts["lokr_w2"].flatten(1) * scaling)
        return ReadDelta("lokr", {"full_matrix": True} | factors, values)
    left, right = _pair(parts, "lokr_w2", "lokr_t2")
    left, right = smallest(shared(left), right.expand(groups, *right.shape))
    values |= {"lokr_w2_a": left, "lokr_w2_b": right}
    return _ranked("lokr", left.shape[-1], scaling, values, **factors)


def _factors(rows: tuple[int, int], columns: tuple[int, int]) -> dict[str, int]:
    """Return the settings with which gift's LoKr splits a matrix like this, smaller parts first."""
    (a, b), (c, d) = rows, columns
    if a > b or c > d:
        raise Incompatible(
            f"it splits a matrix of {a * b} x {c * d} (inputs times kernel) into {rows} x "
            f"{columns}; gift's LoKr has the smaller parts first"
        )
    for factor in (-1, a, c):
        if [factorization(size, factor) for size in (a * b, c * d)] == [rows, columns]:
            return {"factor": factor}
    return {"factor": a, "column_factor": c}


_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_W1 = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_W2 = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})

KOHYA_METHODS = (
    KohyaMethod(
        "LoRA",
        {"lora_up.weight", "lora_down.weight", "lora_mid.weight"},
        [{"lora_up.weight", "lora_down.weight"}],
        {"lora_mid.weight", "dora_scale"},
        [("lora_down.weight", 0)],
        _lora_shapes,
        _lora,
    ),
    KohyaMethod(
        "LoHa",
        _HADA | {"hada_t1", "hada_t2"},
        [_HADA, _HADA | {"hada_t1", "hada_t2"}],
        set(),
        [("hada_w1_b", 0)],
        _loha_shapes,
        _loha,
    ),
    KohyaMethod(
        "LoKr",
        set[str]().union(*_W1, *_W2),
        [first | second for first in _W1 for second in _W2],
        set(),
        [("lokr_w1_b", 0), ("lokr_w2_b", 0)],
        _lokr_shapes,
        _lokr,
    ),
    FULL,
    IA3,
    GLORA,
)
