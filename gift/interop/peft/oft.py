"""OFT of PEFT, as far as it computes rotations exactly or up to rounding, and BOFT."""

import math
from typing import Any, cast

import torch
from torch import Tensor

from gift.interop.peft.forms import Config, Form, Layer, Read, Tensors, Written, same
from gift.interop.peft.layers import CONVOLUTIONS, AdaptedTensor, kind_of
from gift.methods.boft import BOFT
from gift.methods.oft import OFT
from gift.methods.settings import is_integer


def write_oft(items: list[AdaptedTensor]) -> Written:
    """Write the blocks for ``use_cayley_neumann=False``, where PEFT has the opposite sign."""
    written = Written()
    methods = [cast(OFT, item.delta.method) for item in items]
    share = same("block_share", [method.block_share for method in methods], written)
    for item in items:
        name = "oft_embedding_R" if kind_of(item.module) == "embedding" else "oft_R"
        written.problems += [f"{item.name}: {text}" for text in _incompatibilities(item.module)]
        blocks = _turned(item.values["oft_Q"], item.module)
        written.add(item.path, {f"{name}.weight": blocks})
    columns = [item.frozen.shape[-1] for item in items]
    found = [
        (size, cast(int, method.block_size)) for size, method in zip(columns, methods, strict=True)
    ]
    written.config = {
        **_size_for(found, written),
        "block_share": share,
        "use_cayley_neumann": False,
        "coft": False,
        "init_weights": True,
    }
    return written


def _turned(blocks: Tensor, module: torch.nn.Module) -> Tensor:
    """Convert blocks to or from PEFT's sign of exact rotations; embeddings need no change."""
    return blocks if kind_of(module) == "embedding" else -blocks


def _incompatibilities(module: Any) -> list[str]:
    if kind_of(module) in CONVOLUTIONS and set(module.kernel_size) != {1}:
        return ["PEFT sums overlapping patches of the input, which is another convolution"]
    return []


def _size_for(found: list[tuple[int, int]], written: Written) -> Config:
    """Return one block size, or number of blocks, with which each layer gets its own size in PEFT.

    Args:
        found: columns and block size of each layer.
        written: collects problems.
    """
    if len({columns // size for columns, size in found}) == 1:
        columns, size = found[0]
        return {"r": columns // size, "oft_block_size": 0}
    for size in dict.fromkeys([*(size for _, size in found), OFT.default_block_size]):
        if all(adjusted(columns, size) == own for columns, own in found):
            return {"r": 0, "oft_block_size": size}
    sizes = sorted({size for _, size in found})
    written.problems.append(f"PEFT has one block size for all layers, here they have {sizes}")
    return {}


def adjusted(columns: int, size: int) -> int:
    """Return what PEFT makes of a block size: the nearest one that divides the columns."""
    if size >= columns:
        return columns
    divisors = [n for n in range(1, columns + 1) if columns % n == 0]
    return min(divisors, key=lambda n: (abs(n - size), n))


def read_oft(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read OFT with the same rotations."""
    for text in _incompatibilities(layer.module):
        raise ValueError(text)
    name = "oft_embedding_R.weight" if layer.kind == "embedding" else "oft_R.weight"
    blocks, columns = layer.take(name), layer.matrix(outputs=False)[-1]
    size = (1 + math.isqrt(1 + 8 * blocks.shape[-1])) // 2
    share = bool(config.get("block_share"))
    layer.expect(name, blocks, (1 if share else columns // size, size * (size - 1) // 2))
    if config.get("use_cayley_neumann", True):
        terms = config.get("num_cayley_neumann_terms", 5)
        _check_series(blocks, size, terms)
        blocks = -blocks
    settings = {"block_size": size, "block_share": share}
    return [Read(layer, "oft", settings, {"oft_Q": _turned(blocks, layer.module)}, layer.path)]


def _check_series(blocks: Tensor, size: int, terms: int) -> None:
    """Raise a `ValueError` if PEFT's truncated series is not a rotation, up to rounding."""
    if not is_integer(terms) or not 1 <= terms <= 1000:
        raise ValueError(f"num_cayley_neumann_terms is {terms!r}, expected an integer up to 1000")
    row, column = torch.triu_indices(size, size, 1)
    skew = torch.zeros(len(blocks), size, size, dtype=torch.float64)
    skew[:, row, column] = blocks.double()
    skew = skew - skew.mT
    one = torch.eye(size, dtype=torch.float64)
    terms = 4 if terms == 3 else terms  # PEFT computes the same for both
    series, power = one, one
    for exponent in range(1, terms):
        power = power @ skew
        series = series + (1 if exponent == terms - 1 > 2 else 2) * power
    error = (series - torch.linalg.solve(one - skew, one + skew)).abs().max().item()
    if error > 32 * torch.finfo(blocks.dtype).eps:
        raise ValueError(
            f"its rotations are cut series of {terms} terms (use_cayley_neumann=True), here off by "
            f"{error:.1e}: gift computes them exactly, as PEFT does under use_cayley_neumann=False"
        )


OFT_FORM = Form(
    peft_type="OFT",
    methods=("oft",),
    kinds=("linear", "conv2d", "embedding"),
    suffixes=("oft_R.weight", "oft_embedding_R.weight"),
    write=write_oft,
    read=read_oft,
    options=frozenset({
        "r", "oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
        "eps", "module_dropout", "init_weights", "bias",
    }),
    bias="oft_only",
)  # fmt: skip


# BOFT. PEFT holds whole blocks, of which the skew-symmetric part counts, with the opposite sign.


def write_boft(items: list[AdaptedTensor]) -> Written:
    """Write skew-symmetric blocks; PEFT computes several factors on CUDA only."""
    written = Written()
    methods = [cast(BOFT, item.delta.method) for item in items]
    factors = same("n_factors", [method.n_factors for method in methods], written)
    for item in items:
        written.problems += [f"{item.name}: {text}" for text in _odd_convolution(item.module)]
        values = item.values
        blocks = _skew(values["boft_Q"], cast(int, cast(BOFT, item.delta.method).block_size))
        scales = values.get("boft_s", torch.ones_like(item.frozen[:, :1]))
        of_convolution = kind_of(item.module) in CONVOLUTIONS
        tensors = {"boft_R": -blocks, "boft_s": scales.mT if of_convolution else scales}
        written.add(item.path, tensors)
    sizes = {cast(int, method.block_size) for method in methods}
    counts = {item.values["boft_Q"].shape[1] for item in items}
    if len(sizes) > 1 < len(counts):
        written.problems.append(
            f"PEFT has one block size, or number of blocks, for all layers, here they have sizes "
            f"{sorted(sizes)} and numbers {sorted(counts)}"
        )
    one_size = len(sizes) == 1
    written.config = {
        "boft_block_size": sizes.pop() if one_size else 0,
        "boft_block_num": 0 if one_size else counts.pop(),
        "boft_n_butterfly_factor": factors,
        "init_weights": True,
    }
    return written


def _skew(upper: Tensor, size: int) -> Tensor:
    """Return skew-symmetric matrices with these upper triangles."""
    row, column = torch.triu_indices(size, size, 1)
    whole = upper.new_zeros(*upper.shape[:-1], size, size)
    whole[..., row, column] = upper
    return whole - whole.mT


def _odd_convolution(module: Any) -> list[str]:
    """Say what PEFT leaves out of a convolution, of which it reads the first axis alone."""
    if kind_of(module) not in CONVOLUTIONS:
        return []
    attributes = {
        "kernel_size": module.kernel_size, "stride": module.stride, "padding": module.padding,
    }  # fmt: skip
    found = [
        f"PEFT takes {name}={value} for that of a square convolution"
        for name, value in attributes.items()
        if isinstance(value, str) or len(set(value)) > 1
    ]
    if set(module.dilation) != {1}:
        found.append(f"PEFT ignores dilation={module.dilation}")
    return found


def read_boft(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read BOFT with the same rotations and scales."""
    for text in _odd_convolution(layer.module):
        raise ValueError(text)
    blocks, scales = layer.take("boft_R"), layer.take("boft_s")
    rows, columns = layer.matrix()
    size = max(1, blocks.shape[-1])
    layer.expect("boft_R", blocks, (len(blocks), columns // size, size, size))
    scale_shape = (1, rows) if layer.kind in CONVOLUTIONS else (rows, 1)
    layer.expect("boft_s", scales, scale_shape)
    row, column = torch.triu_indices(size, size, 1)
    upper = (blocks.mT - blocks)[..., row, column] / 2
    values = {"boft_Q": upper, "boft_s": scales.reshape(rows, 1)}
    settings = {"block_size": size, "n_factors": len(blocks)}
    return [Read(layer, "boft", settings, values, layer.path)]


BOFT_FORM = Form(
    peft_type="BOFT",
    methods=("boft",),
    kinds=("linear", "conv2d"),
    suffixes=("boft_R", "boft_s"),
    write=write_boft,
    read=read_boft,
    options=frozenset({
        "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout",
        "init_weights", "bias",
    }),
    bias="boft_only",
)  # fmt: skip
