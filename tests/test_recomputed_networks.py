"""Inputs that are computed again, in networks of other libraries: gradients, and what is kept.

The bound is what the same network keeps with all its weights frozen, trained from its first tensor
on: the activations' gradients need that much. It is counted in storages, not measured.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from gift import enable_fine_tuning
from gift.kernels import recomputed
from gift.private.torch.autograd import bytes_kept_by
from gift.strategies import LoRAAllFineTuningStrategy
from tests.common import unet
from tests.test_recomputed import not_on_old

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.as_large,
]

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 90, shape)


def bert(**options: Any) -> nn.Module:
    return hf.BertModel(hf.BertConfig(**SIZES, **options), add_pooling_layer=False)


def llama(**options: Any) -> nn.Module:
    return hf.LlamaModel(hf.LlamaConfig(**SIZES, use_cache=False, **options))


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2Model(
        hf.GPT2Config(vocab_size=100, n_embd=64, n_layer=3, n_head=4, use_cache=False, **ends)
    )


def t5() -> nn.Module:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    return hf.T5Model(hf.T5Config(vocab_size=100, use_cache=False, **sizes))


def vit() -> nn.Module:
    sizes = {key: SIZES[key] for key in SIZES if key != "vocab_size"}
    config = hf.ViTConfig(**sizes, **STILL, image_size=64, patch_size=8)
    return hf.ViTModel(config, add_pooling_layer=False)


def swin() -> nn.Module:
    sizes = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    config = hf.SwinConfig(image_size=64, patch_size=4, drop_path_rate=0.0, **sizes)
    return hf.SwinModel(config, add_pooling_layer=False)


def convnext() -> nn.Module:
    sizes = {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2}
    return hf.ConvNextModel(hf.ConvNextConfig(image_size=64, **sizes))


def whisper() -> nn.Module:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 256)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(
        vocab_size=100,
        d_model=64,
        num_mel_bins=20,
        max_source_positions=64,
        use_cache=False,
        **sizes,
        **ends,
    )
    return hf.WhisperModel(config)


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(**SIZES, num_local_experts=4, num_key_value_heads=2, use_cache=False)
    return hf.MixtralModel(config)


def torchvision_vit() -> nn.Module:
    """Whose attention is ``nn.MultiheadAttention``, which reads its weights itself."""
    return VisionTransformer(64, 8, 2, 4, 64, 256, 0.0, 0.0)


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 64, 64)}


def text(length: int = 64) -> dict[str, Tensor]:
    return {"input_ids": tokens(2, length)}


def both() -> dict[str, Tensor]:
    return {"input_ids": tokens(2, 64), "decoder_input_ids": tokens(2, 64)}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], float]] = {
    "BERT": (lambda: bert(**STILL), text, 1.03),
    "BERT, dropout": (bert, text, 1.05),
    "BERT, attention written out": (lambda: bert(attn_implementation="eager"), text, 1.03),
    "Llama": (llama, text, 1.03),
    "Llama, heads share keys": (lambda: llama(num_key_value_heads=2), text, 1.06),
    "GPT-2, dropout": (gpt2, text, 1.05),
    "T5, dropout": (t5, both, 1.05),
    "ViT": (vit, image, 1.03),
    "ViT of torchvision": (torchvision_vit, lambda: {"x": torch.randn(2, 3, 64, 64)}, 1.05),
    "Swin": (swin, image, 1.05),
    "ConvNeXt": (convnext, image, 1.03),
    "Whisper": (
        whisper,
        lambda: {
            "input_features": torch.randn(2, 20, 128),
            "decoder_input_ids": tokens(2, 32),
        },
        1.05,
    ),
}
"""The network, its inputs, and of the bound what is kept at most."""

OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "Mixtral": (mixtral, text),
    "UNet": (
        unet,
        lambda: {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 5]),
            "encoder_hidden_states": torch.randn(2, 7, 16),
        },
    ),
}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as these are not worth it otherwise."""
    monkeypatch.setattr(recomputed, "FEW", 0)
    monkeypatch.setattr(recomputed, "WORK", 0)


def output(net: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)
    made: Any = net(**inputs)
    if isinstance(made, Tensor):
        return made
    return made[0] if isinstance(made, tuple) else next(iter(made.values()))


def size(net: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps, beside the network and its inputs."""
    held = [*dict(net.named_parameters(remove_duplicate=False)).values(), *net.buffers()]
    return bytes_kept_by(output(net, inputs).grad_fn, [*held, *inputs.values()])


def size_by_hooks(net: nn.Module, inputs: dict[str, Tensor]) -> int:
    """The same as hooks see it that count what is saved."""
    named = dict(net.named_parameters(remove_duplicate=False)).values()
    own = {t.untyped_storage().data_ptr() for t in (*named, *net.buffers(), *inputs.values())}
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        output(net, inputs)
    return sum(storage.nbytes() for place, storage in seen.items() if place not in own)


def adapted(base: nn.Module, recompute: bool) -> Any:
    net = copy.deepcopy(base)
    torch.manual_seed(0)
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(), recompute_inputs=recompute)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def frozen(base: nn.Module) -> nn.Module:
    """The bound: embeddings and what sounds go into, or else the first weights, need a gradient."""
    net = copy.deepcopy(base).requires_grad_(False)
    first: list[Any] = [m.weight for m in net.modules() if isinstance(m, nn.Embedding)]
    first += [m.bias for m in net.modules() if isinstance(m, nn.Conv1d)]
    for weight in first or list(net.parameters())[:4]:
        weight.requires_grad_()
    return net


@not_on_old
@pytest.mark.parametrize(("make", "inputs", "limit"), NETWORKS.values(), ids=NETWORKS)
def test_what_is_kept(
    make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Tensor]], limit: float
) -> None:
    torch.manual_seed(0)
    base, given = make().train(), inputs()
    for count in (size, size_by_hooks):
        bound = count(frozen(base), given)
        with_it, without = (count(adapted(base, recompute), given) for recompute in (True, False))
        assert with_it <= limit * bound
        assert without > 1.1 * bound, "there is something to win"


@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
def test_gradients(name: str) -> None:
    make, inputs, *_ = (NETWORKS | OTHERS)[name]  # type: ignore[operator]
    # torch multiplies by groups of experts in single precision alone.
    dtype, tolerance = (torch.float32, 1e-5) if name == "Mixtral" else (torch.float64, 1e-12)
    torch.manual_seed(0)
    base = make().train().to(dtype)
    given = {key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs().items()}
    found: list[dict[str, Tensor]] = []
    for recompute in (True, False):
        net = adapted(base, recompute)
        y = output(net, given)
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)).sum().backward()
        found.append({key: p.grad for key, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, one in found[0].items():
        other = found[1][key]
        limit = tolerance * float(1 + other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=limit, msg=key)
