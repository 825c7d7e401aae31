"""Made by `make stubs` from the methods."""

from typing import Literal

import torch

from gift.strategies.adapting import _AdaptingStrategy

class AdaLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        adalora_dropout: float = 0.0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class AdaLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        adalora_dropout: float = 0.0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class AdaLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        adalora_dropout: float = 0.0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class BOFTAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        block_size: int | None = None,
        n_factors: int | None = None,
        rescale: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        clip_block_size: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class BOFTLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        block_size: int | None = None,
        n_factors: int | None = None,
        rescale: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        clip_block_size: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class BOFTConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        block_size: int | None = None,
        n_factors: int | None = None,
        rescale: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        clip_block_size: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class C3AAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        block_size: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class C3ALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        block_size: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class C3AConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        block_size: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class DEFTAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        decomposition: str = "relu",
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class DEFTLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        decomposition: str = "relu",
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class DEFTConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        decomposition: str = "relu",
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class DeLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        delora_lambda: float = 15.0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class DeLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        delora_lambda: float = 15.0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class DeLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        delora_lambda: float = 15.0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class LoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class RsLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class RsLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class RsLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class DoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        detach_norm: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class DoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        detach_norm: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class DoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        detach_norm: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class FacTAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        scaling: float = 1.0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class FacTLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        scaling: float = 1.0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class FacTConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        scaling: float = 1.0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class FourierFTAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        n_frequency: int | None = None,
        scaling: float = 150.0,
        seed: int = 777,
        *,
        dtype: torch.dtype | str | None = None,
        clip_n_frequency: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class FourierFTLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        n_frequency: int | None = None,
        scaling: float = 150.0,
        seed: int = 777,
        *,
        dtype: torch.dtype | str | None = None,
        clip_n_frequency: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class FourierFTConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        n_frequency: int | None = None,
        scaling: float = 150.0,
        seed: int = 777,
        *,
        dtype: torch.dtype | str | None = None,
        clip_n_frequency: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class FullDeltaAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class FullDeltaLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class FullDeltaConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class GLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        a_b: str = "lora",
        c: str = "lora",
        d_e: str = "constant",
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class GLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        a_b: str = "lora",
        c: str = "lora",
        d_e: str = "constant",
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class GLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        a_b: str = "lora",
        c: str = "lora",
        d_e: str = "constant",
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class GraLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        n_blocks: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class GraLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        n_blocks: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class GraLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        n_blocks: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class GuidedLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class GuidedLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class GuidedLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class HiRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class HiRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class HiRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class HRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class HRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class HRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class IA3AllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        feedforward: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class IA3LinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        feedforward: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class IA3ConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        feedforward: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoHaAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class LoHaLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoHaConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoKrAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        factor: int = -1,
        decompose_both: bool = False,
        full_matrix: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        column_factor: int | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class LoKrLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        factor: int = -1,
        decompose_both: bool = False,
        full_matrix: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        column_factor: int | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoKrConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        factor: int = -1,
        decompose_both: bool = False,
        full_matrix: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        column_factor: int | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoRAFAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class LoRAFALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoRAFAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class MiSSAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class MiSSLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class MiSSConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class OFTAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        block_size: int | None = None,
        block_share: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        clip_block_size: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class OFTLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        block_size: int | None = None,
        block_share: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        clip_block_size: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class OFTConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        block_size: int | None = None,
        block_share: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        clip_block_size: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class OLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class OLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class OLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class PiSSAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class PiSSALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class PiSSAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        form: Literal["merged", "side", "whole"] | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoRAXSAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class LoRAXSLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class LoRAXSConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class PSOFTAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        rescale: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class PSOFTLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        rescale: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class PSOFTConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        rescale: bool = True,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class RandLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int = 32,
        alpha: float | None = None,
        seed: int = 0,
        save_projection: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class RandLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int = 32,
        alpha: float | None = None,
        seed: int = 0,
        save_projection: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class RandLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int = 32,
        alpha: float | None = None,
        seed: int = 0,
        save_projection: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class RoAdAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        variant: str = "road_1",
        group_size: int = 64,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class RoAdLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        variant: str = "road_1",
        group_size: int = 64,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class RoAdConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        variant: str = "road_1",
        group_size: int = 64,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class SHiRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        mask: str = "random",
        seed: int = 0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class SHiRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        mask: str = "random",
        seed: int = 0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class SHiRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        mask: str = "random",
        seed: int = 0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class SSFAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class SSFLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class SSFConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class SVDiffAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class SVDiffLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class SVDiffConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class TinyLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        u: int = 64,
        tied: bool = True,
        seed: int = 42,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class TinyLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        u: int = 64,
        tied: bool = True,
        seed: int = 42,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class TinyLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        u: int = 64,
        tied: bool = True,
        seed: int = 42,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class TrainableTokensAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rows: str = "0",
        new: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class TrainableTokensLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rows: str = "0",
        new: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class TrainableTokensConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rows: str = "0",
        new: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class UniLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        theta_d_length: int = 23040,
        init_theta_d_bound: float = 0.02,
        seed: int = 0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        first: int = 0,
        entries: int | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class UniLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        theta_d_length: int = 23040,
        init_theta_d_bound: float = 0.02,
        seed: int = 0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        first: int = 0,
        entries: int | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class UniLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        theta_d_length: int = 23040,
        init_theta_d_bound: float = 0.02,
        seed: int = 0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        first: int = 0,
        entries: int | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class VBLoRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        num_vectors: int = 90,
        vector_length: int = 256,
        topk: int = 2,
        init_vector_bank_bound: float = 0.02,
        init_logits_std: float = 0.1,
        seed: int = 0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        rows: int | None = None,
        columns: int | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class VBLoRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        num_vectors: int = 90,
        vector_length: int = 256,
        topk: int = 2,
        init_vector_bank_bound: float = 0.02,
        init_logits_std: float = 0.1,
        seed: int = 0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        rows: int | None = None,
        columns: int | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class VBLoRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        num_vectors: int = 90,
        vector_length: int = 256,
        topk: int = 2,
        init_vector_bank_bound: float = 0.02,
        init_logits_std: float = 0.1,
        seed: int = 0,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        rows: int | None = None,
        columns: int | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class VeRAAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        d_initial: float = 0.1,
        vera_dropout: float = 0.0,
        seed: int = 0,
        save_projection: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class VeRALinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        d_initial: float = 0.1,
        vera_dropout: float = 0.0,
        seed: int = 0,
        save_projection: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class VeRAConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        rank: int | None = None,
        d_initial: float = 0.1,
        vera_dropout: float = 0.0,
        seed: int = 0,
        save_projection: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        clip_rank: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class WaveFTAllFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        n_frequency: int | None = None,
        scaling: float = 25.0,
        seed: int = 777,
        *,
        dtype: torch.dtype | str | None = None,
        clip_n_frequency: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
        experts: bool = True,
    ) -> None: ...

class WaveFTLinearFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        n_frequency: int | None = None,
        scaling: float = 25.0,
        seed: int = 777,
        *,
        dtype: torch.dtype | str | None = None,
        clip_n_frequency: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...

class WaveFTConvFineTuningStrategy(_AdaptingStrategy):
    def __init__(
        self,
        n_frequency: int | None = None,
        scaling: float = 25.0,
        seed: int = 777,
        *,
        dtype: torch.dtype | str | None = None,
        clip_n_frequency: bool | None = None,
        train_bias: bool = False,
        conv_layout: str | None = None,
        split_qkv: bool = False,
        freeze_statistics: bool = False,
    ) -> None: ...
