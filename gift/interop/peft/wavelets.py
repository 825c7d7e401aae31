"""WaveFT of PEFT."""

from typing import cast

from gift.interop.peft.forms import (
    Config,
    Form,
    Layer,
    Read,
    Tensors,
    Written,
    by_layer,
    same,
)  # fmt: skip
from gift.interop.peft.layers import AdaptedTensor, kind_of
from gift.methods.waveft import WaveFT


def write_waveft(items: list[AdaptedTensor]) -> Written:
    """Write the coefficients, whose entries PEFT draws from the same seed."""
    written = Written()
    methods = [cast(WaveFT, item.delta.method) for item in items]
    for item in items:
        written.add(item.path, {"waveft_spectrum": item.values["waveft_c"]})
    counts = {item.path: item.delta.method.size for item in items}
    written.config = by_layer("n_frequency", "n_frequency_pattern", counts) | {
        "scaling": same("scaling", [method.scaling for method in methods], written),
        "random_loc_seed": same("seed", [method.seed for method in methods], written),
        "wavelet_family": "db1",
        "use_idwt": True,
        "fan_in_fan_out": {kind_of(item.module) for item in items} == {"transposed"},
        "init_weights": True,
    }
    return written


def read_waveft(layer: Layer, config: Config, shared: Tensors) -> list[Read]:
    """Read WaveFT by Haar's wavelet."""
    if config["wavelet_family"] != "db1" or not config["use_idwt"]:
        raise ValueError(
            f"wavelet_family={config['wavelet_family']!r}, use_idwt={config['use_idwt']}: gift has "
            "the inverse transform by Haar's wavelet alone, 'db1'"
        )
    values = layer.take("waveft_spectrum")
    settings = {
        "n_frequency": values.numel(),
        "scaling": config["scaling"],
        "seed": config["random_loc_seed"],
    }
    return [Read(layer, "waveft", settings, {"waveft_c": values}, layer.path)]


WAVEFT_FORM = Form(
    peft_type="WAVEFT",
    methods=("waveft",),
    kinds=("linear", "transposed"),
    suffixes=("waveft_spectrum",),
    write=write_waveft,
    read=read_waveft,
    options=frozenset({
        "n_frequency", "n_frequency_pattern", "scaling", "wavelet_family", "use_idwt",
        "random_loc_seed", "proportional_parameters", "init_weights", "bias",
    }),
    bias="waveft_only",
    defaults={
        "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True, "random_loc_seed": 777,
    },
)  # fmt: skip
