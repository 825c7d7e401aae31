"""Names of tensors in such files, today's and those of older versions of diffusers."""

import re
from collections.abc import Collection, Iterator

from torch import nn

from gift.interop.text_encoders import elsewhere

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
_OLD = re.compile(r"(?P<layer>.+)[._]lora(_linear_layer)?\.(?P<factor>up|down)\.weight")
_ENDS = re.compile(r"(?P<layer>.+)\.(?P<end>lora_magnitude_vector|lokr_w[12](_[ab])?|alpha)")
_FACTORS = {"up": "lora_B.weight", "down": "lora_A.weight"}
# Attention processors had the factors of the projections of the attention around them.
_PROJECTIONS = {
    "to_q": ("to_q", "q_proj"),
    "to_k": ("to_k", "k_proj"),
    "to_v": ("to_v", "v_proj"),
    "to_out": ("to_out.0", "out_proj"),
}


def peft_key(net: nn.Module, layers: Collection[str], key: str) -> tuple[str, str] | None:
    """Return the layer that a tensor belongs to and PEFT's name of the tensor.

    Args:
        net: the network.
        layers: paths of its modules.
        key: key in the file, without the name of the network.

    Returns:
        None if the key is not one of this format.
    """
    if match := _FACTOR.fullmatch(key):
        end = f"lora_{match['factor']}.weight"
    elif match := _OLD.fullmatch(key.replace(".processor.", ".")):
        end = _FACTORS[match["factor"]]
    elif match := _ENDS.fullmatch(key):
        end = match["end"]
    else:
        return None
    found = [path for path in _paths(net, match["layer"]) if path in layers]
    return (found or [match["layer"]])[0], end


def _paths(net: nn.Module, layer: str) -> Iterator[str]:
    """Yield the paths that a layer of a file may have in the network."""
    above, _, last = layer.rpartition(".")
    for name in _PROJECTIONS.get(last, (last,)):
        path = f"{above}.{name}".lstrip(".")
        yield from (path, elsewhere(net, path, "."))


def file_key(key: str, is_text: bool) -> str:
    """Return the name that diffusers gives a tensor of PEFT.

    Those of text encoders are older ones, since diffusers refuses files that have no old names of
    them.
    """
    match = _FACTOR.fullmatch(key) if is_text else None
    if match is None:
        return key
    end = "up" if match["factor"] == "B" else "down"
    return f"{match['layer']}.lora_linear_layer.{end}.weight"
