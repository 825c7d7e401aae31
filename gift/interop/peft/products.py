"""LoHa and LoKr of PEFT."""

from typing import Any, cast

import torch
from torch import Tensor

from gift.interop.peft.forms import (
    Config,
    Form,
    Layer,
    Read,
    Tensors,
    Written,
    common,
    plain,
    size_of_layer,
    sizes,
)  # fmt: skip
from gift.interop.peft.layers import CONVOLUTIONS, AdaptedTensor, kind_of
from gift.methods.loha import LoHa
from gift.methods.lokr import LoKr, factorization

_KINDS = ("linear", "conv1d", "conv2d")
_OPTIONS = frozenset({
    "r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "rank_dropout_scale",
    "module_dropout", "init_weights", "use_effective_conv2d",
})  # fmt: skip
_LOHA = {
    "loha_B1": "hada_w1_a",
    "loha_A1": "hada_w1_b",
    "loha_B2": "hada_w2_a",
    "loha_A2": "hada_w2_b",
}


def _rank_and_alpha(method: Any) -> tuple[int, float]:
    return method.rank, plain(method.rank if method.alpha is None else method.alpha)


def rows_are_outputs(item: AdaptedTensor, written: Written) -> bool:
    """Return whether each output of a layer is one row; if not, add a problem."""
    assert item.delta.layout is not None
    if item.delta.layout.matrix[0] == item.shape[0]:
        return True
    written.problems.append(
        f"{item.name}: PEFT sees a convolution as (out, in * kernel), as gift does under "
        "conv_layout='out_as_h'; this one was adapted in the layout 'balanced'"
    )
    return False


def write_loha(items: list[AdaptedTensor]) -> Written:
    """Write the four factors under PEFT's names."""
    written = Written()
    for item in items:
        if rows_are_outputs(item, written):
            values = item.values
            written.add(item.path, {theirs: values[ours] for ours, theirs in _LOHA.items()})
    found = {item.path: _rank_and_alpha(cast(LoHa, item.delta.method)) for item in items}
    written.config = sizes(found, "alpha") | {"use_effective_conv2d": False}
    return written


def read_loha(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read LoHa with the same rank and alpha."""
    _refuse_core(layer)
    rank, alpha = size_of_layer(config, layer.path, "alpha")
    rows, columns = layer.matrix()
    values = {ours: layer.take(theirs) for ours, theirs in _LOHA.items()}
    for ours, theirs in _LOHA.items():
        shape = (rows, rank) if "B" in ours else (rank, columns)
        layer.expect(theirs, values[ours], shape)
    if rank > min(rows, columns):
        raise ValueError(
            f"its rank {rank} is above {min(rows, columns)}, the largest for LoHa here"
        )
    return [Read(layer, "loha", {"rank": rank, "alpha": alpha}, values, layer.path)]


def _refuse_core(layer: Layer) -> None:
    cores = sorted(key for key in layer.tensors if key.endswith(("t1", "t2")))
    if cores:
        raise ValueError(
            f"it has {cores}, of use_effective_conv2d, for which gift has no counterpart"
        )


# LoKr. In PEFT, the rank decides which factors are decomposed; the others are multiplied out.


def write_lokr(items: list[AdaptedTensor]) -> Written:
    """Write ``w1`` and ``w2``, decomposed where PEFT decomposes them."""
    written = Written()
    items = [item for item in items if rows_are_outputs(item, written)]
    if not items:
        return written
    methods = {item.path: cast(LoKr, item.delta.method) for item in items}
    both = all(method.decompose_both for method in methods.values())
    found: dict[str, tuple[int, float]] = {}
    factor = _factor_for([(p, methods[p.path].factor) for p in items], written)
    for item in [] if written.problems else items:
        values, method = item.values, methods[item.path]
        w1, w2 = _product(values, "lokr_w1"), _product(values, "lokr_w2")
        if method.full_matrix:
            rank = max(w2.shape)  # so large that PEFT decomposes nothing
            found[item.path] = rank, rank
        else:
            found[item.path] = _rank_and_alpha(method)
        written.add(item.path, _lokr_tensors(item, values, w1, w2, found[item.path][0], both))
        if kind_of(item.module) == "conv1d" and f"{item.path}.lokr_w2" in written.tensors:
            written.problems.append(f"{item.name}: {_WRONG_AXES}")
    if not found:
        return written
    written.config = sizes(found, "alpha") | {
        "decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": False,
    }  # fmt: skip
    return written


_WRONG_AXES = "PEFT multiplies the wrong axes of a Conv1d whose w2 it does not decompose"


def _product(values: Tensors, name: str) -> Tensor:
    whole = values.get(name)
    return values[f"{name}_a"] @ values[f"{name}_b"] if whole is None else whole


def _lokr_tensors(
    item: AdaptedTensor, values: Tensors, w1: Tensor, w2: Tensor, rank: int, both: bool
) -> Tensors:  # fmt: skip
    tensors = {"lokr_w1": w1}
    if both and rank < max(w1.shape) / 2:
        a, b = values["lokr_w1_a"], values["lokr_w1_b"]
        tensors = {  # gift limits the rank to what such a matrix can need
            "lokr_w1_a": torch.nn.functional.pad(a, (0, rank - a.shape[1])),
            "lokr_w1_b": torch.nn.functional.pad(b, (0, 0, 0, rank - len(b))),
        }
    kernel = item.shape[2:] if kind_of(item.module) in CONVOLUTIONS else ()
    channels = w2.shape[1] // torch.Size(kernel).numel()
    if rank < max(len(w2), channels) / 2:
        return tensors | {"lokr_w2_a": values["lokr_w2_a"], "lokr_w2_b": values["lokr_w2_b"]}
    return tensors | {"lokr_w2": w2.unflatten(1, (channels, *kernel)) if kernel else w2}


def peft_factorization(size: int, factor: int) -> tuple[int, int]:
    """Split a size as PEFT does: a factor that divides it is used directly, however large."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    return factorization(size, factor)


def _factor_for(found: list[tuple[AdaptedTensor, int]], written: Written) -> int:
    """Return one factor with which PEFT splits all layers as gift did."""
    wanted = []
    for item, factor in found:
        rows, columns = item.frozen.shape
        split = factorization(rows, factor), factorization(columns, factor)
        wanted.append((item, split[0][0], split[1][0]))
    factors = [factor for _, factor in found]
    for candidate in dict.fromkeys([common(factors), *factors]):
        if all(
            peft_factorization(item.shape[0], candidate)[0] == a
            and peft_factorization(item.shape[1], candidate)[0] == c
            for item, a, c in wanted
        ):
            return candidate
    written.problems.append(
        "PEFT splits all layers by one factor, and of a convolution the channels alone: no factor "
        f"gives the parts that these layers have (their factors are {sorted(set(factors))})"
    )
    return -1


def read_lokr(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read LoKr with the same parts; factors of too high a rank are multiplied out."""
    _refuse_core(layer)
    rank, alpha = size_of_layer(config, layer.path, "alpha")
    pairs = [key for key in ("lokr_w1", "lokr_w2") if key not in layer.tensors]
    found = {
        name: layer.take(name).flatten(1)
        for key in ("lokr_w1", "lokr_w2")
        for name in ((f"{key}_a", f"{key}_b") if key in pairs else (key,))
    }
    for key in pairs:
        layer.expect(f"{key}_a", found[f"{key}_a"], (len(found[f"{key}_a"]), rank))
        layer.expect(f"{key}_b", found[f"{key}_b"], (rank, found[f"{key}_b"].shape[1]))
    w1, w2 = _product(found, "lokr_w1"), _product(found, "lokr_w2")
    rows, columns = layer.matrix()
    if (len(w1) * len(w2), w1.shape[1] * w2.shape[1]) != (rows, columns):
        raise ValueError(
            f"its factors {tuple(w1.shape)}, {tuple(w2.shape)} do not make {rows, columns}"
        )
    if layer.kind == "conv1d" and "lokr_w2" not in pairs:
        raise ValueError(_WRONG_AXES)
    settings: dict[str, Any] = {"factor": _own_factor(w1, rows, columns)}
    if "lokr_w2" not in pairs or rank > min(w2.shape):
        values = {"lokr_w1": w1, "lokr_w2": w2 * (alpha / rank)}
        return [Read(layer, "lokr", settings | {"full_matrix": True}, values, layer.path)]
    settings |= {"rank": rank, "alpha": alpha}
    values = {"lokr_w1": w1, **{key: found[key] for key in ("lokr_w2_a", "lokr_w2_b")}}
    if "lokr_w1" in pairs and rank <= min(w1.shape):
        del values["lokr_w1"]
        values |= {key: found[key] for key in ("lokr_w1_a", "lokr_w1_b")}
        settings["decompose_both"] = True
    return [Read(layer, "lokr", settings, values, layer.path)]


def _own_factor(w1: Tensor, rows: int, columns: int) -> int:
    """Return the factor with which gift splits rows and columns in the same way."""
    for factor in (-1, *sorted(set(w1.shape), reverse=True)):
        if (factorization(rows, factor)[0], factorization(columns, factor)[0]) == tuple(w1.shape):
            return factor
    raise ValueError(f"gift has no factor that splits {rows} x {columns} into {tuple(w1.shape)}")


LOHA_FORM = Form(
    peft_type="LOHA",
    methods=("loha",),
    kinds=_KINDS,
    suffixes=(*_LOHA.values(), "hada_t1", "hada_t2"),
    write=write_loha,
    read=read_loha,
    options=_OPTIONS,
    defaults={"r": 8, "alpha": 8},
)
LOKR_FORM = Form(
    peft_type="LOKR",
    methods=("lokr",),
    kinds=_KINDS,
    suffixes=(
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    ),
    write=write_lokr,
    read=read_lokr,
    options=_OPTIONS | {"decompose_both", "decompose_factor"},
    defaults={"r": 8, "alpha": 8},
)  # fmt: skip
