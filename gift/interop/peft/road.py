"""RoAd of PEFT."""

from typing import cast

from gift.interop.peft.forms import (
    Config,
    Form,
    Layer,
    Read,
    Tensors,
    Written,
    same,
)  # fmt: skip
from gift.interop.peft.layers import AdaptedTensor
from gift.interop.peft.scaling import bias_incompatibilities
from gift.methods.road import RoAd


def write_road(items: list[AdaptedTensor]) -> Written:
    """Write angles and scales."""
    written = Written()
    methods = [cast(RoAd, item.delta.method) for item in items]
    sizes = [
        method.size_of_groups(item.values) for method, item in zip(methods, items, strict=True)
    ]
    for item in items:
        written.problems += bias_incompatibilities(item, "rotates")
        if len(item.frozen) % 2:
            written.problems.append(
                f"{item.name}: PEFT pairs all outputs, and {len(item.frozen)} is an odd number"
            )
        written.add(item.path, {key: item.values[key] for key in ("road_theta", "road_alpha")})
    written.config = {
        "variant": same("variant", [method.variant for method in methods], written),
        "group_size": same("group_size", sizes, written),
        "init_weights": True,
    }
    return written


def read_road(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read RoAd with the groups of the file."""
    settings = {"variant": config["variant"], "group_size": config["group_size"]}
    method = RoAd(**settings)
    rows, _ = layer.matrix()
    values = {key: layer.take(key) for key in ("road_theta", "road_alpha")}
    if rows % method.group_size:
        raise ValueError(f"group_size {method.group_size} does not divide its {rows} outputs")
    return [Read(layer, "road", settings, values, layer.path)]


ROAD_FORM = Form(
    peft_type="ROAD",
    methods=("road",),
    kinds=("linear",),
    suffixes=("road_theta", "road_alpha"),
    write=write_road,
    read=read_road,
    options=frozenset({"variant", "group_size", "init_weights"}),
    defaults={"variant": "road_1", "group_size": 64},
)
