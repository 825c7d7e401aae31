"""Reading LoRA, rsLoRA and DoRA of PEFT; `gift.interop.peft.lora_writing` writes them."""

import math
from dataclasses import replace
from typing import Any

import torch

from gift.core.dynamic_class import joined
from gift.interop.factors import magnitude_change, smallest
from gift.interop.peft.forms import (
    Config,
    Form,
    Layer,
    Read,
    Tensors,
    size_of_layer,
)  # fmt: skip
from gift.interop.peft.layers import KINDS
from gift.interop.peft.lora_writing import (
    OUT_PROJ,
    TWICE,
    alpha_for,
    is_transposed,
    parameter_incompatibilities,
    write_lora,
)  # fmt: skip


def read_lora(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read LoRA, rsLoRA or DoRA with the same rank and scaling."""
    if layer.single:
        for problem in parameter_incompatibilities(layer.module, layer.layout(False)):
            raise ValueError(problem)
        return [_read(layer, config, joined(layer.path, layer.tensor), None)]
    if layer.kind == "attention":
        projection = layer.network.get_submodule(f"{layer.path}.out_proj")
        parts = (replace(layer, tensor="in_proj_weight"), ""), (
            replace(layer, path=f"{layer.path}.out_proj", module=projection), OUT_PROJ
        )  # fmt: skip
        reads = [_read(part, config, layer.path, layer.path, inside) for part, inside in parts]
        if torch.count_nonzero(reads[1].values["lora_B"] @ reads[1].values["lora_A"]):
            raise ValueError(TWICE)
        return reads
    return [_read(layer, config, layer.path, layer.path)]


def _read(
    layer: Layer, config: Config, name: str, claimed: str | None, inside: str = ""
) -> Read:  # fmt: skip
    dora = bool(config.get("use_dora"))
    embedding = layer.kind == "embedding" and claimed is not None
    keys = (
        ("lora_embedding_A", "lora_embedding_B")
        if embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    a, b = (layer.take(inside + key) for key in keys)
    rank, alpha = size_of_layer(config, name, "lora_alpha")
    if claimed is None and len(layer.weight.shape) == 3:
        experts = len(layer.weight)
        a = a.unflatten(0, (experts, -1))
        b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
        if is_transposed(layer.module):
            a, b = b.mT, a.mT
        a, b = (a[0], b[0]) if experts == 1 else (a, b)
    elif not embedding:
        a, b = a.flatten(1), b.flatten(1)
    if embedding and not dora:
        a, b = b.T, a.T
    layer.expect("lora_A", a, (*a.shape[:-2], rank, layer.matrix(dora)[-1]))
    layer.expect("lora_B", b, (*a.shape[:-2], layer.matrix(dora)[-2], rank))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    b, a = smallest(b, a)
    if a.shape[-2] < rank:
        rank = a.shape[-2]
        alpha = alpha_for(scaling, rank, bool(config.get("use_rslora")))
    settings: dict[str, Any] = {"rank": rank, "lora_alpha": alpha}
    settings["lora_dropout"] = 0.0 if claimed is None else config.get("lora_dropout") or 0.0
    values = {"lora_B": b, "lora_A": a}
    if dora:
        settings["use_rslora"] = bool(config.get("use_rslora"))
        magnitude, weight = layer.take("lora_magnitude_vector"), layer.outputs_by_inputs()
        if magnitude.numel() != len(weight):
            layer.expect("lora_magnitude_vector", magnitude, (len(weight),))
        values["dora_delta_m"] = magnitude_change(magnitude, weight)
        return Read(layer, "dora", settings, values, claimed)
    return Read(layer, "rslora" if config.get("use_rslora") else "lora", settings, values, claimed)


LORA_FORM = Form(
    peft_type="LORA",
    methods=("lora", "rslora", "dora", "lora_fa", "pissa", "olora", "guided"),
    kinds=tuple(dict.fromkeys(KINDS.values())),
    suffixes=(
        "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B",
        "lora_magnitude_vector",
    ),
    write=write_lora,
    read=read_lora,
    options=frozenset({
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
        "lora_dropout", "bias", "target_parameters", "init_lora_weights", "ensure_weight_tying",
        "megatron_core", "eva_config", "loftq_config", "qalora_group_size",
    }),
    bias="lora_only",
    defaults={"r": 8, "lora_alpha": 8},
)  # fmt: skip
