"""C3A, GraLoRA and MiSS of PEFT, which cut a weight into blocks."""

from typing import cast

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
    same,
)  # fmt: skip
from gift.interop.peft.layers import AdaptedTensor, kind_of
from gift.interop.peft.names import ends_with
from gift.methods.gralora import GraLoRA

# C3A. PEFT computes in float32, whatever the layer's dtype is.


def write_c3a(items: list[AdaptedTensor]) -> Written:
    """Write the kernels; block sizes that few layers have become patterns."""
    written = Written()
    sizes = {item.path: item.values["c3a_w"].shape[-1] for item in items}
    for item in items:
        written.add(item.path, {"c3a_kernel": item.values["c3a_w"]})
    most = common(list(sizes.values()))
    # PEFT looks for the whole name, but before that for any pattern that ends a name after a dot.
    patterns = {path: size for path, size in sizes.items() if size != most}
    for path, size in sizes.items():
        mistaken = [p for p in patterns if p != path and ends_with(path, [p])]
        if any(patterns[p] != size for p in mistaken):
            written.problems.append(
                f"{path}: PEFT would give it the block size of {mistaken[0]}, whose name ends its"
            )
    written.config = {
        "block_size": most, "block_size_pattern": patterns, "init_weights": True,
    }  # fmt: skip
    return written


def read_c3a(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read C3A with the blocks of the file."""
    kernels = layer.take("c3a_kernel")
    rows, columns = layer.matrix()
    size = max(1, kernels.shape[-1])
    layer.expect("c3a_kernel", kernels, (rows // size, columns // size, size))
    return [Read(layer, "c3a", {"block_size": size}, {"c3a_w": kernels}, layer.path)]


C3A_FORM = Form(
    peft_type="C3A",
    methods=("c3a",),
    kinds=("linear",),
    suffixes=("c3a_kernel",),
    write=write_c3a,
    read=read_c3a,
    options=frozenset({"block_size", "block_size_pattern", "init_weights", "bias"}),
    bias="c3a_only",
)


# GraLoRA. PEFT has both factors transposed, and no patterns.


def write_gralora(items: list[AdaptedTensor]) -> Written:
    """Write the factors of all blocks."""
    written = Written()
    methods = [cast(GraLoRA, item.delta.method) for item in items]
    rank = same("the rank of GraLoRA", [method.rank for method in methods], written)
    scaling = same("the scaling of GraLoRA", [method.scaling for method in methods], written)
    for item in items:
        factors = {key: item.values[key].mT for key in ("gralora_A", "gralora_B")}
        written.add(item.path, factors)
    written.config = {
        "r": rank,
        "alpha": plain(scaling * rank),
        "gralora_k": same("n_blocks", [method.n_blocks for method in methods], written),
        "hybrid_r": 0,
        "fan_in_fan_out": {kind_of(item.module) for item in items} == {"transposed"},
        "init_weights": True,
    }
    return written


def read_gralora(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read GraLoRA with the same blocks, rank and alpha."""
    b, a = layer.take("gralora_B").mT, layer.take("gralora_A").mT
    rows, columns = layer.matrix()
    rank, k = config["r"], len(b)
    layer.expect("gralora_B", b.mT, (k, rank, rows // k))
    layer.expect("gralora_A", a.mT, (k, columns // k, rank))
    settings = {"rank": rank, "alpha": config["alpha"], "n_blocks": k}
    values = {"gralora_B": b, "gralora_A": a}
    return [Read(layer, "gralora", settings, values, layer.path)]


GRALORA_FORM = Form(
    peft_type="GRALORA",
    methods=("gralora",),
    kinds=("linear", "transposed"),
    suffixes=("gralora_A", "gralora_B"),
    write=write_gralora,
    read=read_gralora,
    options=frozenset({"r", "alpha", "gralora_k", "gralora_dropout", "init_weights", "bias"}),
    bias="gralora_only",
    defaults={"r": 32, "alpha": 64},
)


# MiSS. PEFT has the shard transposed, and no patterns.


def write_miss(items: list[AdaptedTensor]) -> Written:
    """Write the shards."""
    written = Written()
    for item in items:
        written.add(item.path, {"miss_block": item.values["miss_D"].mT})
    ranks = [item.delta.method.size for item in items]
    written.config = {"r": same("the rank of MiSS", ranks, written), "init_weights": True}
    return written


def read_miss(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read MiSS; the variant "mini" repeats its shard for the outputs too."""
    variant, shard = config.get("init_weights"), layer.take("miss_block")
    if variant == "bat":
        raise ValueError("init_weights='bat' is another function, without counterpart in gift")
    rows, _ = layer.matrix()
    rank: int = config["r"]
    if variant == "mini":
        shard = _repeated(shard, rows)
    layer.expect("miss_block", shard, (rank, rows))
    return [Read(layer, "miss", {"rank": rank}, {"miss_D": shard.mT}, layer.path)]


def _repeated(shard: Tensor, rows: int) -> Tensor:
    return shard.repeat(1, rows // max(1, shard.shape[1]))


MISS_FORM = Form(
    peft_type="MISS",
    methods=("miss",),
    kinds=("linear",),
    suffixes=("miss_block",),
    write=write_miss,
    read=read_miss,
    options=frozenset({"r", "mini_r", "miss_dropout", "init_weights", "bias"}),
    bias="miss_only",
    defaults={"r": 64},
)
