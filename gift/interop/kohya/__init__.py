"""Deltas of diffusion models in the format of kohya's sd-scripts and LyCORIS.

One safetensors file holds the deltas of all networks of a pipeline. A key consists of a prefix for
the network, the path of a layer with underscores instead of dots, and the name of a tensor:
``lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight``.
"""

from gift.interop.kohya.loading import load_kohya
from gift.interop.kohya.saving import save_kohya
from gift.interop.report import PartReport

__all__ = ["PartReport", "load_kohya", "save_kohya"]
