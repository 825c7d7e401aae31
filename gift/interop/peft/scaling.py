"""(IA)^3 and VeRA of PEFT."""

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from gift.core.weights.record import weight_deltas
from gift.interop.peft.forms import (
    Config,
    Form,
    Layer,
    Read,
    Tensors,
    Written,
    dropout_of,
    same,
)  # fmt: skip
from gift.interop.peft.layers import CONVOLUTIONS, AdaptedTensor, kind_of
from gift.interop.peft.names import matches
from gift.methods.ia3 import IA3
from gift.methods.vera import VeRA


def write_ia3(items: list[AdaptedTensor]) -> Written:
    """Write factors of outputs, or of inputs in `feedforward_modules`."""
    written = Written()
    feedforward = [p.path for p in items if cast(IA3, p.delta.method).feedforward]
    for item in items:
        factors = item.values["ia3_l"]
        if item.path in feedforward:
            factors = _of_channels(item, factors, written)
        else:
            written.problems += bias_incompatibilities(item, "scales")
        shape: tuple[int, ...] = (1, -1) if item.path in feedforward else (-1, 1)
        if kind_of(item.module) in CONVOLUTIONS:
            shape = (1, -1, *[1] * (len(item.shape) - 2))
        written.add(item.path, {"ia3_l": factors.reshape(shape)})
    kinds = {kind_of(item.module) for item in items}
    # A regular expression, because a list would match all names with these endings.
    written.config = {
        "feedforward_modules": "|".join(map(_escaped, sorted(feedforward))) if feedforward else [],
        "fan_in_fan_out": kinds == {"transposed"},
        "init_ia3_weights": True,
    }
    return written


def bias_incompatibilities(item: AdaptedTensor, does: str) -> Iterator[str]:
    """Yield that a bias was not adapted with its weight, if so, and what PEFT does with outputs."""
    if getattr(item.module, "bias", None) is not None and "bias" not in weight_deltas(item.module):
        yield (
            f"{item.name}: PEFT {does} what the layer gives, its bias included, which was not "
            "adapted here (ma_adapt does that, pa_adapt does not)"
        )


def _escaped(path: str) -> str:
    return path.replace(".", r"\.")


def _of_channels(item: AdaptedTensor, factors: Tensor, written: Written) -> Tensor:
    """Return one factor for each input channel; gift has one for each position in the kernel."""
    kernel = math.prod(item.shape[2:]) if kind_of(item.module) in CONVOLUTIONS else 1
    factors = factors.reshape(-1, kernel)
    if not torch.equal(factors, factors[:, :1].expand_as(factors)):
        written.problems.append(
            f"{item.name}: PEFT scales input channels as a whole, here the positions in the "
            "kernel have factors of their own"
        )
    return factors[:, 0]


def read_ia3(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read (IA)^3; factors of a convolution's input channels are repeated for each position."""
    modules = config.get("feedforward_modules")
    if modules is None:
        raise ValueError("the configuration does not say which layers are feedforward_modules")
    found = (
        matches(modules, layer.path)
        if isinstance(modules, str)
        else layer.path.endswith(tuple(modules))
    )
    feedforward = bool(modules) and bool(found)
    groups = layer.module.groups if layer.kind in CONVOLUTIONS else 1
    rows, columns = layer.matrix()[-2:]
    factors, kernel = layer.take("ia3_l"), math.prod(layer.weight.shape[2:])
    features = groups * (columns // kernel if feedforward else rows)
    if factors.numel() != features:
        layer.expect("ia3_l", factors, (1, features) if feedforward else (features, 1))
    if feedforward:
        factors = factors.flatten().repeat_interleave(kernel)
    shape = (*layer.matrix()[:-2], *((1, columns) if feedforward else (rows, 1)))
    values = {"ia3_l": factors.reshape(shape)}
    return [Read(layer, "ia3", {"feedforward": feedforward}, values, layer.path)]


IA3_FORM = Form(
    peft_type="IA3",
    methods=("ia3",),
    kinds=("linear", "transposed", "conv2d", "conv3d"),
    suffixes=("ia3_l",),
    write=write_ia3,
    read=read_ia3,
    options=frozenset({"feedforward_modules", "init_ia3_weights"}),
)


# VeRA. In PEFT, all layers share one pair, and each uses its leading part.


def write_vera(items: list[AdaptedTensor]) -> Written:
    """Write one pair, large enough for all; differences in scale go into each layer's `d`."""
    written = Written()
    methods = [cast(VeRA, item.delta.method) for item in items]
    rank = same("the rank of VeRA", [method.rank for method in methods], written)
    a, b = (
        _largest([p.values[key] for p in items], axis)
        for key, axis in (("vera_A", 1), ("vera_B", 0))
    )
    for item in [] if written.problems else items:
        values, (rows, columns) = item.values, item.frozen.shape
        scale = _ratio(values["vera_A"], a[:, :columns]) * _ratio(values["vera_B"], b[:rows])
        if not math.isfinite(scale):
            written.problems.append(
                f"{item.name}: in PEFT all layers share one random pair, this one has another "
                "(its seed, perhaps)"
            )
        written.add(item.path, {
            "vera_lambda_b": values["vera_b"], "vera_lambda_d": values["vera_d"] * scale,
        })  # fmt: skip
    written.shared = {"base_model.vera_A": a, "base_model.vera_B": b}
    written.config = {
        "r": rank,
        "vera_dropout": dropout_of(items),
        "save_projection": True,
        "projection_prng_key": 0,
        "fan_in_fan_out": {kind_of(item.module) for item in items} == {"transposed"},
    }
    return written


def _largest(tensors: list[Tensor], axis: int) -> Tensor:
    return max(tensors, key=lambda tensor: tensor.shape[axis])


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Return the number by which `whole` must be multiplied to give `part`; NaN if there is none.

    Both are float32 values times a scale, rounded to float32.
    """
    if part.shape != whole.shape:
        return math.nan
    if torch.equal(part, whole):
        return 1.0
    one, other = part.double(), whole.double()
    ratio = (one * other).sum() / other.square().sum()
    return ratio.item() if torch.allclose(one, ratio * other, rtol=1e-6, atol=0) else math.nan


def read_vera(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read VeRA with the pair of the file, which is then saved with the delta."""
    if not {"base_model.vera_A", "base_model.vera_B"} <= set(shared):
        raise ValueError(
            "the file has no vera_A and vera_B, which PEFT draws anew on each system: save with "
            "save_projection=True"
        )
    rows, columns = layer.matrix()
    b, d = layer.take("vera_lambda_b"), layer.take("vera_lambda_d")
    values = {
        "vera_b": b,
        "vera_d": d,
        "vera_A": shared["base_model.vera_A"][:, :columns],
        "vera_B": shared["base_model.vera_B"][:rows],
    }
    rank: int = config["r"]
    shapes = {
        "vera_b": (rows,),
        "vera_d": (rank,),
        "vera_A": (rank, columns),
        "vera_B": (rows, rank),
    }
    for name, shape in shapes.items():
        layer.expect(name, values[name], shape)
    settings = {
        "rank": rank, "vera_dropout": config.get("vera_dropout") or 0.0, "save_projection": True,
    }  # fmt: skip
    return [Read(layer, "vera", settings, values, layer.path)]


VERA_FORM = Form(
    peft_type="VERA",
    methods=("vera",),
    kinds=("linear", "transposed"),
    suffixes=("vera_lambda_b", "vera_lambda_d"),
    write=write_vera,
    read=read_vera,
    options=frozenset({
        "r", "vera_dropout", "save_projection", "projection_prng_key", "d_initial", "init_weights",
        "bias",
    }),
    bias="vera_only",
    shared=frozenset({"base_model.vera_A", "base_model.vera_B"}),
    defaults={"r": 256},
)  # fmt: skip
