"""GLoRA of PEFT, which has one rank and one form for all layers."""

from typing import Any

import torch
from torch import Tensor

from gift.interop.factors import smallest
from gift.interop.peft.forms import Config, Form, Layer, Read, Tensors, Written, same
from gift.interop.peft.layers import AdaptedTensor
from gift.methods.settings import is_integer

_FORMS = {"config_A_B": "a_b", "config_C": "c", "config_D_E": "d_e"}


def write_glora(items: list[AdaptedTensor]) -> Written:
    """Write the support tensors; factors of a lower rank than others get zeros beside them."""
    methods: list[Any] = [item.delta.method for item in items]
    rank = max(method.rank for method in methods)
    written = Written(config={"r": rank, "init_weights": True})
    for theirs, ours in _FORMS.items():
        written.config[theirs] = same(ours, [getattr(m, ours) for m in methods], written)
    for item in items:
        rows, columns = item.shape
        config, values = written.config, item.values
        biased = item.module.bias is not None
        tensors: Tensors = {}
        for name, shape, form in (
            ("A", (rows, columns), config["config_A_B"]),
            ("B", (rows, columns), config["config_A_B"]),
            ("C", (columns, 1), config["config_C"] if biased else "none"),
            ("D", (rows,), config["config_D_E"] if biased else "none"),
            ("E", (rows,), config["config_D_E"] if biased else "none"),
        ):
            for key, tensor in _written(name, shape, form, values, rank, item).items():
                tensors[f"glora_{name}.{key}"] = tensor
        written.add(item.path, tensors)
    return written


def _written(
    name: str, shape: tuple[int, ...], form: str, values: Tensors, rank: int, item: AdaptedTensor
) -> Tensors:
    """Return a support tensor by the names of PEFT; zeros where gift has none."""
    like = next(iter(values.values()))
    if form == "none":
        return {"zeros": like.new_zeros(shape)}
    if form == "lora":
        first, last = like.new_zeros(shape[0], rank), like.new_zeros(rank, shape[1])
        if f"glora_{name}_d" in values:
            own = values[f"glora_{name}_d"].shape[1]
            first[:, :own] = values[f"glora_{name}_d"]
            last[:own] = values[f"glora_{name}_u"]
        return {"Xd": first, "Xu": last}
    whole = values.get(f"glora_{name}")
    count = shape[0] if form == "vector" else 1
    if whole is None:
        whole = like.new_zeros(count, 1)
    keeps_axis = form == "vector" and len(shape) == 2
    return {"X": whole if keeps_axis else whole.flatten()}


def read_glora(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read the support tensors of a layer."""
    rank = config["r"]
    if not is_integer(rank) or rank < 1:
        raise ValueError(f"r is {rank!r}, expected an integer of at least 1")
    rows, columns = layer.matrix()
    own = min(rank, rows, columns)
    forms = {ours: config[theirs] for theirs, ours in _FORMS.items()}
    if forms["a_b"] == "none":
        raise ValueError("config_A_B is 'none', and gift has A and B for each weight")
    values: Tensors = {}
    of = {"A": "a_b", "B": "a_b", "C": "c", "D": "d_e", "E": "d_e"}
    biased = layer.module.bias is not None
    for name, setting in of.items():
        form = forms[setting]
        if form == "none" or (not biased and name in "CDE"):
            continue
        if form == "lora":
            first, last = (layer.take(f"glora_{name}.{key}") for key in ("Xd", "Xu"))
            shape = (columns, 1) if name == "C" else (rows, columns)
            layer.expect(f"glora_{name}.Xd", first, (shape[0], rank))
            layer.expect(f"glora_{name}.Xu", last, (rank, shape[1]))
            first, last = _of_rank(first, last, own)
            values |= {f"glora_{name}_d": first, f"glora_{name}_u": last}
        else:
            whole = layer.take(f"glora_{name}.X")
            count = 1 if form == "constant" else columns if name == "C" else rows
            if whole.numel() != count:
                layer.expect(f"glora_{name}.X", whole, (count,))
            values[f"glora_{name}"] = whole.reshape(count, 1)
    return [Read(layer, "glora", {"rank": own, **forms}, values, layer.path)]


def _of_rank(first: Tensor, last: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of a product in the rank that gift has for the layer."""
    if last.shape[0] <= rank:
        return first, last
    first, last = smallest(first, last)
    more = rank - last.shape[0]
    return (
        torch.cat([first, first.new_zeros(first.shape[0], more)], 1),
        torch.cat([last, last.new_zeros(more, last.shape[1])]),
    )


GLORA_FORM = Form(
    peft_type="GLORA",
    methods=("glora",),
    kinds=("linear",),
    suffixes=(
        "glora_A.Xd", "glora_A.Xu", "glora_A.X", "glora_A.zeros",
        "glora_B.Xd", "glora_B.Xu", "glora_B.X", "glora_B.zeros",
        "glora_C.Xd", "glora_C.Xu", "glora_C.X", "glora_C.zeros",
        "glora_D.X", "glora_D.zeros", "glora_E.X", "glora_E.zeros",
    ),
    write=write_glora,
    read=read_glora,
    options=frozenset({"r", "config_A_B", "config_C", "config_D_E", "init_weights", "bias"}),
    bias="glora_only",
    defaults={"r": 8, "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"},
)  # fmt: skip
