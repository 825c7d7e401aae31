"""The blocks that schedules find in real architectures: nothing is forgotten or counted twice."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision.models as tv
import transformers
from torch import nn

from gift import enable_fine_tuning
from gift.schedules.blocks import Division, divide
from gift.strategies import LoRAAllFineTuningStrategy as LoRA

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 30,
}


def of_config(architecture: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    made = getattr(transformers, config)
    return lambda: getattr(transformers, architecture)(made(**settings))


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


def rows(prefix: str, *depths: int, start: int = 0) -> list[str]:
    """Names of blocks in stages: ``prefix`` with two numbers, the first counting the stages."""
    return [prefix.format(s + start, b) for s, depth in enumerate(depths) for b in range(depth)]


RESNET18 = ["conv1", "bn1", *rows("layer{}.{}", 2, 2, 2, 2, start=1)]
BERT_LAYERS = [f"encoder.layer.{n}" for n in range(3)]

# The network, and its blocks: all of them, or those at the end, after "...".
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet18": (tv.resnet18, RESNET18),
    "resnet50": (tv.resnet50, ["conv1", "bn1", *rows("layer{}.{}", 3, 4, 6, 3, start=1)]),
    "swin": (tv.swin_t, ["...", "features.6", "features.7.0", "features.7.1", "norm"]),
    "convnext": (tv.convnext_tiny, ["...", *rows("features.{}.{}", 3, start=7), "classifier.0"]),
    "vit": (
        tv.vit_b_16,
        ["class_token", "conv_proj", "encoder.pos_embedding",
         *(f"encoder.layers.encoder_layer_{n}" for n in range(12)), "encoder.ln"],
    ),
    "mobilenet": (tv.mobilenet_v2, [f"features.{n}" for n in range(19)]),
    "efficientnet": (
        tv.efficientnet_b0,
        ["features.0", *rows("features.{}.{}", 1, 2, 2, 3, 3, 4, 1, start=1), "features.8"],
    ),
    "densenet": (
        tv.densenet121,
        ["features.conv0", "features.norm0", "features.denseblock1", "features.transition1",
         "features.denseblock2", "features.transition2", "features.denseblock3",
         "features.transition3", "features.denseblock4", "features.norm5"],
    ),
    "googlenet": (
        lambda: tv.googlenet(aux_logits=False, init_weights=False),
        ["conv1", "conv2", "conv3", *(f"inception{n}" for n in
         ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"))],
    ),
    "vgg": (
        tv.vgg11,
        [*(f"features.{n}" for n in (0, 3, 6, 8, 11, 13, 16, 18)), "classifier.0", "classifier.3"],
    ),
    "bert": (
        of_config("BertForSequenceClassification", "BertConfig", **SMALL),
        ["bert.embeddings", *(f"bert.{name}" for name in BERT_LAYERS), "bert.pooler"],
    ),
    "gpt2": (  # its embedding is tied to the head
        of_config("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=3, n_head=2, vocab_size=30),
        ["transformer.wpe", *(f"transformer.h.{n}" for n in range(3)), "transformer.ln_f"],
    ),
    "llama": (
        of_config("LlamaForCausalLM", "LlamaConfig", **SMALL),
        ["model.embed_tokens", *(f"model.layers.{n}" for n in range(3)), "model.norm"],
    ),
    "t5": (
        of_config("T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=16,
                  num_layers=3, num_heads=2, vocab_size=30),
        [*(f"encoder.block.{n}" for n in range(3)), "encoder.final_layer_norm",
         *(f"decoder.block.{n}" for n in range(3)), "decoder.final_layer_norm"],
    ),
    "mixtral": (  # experts are not blocks
        of_config("MixtralForCausalLM", "MixtralConfig", **SMALL, num_key_value_heads=2,
                  num_local_experts=4),
        ["model.embed_tokens", *(f"model.layers.{n}" for n in range(3)), "model.norm"],
    ),
    "swin of transformers": (
        of_config("SwinForImageClassification", "SwinConfig", embed_dim=16, depths=[2, 2],
                  num_heads=[2, 2], image_size=32, patch_size=2, window_size=4),
        ["swin.embeddings", "swin.encoder.layers.0.blocks.0", "swin.encoder.layers.0.blocks.1",
         "swin.encoder.layers.0.downsample", "swin.encoder.layers.1.blocks.0",
         "swin.encoder.layers.1.blocks.1", "swin.layernorm"],
    ),
    "resnet of transformers": (
        of_config("ResNetForImageClassification", "ResNetConfig", embedding_size=8,
                  hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"),
        ["resnet.embedder.embedder", *rows("resnet.encoder.stages.{}.layers.{}", 2, 2)],
    ),
    "resnet of timm": (of_timm("resnet18"), RESNET18),
    "swin of timm": (
        of_timm("swin_tiny_patch4_window7_224"),
        ["...", "layers.3.downsample", "layers.3.blocks.0", "layers.3.blocks.1", "norm"],
    ),
    "convnext of timm": (
        of_timm("convnext_atto"),
        ["...", "stages.3.downsample.0", "stages.3.downsample.1", "stages.3.blocks.0",
         "stages.3.blocks.1", "head.norm"],
    ),
    "vit of timm": (
        of_timm("vit_tiny_patch16_224"),
        ["cls_token", "pos_embed", "patch_embed", *(f"blocks.{n}" for n in range(12)), "norm"],
    ),
    "regnet of timm": (
        of_timm("regnety_002"),
        ["stem", "s1.b1", "s2.b1", *(f"s3.b{n}" for n in range(1, 5)),
         *(f"s4.b{n}" for n in range(1, 8))],
    ),
    "encoder and decoder": (
        lambda: nn.Sequential(nn.Transformer(16, 2, 2, 2, 16), nn.Linear(16, 2)),
        [f"0.{part}.{name}" for part in ("encoder", "decoder")
         for name in ("layers.0", "layers.1", "norm")],
    ),
    "a plain chain": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)),
                              nn.Linear(4, 2)),
        ["0", "2.0"],
    ),
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, list[str]]:
    make, expected = NETWORKS[name]
    try:
        with torch.device("meta"):
            return make(), expected
    except (RuntimeError, NotImplementedError):  # old versions of timm read numbers as they build
        return make(), expected


def parts(division: Division) -> list[tuple[str, ...]]:
    return [division.head_parameters, *(b.parameters for b in division.blocks), division.rest]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_blocks_are_layers_residual_blocks_and_encoder_layers(name: str) -> None:
    net, expected = built(name)
    blocks = [block.name for block in divide(net).blocks]
    if expected[0] == "...":
        blocks, expected = blocks[1 - len(expected) :], expected[1:]
    assert blocks == expected


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("strategy", [None, LoRA(rank=1)], ids=["plain", "lora"])
def test_head_and_blocks_cover_every_parameter_once(name: str, strategy: Any) -> None:
    """Also those that a strategy added, which are in the block of what they change."""
    net, _ = built(name)
    blocks = [block.name for block in divide(net).blocks]
    if strategy is not None:
        enable_fine_tuning(net, strategy)
    division = divide(net)
    names = [name for part in parts(division) for name in part]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    assert division.rest == ()
    assert [block.name for block in division.blocks] == blocks


def test_what_is_tied_to_the_head_belongs_to_it_with_its_delta() -> None:
    net, _ = built("gpt2")
    assert divide(net).head_parameters == ("transformer.wte.weight",)
    enable_fine_tuning(net, LoRA(rank=1))
    assert set(divide(net).head_parameters) == {
        "transformer.wte.weight", "transformer.wte.lora_A", "transformer.wte.lora_B"
    }  # fmt: skip


def test_a_head_may_be_several_modules_and_blocks_may_be_named() -> None:
    net = tv.resnet18()
    division = divide(net, head=["fc", "layer4.1"], blocks=["layer?.0", "layer3*"])
    assert [b.name for b in division.blocks] == ["layer1.0", "layer2.0", "layer3", "layer4.0"]
    assert {name.partition(".")[0] for name in division.head_parameters} == {"fc", "layer4"}
    assert {n.rpartition(".")[0] for n in division.rest} >= {"conv1", "bn1", "layer1.1.conv1"}
    total = sum(math.prod(net.get_parameter(n).shape) for part in parts(division) for n in part)
    assert total == 11_689_512


def test_a_single_block_is_looked_into() -> None:
    backbone = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.LayerNorm(4)})
    inner = type("Backbone", (nn.Module,), {})()
    inner.parts, inner.last = backbone, nn.Linear(4, 4)
    net = nn.ModuleDict({"backbone": inner, "head": nn.Linear(4, 2)})
    names = [block.name for block in divide(net).blocks]
    assert names == ["backbone.parts.a", "backbone.parts.b", "backbone.last"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head": "fcc"}, r"no module \['fcc'\] for a head; closest names: \['fc'\]"),
        ({"head": []}, "no module"),
        ({"head": "relu"}, "'relu'.* have no parameters"),
        ({"blocks": ["layer1", "lair*"]}, r"blocks \['lair\*'\]"),
    ],
)
def test_paths_that_are_not_there_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        divide(tv.resnet18(), **options)


def test_the_head_of_a_network_without_linear_layers_is_its_last_1x1_convolution() -> None:
    with torch.device("meta"):
        net = tv.squeezenet1_1()
    assert divide(net) == divide(net, head="classifier.1")
    assert divide(net).blocks[-1].name == "features.12"


def test_a_network_without_either_must_be_told_its_head() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    with pytest.raises(ValueError, match=r"no linear layer and no 1x1 convolution.*head="):
        divide(net)
    assert divide(net, head="1").blocks[-1].name == "0"
