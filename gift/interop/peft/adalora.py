"""AdaLoRA of PEFT, whose files have only the triplets that were kept."""

from typing import Any

import torch

from gift.interop.peft.forms import (
    Config,
    Form,
    Layer,
    Read,
    Tensors,
    Written,
    common,
    dropout_of,
    plain,
)  # fmt: skip
from gift.interop.peft.layers import CONVOLUTIONS, AdaptedTensor, kind_of
from gift.interop.peft.products import rows_are_outputs
from gift.methods.settings import is_integer

_MORE = 1e-5  # what PEFT adds to the rank that it divides alpha by


def write_adalora(items: list[AdaptedTensor]) -> Written:
    """Write the kept triplets; scalings that differ from the common one go into `lambda`."""
    methods: list[Any] = [item.delta.method for item in items]
    rank, scaling = max(m.rank for m in methods), common([m.scaling for m in methods])
    scaling = scaling if scaling > 0 else 1.0  # PEFT takes the rank for an alpha that is not
    written = Written()
    kept = {}
    for item, method in zip(items, methods, strict=True):
        if kind_of(item.module) in CONVOLUTIONS and not rows_are_outputs(item, written):
            continue
        values, mask = item.values, item.values["adalora_mask"].bool()
        middle = values["adalora_lambda"][mask]
        middle = middle if method.scaling == scaling else middle * (method.scaling / scaling)
        tensors = {
            "lora_A": values["adalora_Q"][mask],
            "lora_E": middle.unsqueeze(-1),
            "lora_B": values["adalora_P"][:, mask],
        }
        written.add(item.path, {name: tensor.contiguous() for name, tensor in tensors.items()})
        kept[f"{item.path}.lora_E"] = mask.tolist() + [False] * (rank - len(mask))
    pruned = not all(all(mask) for mask in kept.values())
    transposed = {kind_of(item.module) for item in items} == {"transposed"}
    written.config = {
        "init_r": rank,
        "target_r": max(1, sum(map(sum, kept.values())) // max(1, len(kept))),
        "lora_alpha": plain(scaling * (rank + _MORE)),
        "lora_dropout": dropout_of(items),
        "total_step": 1,  # PEFT demands one
        "rank_pattern": kept if pruned else None,
        "init_lora_weights": True,
        "fan_in_fan_out": transposed,
    }
    return written


def read_adalora(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read the triplets; of a layer without any, one that is masked."""
    initial, alpha = config["init_r"], config["lora_alpha"]
    if not is_integer(initial) or initial < 1:
        raise ValueError(f"init_r is {initial!r}, expected an integer of at least 1")
    a, e, b = (layer.take(name) for name in ("lora_A", "lora_E", "lora_B"))
    rank = initial
    if config.get("rank_pattern"):
        rank = _kept(config["rank_pattern"], layer, initial)
    rows, columns = layer.matrix()
    shapes = {"lora_A": (rank, columns), "lora_E": (rank, 1), "lora_B": (rows, rank)}
    for suffix, shape in shapes.items():
        layer.expect(suffix, layer.take(suffix), shape)
    scaling = (alpha if alpha > 0 else float(initial)) / (initial + _MORE)
    values = {"adalora_P": b, "adalora_lambda": e.flatten(), "adalora_Q": a}
    if rank == 0:
        values = {
            "adalora_P": b.new_zeros(rows, 1),
            "adalora_lambda": e.new_zeros(1),
            "adalora_Q": a.new_zeros(1, columns),
        }
    largest = min(rows, columns)
    if rank > largest:
        values = _smaller(values, largest)
    own = min(max(rank, 1), largest)
    mask = torch.full((own,), float(rank > 0), dtype=e.dtype)
    settings = {
        "rank": own,
        "alpha": scaling * own,
        "adalora_dropout": config.get("lora_dropout") or 0.0,
    }
    return [Read(layer, "adalora", settings, values | {"adalora_mask": mask}, layer.path)]


def _kept(pattern: Any, layer: Layer, initial: int) -> int:
    """Return how many triplets of a layer the config says were kept."""
    name = f"{layer.path}.lora_E"
    mask = pattern.get(name, [True] * initial) if isinstance(pattern, dict) else None
    if not isinstance(mask, list) or len(mask) != initial or {*map(type, mask)} != {bool}:
        raise ValueError(f"rank_pattern of {name} is not a list of {initial} times True or False")
    return sum(mask)


def _smaller(values: Tensors, largest: int) -> Tensors:
    """Return fewer triplets with the same product, where the rank is above that of the matrix."""
    p, values_, q = values["adalora_P"], values["adalora_lambda"], values["adalora_Q"]
    u, sigma, vh = torch.linalg.svd((p * values_) @ q, full_matrices=False)
    made = {"adalora_P": u, "adalora_lambda": sigma, "adalora_Q": vh}
    assert len(sigma) == largest
    return {name: tensor.contiguous() for name, tensor in made.items()}


ADALORA_FORM = Form(
    peft_type="ADALORA",
    methods=("adalora",),
    kinds=("linear", "transposed", "conv2d"),
    suffixes=("lora_A", "lora_B", "lora_E"),
    write=write_adalora,
    read=read_adalora,
    options=frozenset({
        "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
        "total_step", "rank_pattern", "lora_alpha", "lora_dropout", "r", "bias",
        "init_lora_weights", "megatron_core", "eva_config", "loftq_config", "qalora_group_size",
        "ensure_weight_tying",
    }),
    bias="lora_only",
    defaults={"init_r": 12, "lora_alpha": 8},
)  # fmt: skip
