"""DEFT of PEFT, whose files have the whole of `R`."""

from typing import Any

from gift.interop.peft.forms import Config, Form, Layer, Read, Tensors, Written, plain, same
from gift.interop.peft.layers import AdaptedTensor, kind_of
from gift.methods.deft import DEFT
from gift.methods.settings import is_integer


def write_deft(items: list[AdaptedTensor]) -> Written:
    """Write `P` and what `R` is in the paper."""
    methods: list[Any] = [item.delta.method for item in items]
    rank = max(method.rank for method in methods)
    written = Written()
    alpha = same("alpha", [method.alpha for method in methods], written)
    written.config = {
        "r": rank,
        "alpha": None if alpha is None else plain(alpha),
        "decomposition_method": same("decomposition", [m.decomposition for m in methods], written),
        "init_weights": True,
        "fan_in_fan_out": {kind_of(item.module) for item in items} == {"transposed"},
    }
    for item, method in zip(items, methods, strict=True):
        if method.rank != min(rank, len(item.values["deft_P"])):
            written.problems.append(f"{item.name}: PEFT has one rank for all layers, here {rank}")
        whole = item.values["deft_R"] + _start(method, item.values["deft_P0"], item.frozen)
        written.add(item.path, {"deft_P": item.values["deft_P"], "deft_R": whole})
    return written


def _start(method: DEFT, p: Any, matrix: Any) -> Any:
    """Return where `R` starts: at what `P` takes out of the weight."""
    removed = method.projection(p)[1].mH.to(matrix.dtype) @ matrix
    return (removed / method.scaling).to(p.dtype)


def read_deft(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read `P` and `R`, as the change from where `R` would start with this `P`."""
    if not is_integer(config["r"]) or config["r"] < 1:
        raise ValueError(f"r is {config['r']!r}, expected an integer of at least 1")
    rows, columns = layer.matrix()
    rank = min(config["r"], rows)
    p, r = layer.take("deft_P"), layer.take("deft_R")
    layer.expect("deft_P", p, (rows, rank))
    layer.expect("deft_R", r, (rank, columns))
    settings = {"rank": rank, "alpha": config.get("alpha") or None}
    settings["decomposition"] = config["decomposition_method"]
    method = DEFT(**settings)
    change = r - _start(method, p, layer.outputs_by_inputs()).to(r.dtype)
    values = {"deft_P": p, "deft_R": change, "deft_P0": p.clone()}
    return [Read(layer, "deft", settings, values, layer.path)]


DEFT_FORM = Form(
    peft_type="DEFT",
    methods=("deft",),
    kinds=("linear", "transposed"),
    suffixes=("deft_P", "deft_R"),
    write=write_deft,
    read=read_deft,
    options=frozenset({
        "r", "alpha", "decomposition_method", "init_scale", "init_weights", "deft_dropout", "bias",
    }),
    bias="deft_only",
    defaults={"r": 8, "decomposition_method": "relu"},
)  # fmt: skip
