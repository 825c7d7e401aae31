"""LoRA of diffusion models in the format of diffusers: ``pytorch_lora_weights.safetensors``.

One safetensors file holds the deltas of all networks of a pipeline. A key consists of the name of
the network in the pipeline and a key of PEFT, ``unet.conv_in.lora_A.weight``; the settings of PEFT
stand in the header under ``lora_adapter_metadata``, with the same prefixes.
"""

from gift.interop.diffusers.loading import load_diffusers
from gift.interop.diffusers.saving import save_diffusers
from gift.interop.report import PartReport

__all__ = ["PartReport", "load_diffusers", "save_diffusers"]
