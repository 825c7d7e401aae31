"""LoRA on all layers, on linear layers, or on convolutions."""

from typing import Any, ClassVar

import torch
from torch.nn.modules.batchnorm import _NormBase

from gift.factories import Check, ma_adapt, ma_freeze, mc_layer, mc_type
from gift.layers import ConvLayout
from gift.strategies.base import CapLike, FineTuningStrategy, register_strategy


class _LoRAStrategy(FineTuningStrategy):
    layers: ClassVar[Check]

    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        train_bias: bool = False,
        conv_layout: ConvLayout = "balanced",
        use_rslora: bool = False,
        clip_rank: bool = False,
        split_qkv: bool = False,
        dtype: torch.dtype | str | None = None,
        freeze_statistics: bool = False,
    ) -> None:
        settings: dict[str, Any] = {
            "rank": rank,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "clip_rank": clip_rank,
            "dtype": dtype,
            "train_bias": train_bias,
            "conv_layout": conv_layout,
            "split_qkv": split_qkv,
        }
        caps: list[CapLike] = [(self.layers, ma_adapt("lora", **settings))]
        if freeze_statistics:
            caps.append((mc_type(_NormBase), ma_freeze(statistics=True)))
        super().__init__(caps)


@register_strategy
class LoRAAllFineTuningStrategy(_LoRAStrategy):
    """LoRA on every layer whose weights gift knows; see `gift.methods.LoRA`.

    The network's output stays bit for bit what it was until the first training step. All other
    parameters are frozen.

    Args:
        rank: of the update. None means 3, or less where a weight is smaller; a given rank that some
            weight cannot have is refused, naming each, unless `clip_rank` is set.
        lora_alpha: the update is scaled by ``lora_alpha / rank``; None means `rank`, no scaling.
        lora_dropout: probability with which inputs of the update are dropped while training.
        train_bias: also train the biases of the adapted layers.
        conv_layout: a convolution's weight ``(o, i, kh, kw)`` is seen as the matrix
            ``(o*kh, i*kw)`` (``"balanced"``) or ``(o, i*kh*kw)`` (``"out_as_h"``).
        use_rslora: scale by ``lora_alpha / sqrt(rank)`` instead.
        clip_rank: give weights that cannot have the rank their largest one.
        split_qkv: separate updates for query, key and value of ``nn.MultiheadAttention``.
        dtype: of the update, or its name; None means the weight's, but at least float32.
        freeze_statistics: keep norm layers in evaluation mode, so that running statistics stand
            still.

    Raises:
        ValueError: for settings out of range.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import LoRAAllFineTuningStrategy
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 10))
        >>> report = enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['0.lora_B', '0.lora_A', '2.lora_B', '2.lora_A']
    """

    layers = mc_layer()


@register_strategy
class LoRALinearFineTuningStrategy(_LoRAStrategy):
    """LoRA on linear layers, their subclasses, and the ``Conv1D`` of transformers.

    Arguments and errors are those of `LoRAAllFineTuningStrategy`.
    """

    layers = mc_layer("linear")


@register_strategy
class LoRAConvFineTuningStrategy(_LoRAStrategy):
    """LoRA on convolutions, transposed ones included.

    Arguments and errors are those of `LoRAAllFineTuningStrategy`.
    """

    layers = mc_layer("conv")
