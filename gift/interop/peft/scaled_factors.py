"""DeLoRA and HiRA of PEFT, whose factors are those of LoRA and mean something else."""

import torch

from gift.interop.peft.forms import (
    Config,
    Form,
    Layer,
    Read,
    Tensors,
    Written,
    by_layer,
)  # fmt: skip
from gift.interop.peft.layers import CONVOLUTIONS, AdaptedTensor, kind_of
from gift.interop.peft.names import by_pattern
from gift.interop.peft.products import rows_are_outputs


def _ranks(items: list[AdaptedTensor]) -> Config:
    return by_layer("r", "rank_pattern", {item.path: item.delta.method.size for item in items})


def _rank_of(layer: Layer, config: Config) -> int:
    rank: int = by_pattern(config.get("rank_pattern"), layer.path, config["r"])
    return rank


# DeLoRA. PEFT saves the norms of the frozen columns too.

_DELORA = {"delora_A": "delora_A", "delora_B": "delora_B", "delora_lambda": "delora_lambda",
           "delora_w_norm": "delora_c"}  # fmt: skip


def write_delora(items: list[AdaptedTensor]) -> Written:
    """Write factors, strength and norms."""
    written = Written(config=_ranks(items) | {"init_weights": True})
    for item in items:
        values = item.values
        written.add(item.path, {theirs: values[ours] for theirs, ours in _DELORA.items()})
    return written


def read_delora(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read DeLoRA, whose norms must be those of the network's own weight."""
    rows, columns = layer.matrix()
    rank = _rank_of(layer, config)
    shapes = {
        "delora_A": (rank, columns), "delora_B": (rows, rank), "delora_lambda": (1,),
        "delora_w_norm": (columns,),
    }  # fmt: skip
    for suffix, shape in shapes.items():
        layer.expect(suffix, layer.take(suffix), shape)
    norms = layer.take("delora_w_norm")
    own = torch.linalg.vector_norm(layer.outputs_by_inputs().double(), dim=0)
    close = 32 * torch.finfo(norms.dtype).eps
    if not torch.allclose(norms.double(), own, rtol=close, atol=close):
        raise ValueError("delora_w_norm is not the norm of this network's weight: another base")
    names = ("delora_B", "delora_A", "delora_lambda")
    values = {name: layer.take(name) for name in names}
    return [Read(layer, "delora", {"rank": rank}, values, layer.path)]


DELORA_FORM = Form(
    peft_type="DELORA",
    methods=("delora",),
    kinds=("linear",),
    suffixes=tuple(_DELORA),
    write=write_delora,
    read=read_delora,
    options=frozenset({
        "r", "rank_pattern", "delora_lambda", "lambda_pattern", "module_dropout", "init_weights",
        "bias",
    }),
    bias="delora_only",
    defaults={"r": 8},
)  # fmt: skip


# HiRA. Of embeddings PEFT has the factors of the transposed table.


def write_hira(items: list[AdaptedTensor]) -> Written:
    """Write the factors."""
    written = Written(config=_ranks(items) | {"init_weights": True})
    for item in items:
        b, a = item.values["hira_B"], item.values["hira_A"]
        kind = kind_of(item.module)
        if kind == "embedding":
            tensors = {"hira_embedding_A": b.mT, "hira_embedding_B": a.mT}
        elif kind in CONVOLUTIONS:
            if not rows_are_outputs(item, written):
                continue
            channels, *kernel = item.shape[1:]
            ones = [1] * len(kernel)
            tensors = {
                "hira_A": a.unflatten(1, (channels, *kernel)),
                "hira_B": b.unflatten(1, (-1, *ones)),
            }
        else:
            tensors = {"hira_A": a, "hira_B": b}
        written.add(item.path, tensors)
    written.config["fan_in_fan_out"] = {kind_of(item.module) for item in items} == {"transposed"}
    return written


def read_hira(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read HiRA with the same factors."""
    rank = _rank_of(layer, config)
    if layer.kind == "embedding":
        b, a = layer.take("hira_embedding_A").mT, layer.take("hira_embedding_B").mT
    else:
        b, a = layer.take("hira_B").flatten(1), layer.take("hira_A").flatten(1)
    rows, columns = layer.matrix(outputs=False)
    layer.expect("the left factor", b, (rows, rank))
    layer.expect("the right factor", a, (rank, columns))
    return [Read(layer, "hira", {"rank": rank}, {"hira_B": b, "hira_A": a}, layer.path)]


HIRA_FORM = Form(
    peft_type="HIRA",
    methods=("hira",),
    kinds=("linear", "transposed", "embedding", *CONVOLUTIONS),
    suffixes=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    write=write_hira,
    read=read_hira,
    options=frozenset({"r", "rank_pattern", "hira_dropout", "init_weights"}),
    defaults={"r": 32},
)
