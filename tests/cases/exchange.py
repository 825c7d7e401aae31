"""Layers and methods that PEFT has too: what each test of the exchange goes through."""

from collections.abc import Callable
from typing import Any

import peft.tuners.boft.layer
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PveraConfig,
    RoadConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
)  # fmt: skip
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class BlockDiagonals:
    """What PEFT computes several factors of BOFT with, which it compiles on CUDA alone."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*one) for one in blocks])]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        size = blocks.shape[-1]
        parts = gradient.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
        return [parts.diagonal(0, -4, -2).movedim(-1, -3)]


peft.tuners.boft.layer._FBD_CUDA = BlockDiagonals


class Attended(nn.Module):
    """Self-attention, as a module that takes one tensor."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class Experts(nn.Module):
    """Two raw parameters in a module below the network: a batch of matrices, and a matrix."""

    def __init__(self, up: tuple[int, ...] = (3, 6, 8)) -> None:
        super().__init__()
        self.inner = _Experts(up)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Experts(nn.Module):
    def __init__(self, up: tuple[int, ...]) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->bo", self.up, x) @ self.down.T


class TransposedExperts(Experts):
    """The same, whose batch has inputs as rows and says so."""

    def __init__(self) -> None:
        super().__init__((3, 6, 8))
        self.inner.is_transposed = True


class Around(nn.Module):
    """A network with the layer inside, under the name ``inner``, and a bias that is not its."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer
        self.other = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


class Scaled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight.norm()


class Tied(nn.Module):
    """An embedding and an output layer that share one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first


IMAGE = (2, 4, 6, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: Around(nn.Linear(8, 12)), lambda: torch.randn(2, 3, 8)),
    "linear, no bias": (lambda: Around(nn.Linear(12, 8, bias=False)), lambda: torch.randn(4, 12)),
    "Conv1D of transformers": (lambda: Around(Conv1D(12, 8)), lambda: torch.randn(2, 3, 8)),
    "conv1d": (lambda: Around(nn.Conv1d(4, 6, 3, 2, 1)), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: Around(nn.Conv2d(4, 6, (3, 2), (2, 1))), lambda: torch.randn(IMAGE)),
    "linear, odd": (lambda: Around(nn.Linear(7, 5)), lambda: torch.randn(2, 7)),
    "conv2d square": (lambda: Around(nn.Conv2d(4, 6, 3, 2, 1)), lambda: torch.randn(IMAGE)),
    "conv2d 1x1": (lambda: Around(nn.Conv2d(4, 6, 1)), lambda: torch.randn(IMAGE)),
    "conv3d": (
        lambda: Around(nn.Conv3d(4, 6, 2, bias=False)),
        lambda: torch.randn(2, 4, 3, 3, 3),
    ),
    "embedding": (lambda: Around(nn.Embedding(10, 6)), lambda: torch.randint(0, 10, (3, 4))),
}
LINEAR = ("linear", "linear, no bias")
FLAT = (*LINEAR, "Conv1D of transformers")
IMAGES = ("conv2d", "conv2d 1x1")
LOOSE = dict.fromkeys(
    ("C3A", "C3A in blocks", "DEFT", "DEFT, orthogonal"), 1e-6
)  # PEFT computes these in float32

# By gift: the method, its settings, and the layers.
OURS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "LoRA": ("lora", {"rank": 2, "lora_alpha": 5}, tuple(LAYERS)),
    "LoRA, default": ("lora", {}, tuple(LAYERS)),
    "LoRA, as outputs": ("lora", {"conv_layout": "out_as_h"}, ("conv1d", "conv2d", "conv3d")),
    "rsLoRA": ("rslora", {"rank": 3, "lora_alpha": 0.7}, ("linear", "conv2d", "embedding")),
    "DoRA": ("dora", {"rank": 2, "lora_alpha": 5}, tuple(LAYERS)),
    "DoRA, rsLoRA": ("dora", {"rank": 3, "use_rslora": True}, ("linear",)),
    "LoRA-FA": ("lora_fa", {"rank": 2, "lora_alpha": 3}, ("linear", "conv2d", "embedding")),
    "PiSSA": ("pissa", {"rank": 2, "lora_alpha": 3}, ("linear", "conv2d", "embedding")),
    "OLoRA": ("olora", {"rank": 2, "use_rslora": True}, ("linear", "conv2d")),
    "LoHa": ("loha", {"rank": 2, "alpha": 5}, (*LINEAR, "conv1d", *IMAGES)),
    "LoKr": ("lokr", {"rank": 1, "factor": 2, "alpha": 3.0}, (*LINEAR, "conv1d", *IMAGES)),
    "LoKr, both": ("lokr", {"rank": 1, "decompose_both": True, "alpha": 3}, LINEAR),
    "LoKr, high rank": ("lokr", {"rank": 2, "factor": 2, "alpha": 1}, (*LINEAR, *IMAGES)),
    "LoKr, full": ("lokr", {"full_matrix": True, "factor": 2}, (*LINEAR, *IMAGES)),
    "(IA)^3": ("ia3", {}, (*FLAT, *IMAGES, "conv3d")),
    "(IA)^3 of inputs": ("ia3", {"feedforward": True}, (*FLAT, "conv2d 1x1")),
    "VeRA": ("vera", {"rank": 4}, FLAT),
    "VeRA with its pair": ("vera", {"rank": 5, "save_projection": True}, FLAT),
    "OFT": ("oft", {}, (*LINEAR, "conv2d 1x1", "embedding")),
    "OFT in blocks": ("oft", {"block_size": 2}, (*LINEAR, "conv2d 1x1", "embedding")),
    "OFT, shared": ("oft", {"block_size": 2, "block_share": True}, ("linear", "embedding")),
    "BOFT": ("boft", {}, (*LINEAR, "conv2d 1x1", "conv2d square")),
    "BOFT, one factor": ("boft", {"n_factors": 1, "block_size": 4}, (*LINEAR, "conv2d 1x1")),
    "BOFT, not rescaled": ("boft", {"block_size": 2, "rescale": False}, ("linear", "conv2d 1x1")),
    "C3A": ("c3a", {}, LINEAR),
    "C3A in blocks": ("c3a", {"block_size": 2}, ("linear",)),
    "DeLoRA": ("delora", {"rank": 3, "delora_lambda": 2.0}, LINEAR),
    "GraLoRA": ("gralora", {"alpha": 3}, FLAT),
    "GraLoRA of many blocks": ("gralora", {"rank": 8, "n_blocks": 4}, ("linear",)),
    "HiRA": ("hira", {"rank": 2}, tuple(LAYERS)),
    "HiRA of high rank": ("hira", {}, ("linear", "embedding")),
    "MiSS": ("miss", {"rank": 4}, LINEAR),
    "MiSS with a cut block": ("miss", {"rank": 5}, LINEAR),
    "RoAd": ("road", {}, LINEAR),
    "RoAd in groups": ("road", {"variant": "road_2", "group_size": 4}, LINEAR),
    "RoAd of four": ("road", {"variant": "road_4", "group_size": 2}, LINEAR),
    "AdaLoRA": ("adalora", {}, (*FLAT, *IMAGES)),
    "AdaLoRA, scaled": ("adalora", {"rank": 3, "alpha": 5}, (*FLAT, "conv2d")),
    "AdaLoRA, negative": ("adalora", {"rank": 3, "alpha": -2}, ("linear",)),
    "GLoRA": ("glora", {"rank": 3}, LINEAR),
    "GLoRA of vectors": ("glora", {"a_b": "vector", "c": "vector", "d_e": "vector"}, LINEAR),
    "GLoRA of numbers": ("glora", {"a_b": "constant", "c": "none", "d_e": "none"}, LINEAR),
    "DEFT": ("deft", {}, FLAT),
    "DEFT, orthogonal": ("deft", {"rank": 3, "alpha": 2, "decomposition": "qr"}, LINEAR),
    "WaveFT": ("waveft", {}, FLAT),
    "WaveFT, few": ("waveft", {"n_frequency": 9, "scaling": 3.0, "seed": 5}, ("linear, odd",)),
}

# By PEFT: a configuration, and the layers.
THEIRS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]] = {
    "LoRA": (LoraConfig, {"r": 2, "lora_alpha": 5}, tuple(LAYERS)),
    "LoRA of high rank": (LoraConfig, {"r": 20}, ("linear", "embedding", "conv2d 1x1")),
    "rsLoRA": (LoraConfig, {"r": 3, "use_rslora": True}, ("linear", "conv2d")),
    "rsLoRA of high rank": (LoraConfig, {"r": 20, "use_rslora": True}, ("linear",)),
    "DoRA": (LoraConfig, {"r": 2, "use_dora": True}, tuple(LAYERS)),
    "DoRA, rsLoRA": (LoraConfig, {"r": 3, "use_dora": True, "use_rslora": True}, ("linear",)),
    "LoRA, with biases": (LoraConfig, {"r": 2, "bias": "lora_only"}, ("linear", "conv2d")),
    "LoRA, with all biases": (LoraConfig, {"r": 2, "bias": "all"}, ("linear", "conv2d")),
    "LoRA, orthogonal": (LoraConfig, {"r": 2, "init_lora_weights": "orthogonal"}, ("linear",)),
    "LoHa": (LoHaConfig, {"r": 2, "alpha": 5}, (*LINEAR, "conv1d", *IMAGES)),
    "LoKr": (LoKrConfig, {"r": 1, "alpha": 3, "decompose_factor": 2}, (*LINEAR, "conv1d", *IMAGES)),
    "LoKr, both": (
        LoKrConfig,
        {"r": 1, "decompose_both": True, "alpha": 3},
        LINEAR,
    ),
    "LoKr, full": (LoKrConfig, {"r": 16, "alpha": 4, "decompose_factor": 2}, (*LINEAR, *IMAGES)),
    "(IA)^3": (IA3Config, {"feedforward_modules": []}, (*FLAT, *IMAGES, "conv3d")),
    "(IA)^3 of inputs": (IA3Config, {"feedforward_modules": ["inner"]}, (*FLAT, *IMAGES, "conv3d")),
    "VeRA": (VeraConfig, {"r": 4}, FLAT),
    "VeRA, with biases": (VeraConfig, {"r": 6, "bias": "vera_only"}, FLAT),
    "OFT": (
        OFTConfig,
        {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False},
        (*LINEAR, "conv2d 1x1", "embedding"),
    ),
    "OFT in blocks": (
        OFTConfig,
        {"oft_block_size": 2, "use_cayley_neumann": False, "bias": "oft_only"},
        (*LINEAR, "conv2d 1x1", "embedding"),
    ),
    "OFT by a long series": (
        OFTConfig,
        {"oft_block_size": 4, "num_cayley_neumann_terms": 90, "block_share": True},
        LINEAR,
    ),
    "BOFT": (BOFTConfig, {"boft_block_size": 4}, (*LINEAR, "conv2d 1x1", "conv2d square")),
    "BOFT of two factors": (
        BOFTConfig,
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "bias": "boft_only"},
        (*LINEAR, "conv2d 1x1", "conv2d square"),
    ),
    "BOFT of three factors": (
        BOFTConfig,
        {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3},
        ("linear",),
    ),
    "C3A": (C3AConfig, {"block_size": 4, "bias": "c3a_only"}, LINEAR),
    "DeLoRA": (DeloraConfig, {"r": 3, "delora_lambda": 4}, LINEAR),
    "GraLoRA": (GraloraConfig, {"r": 4, "alpha": 3}, FLAT),
    "HiRA": (HiraConfig, {"r": 2}, tuple(LAYERS)),
    "MiSS": (MissConfig, {"r": 5, "bias": "miss_only"}, LINEAR),
    "RoAd": (RoadConfig, {"group_size": 4}, LINEAR),
    "RoAd of two": (RoadConfig, {"group_size": 2, "variant": "road_2"}, LINEAR),
    "RoAd of four": (RoadConfig, {"group_size": 4, "variant": "road_4"}, LINEAR),
    "AdaLoRA": (AdaLoraConfig, {"init_r": 4, "total_step": 9, "lora_alpha": 5}, (*FLAT, *IMAGES)),
    "AdaLoRA of high rank": (AdaLoraConfig, {"init_r": 20, "total_step": 9}, ("linear",)),
    "AdaLoRA, with biases": (
        AdaLoraConfig,
        {"init_r": 3, "total_step": 9, "bias": "lora_only"},
        ("linear",),
    ),
    "GLoRA": (GloraConfig, {"r": 3}, LINEAR),
    "GLoRA of high rank": (GloraConfig, {"r": 20, "config_D_E": "vector"}, ("linear",)),
    "GLoRA of numbers": (
        GloraConfig,
        {"config_A_B": "constant", "config_C": "vector", "bias": "glora_only"},
        LINEAR,
    ),
    "DEFT": (DeftConfig, {"r": 9, "bias": "deft_only"}, FLAT),
    "DEFT, orthogonal": (
        DeftConfig,
        {"r": 3, "alpha": 5, "decomposition_method": "qr"},
        ("linear",),
    ),
    "VB-LoRA": (
        VBLoRAConfig,
        {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 2, "init_logits_std": 1.0},
        FLAT,
    ),
    "Uni-LoRA": (
        UniLoraConfig,
        {"r": 3, "theta_d_length": 19, "save_indices": True, "bias": "unilora_only"},
        FLAT,
    ),
    "PVeRA": (PveraConfig, {"r": 4, "bias": "pvera_only"}, FLAT),
    "WaveFT": (WaveFTConfig, {"n_frequency": 30, "bias": "waveft_only"}, FLAT),
    "MiSS, mini": (MissConfig, {"r": 4, "init_weights": "mini", "mini_r": 4}, LINEAR),
}


def cells(table: dict[str, Any]) -> list[tuple[str, str]]:
    """All pairs of a row and a layer of its."""
    return [(row, layer) for row, (_, _, layers) in table.items() for layer in layers]


def randomised(net: nn.Module, std: float = 0.2) -> nn.Module:
    """`net`, all that it trains moved."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return net


def trained_by_peft(net: nn.Module, config: Any) -> PeftModel:
    """The model of PEFT around `net`, as after some training; evaluated."""
    model = get_peft_model(net, config)
    return randomised(model).eval()  # type: ignore[return-value]
