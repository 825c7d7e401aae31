"""Trainable tokens of PEFT."""

from typing import cast

import torch

from gift.interop.peft.forms import Config, Form, Layer, Read, Tensors, Written, same
from gift.interop.peft.layers import AdaptedTensor, kind_of
from gift.methods.trainable_tokens import TrainableTokens, rows_as_text

_KEY = "trainable_tokens_delta"


def write_tokens(items: list[AdaptedTensor]) -> Written:
    """Write the trained rows; PEFT has one list of rows for all layers."""
    written = Written()
    methods = [cast(TrainableTokens, item.delta.method) for item in items]
    same("rows", [method.rows for method in methods], written)
    for item in items:
        if kind_of(item.module) != "embedding":
            written.problems.append(f"{item.name}: PEFT trains tokens of embeddings alone")
        rows, changes = item.values["tokens_R"], item.values["tokens_T"]
        frozen = item.values.get("tokens_S", item.frozen[rows])
        written.add(item.path, {_KEY: frozen.to(changes.dtype) + changes})
    written.config = {"token_indices": methods[0].numbers, "init_weights": True}
    return written


def read_tokens(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read rows, in the ascending order of gift; they do not depend on those of the base."""
    values, numbers = layer.take(_KEY), config["token_indices"]
    layer.expect(_KEY, values, (len(numbers), layer.matrix(False)[1]))
    if len(set(numbers)) < len(numbers):
        raise ValueError("token_indices has the same number twice")
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    settings = {"rows": rows_as_text(numbers), "new": True}
    own = {"tokens_T": torch.zeros_like(values), "tokens_S": values[order]}
    return [Read(layer, "trainable_tokens", settings, own, layer.path)]


TOKENS_FORM = Form(
    peft_type="TRAINABLE_TOKENS",
    methods=("trainable_tokens",),
    kinds=("embedding", "linear"),  # a head that is tied
    suffixes=(_KEY,),
    write=write_tokens,
    read=read_tokens,
    options=frozenset({"token_indices", "init_weights"}),
    defaults={"token_indices": []},
    ties=True,
)
