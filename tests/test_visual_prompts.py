"""Visual prompts, beside a computation by hand on the blocks of vision transformers."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18
from transformers import (
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTForImageClassification,
)

import gift
from gift import DeltaBank, disable_fine_tuning, enable_fine_tuning
from gift.strategies import (
    LoRALinearFineTuningStrategy,
    VisualPromptFineTuningStrategy,
    load_strategy_from_config,
    merge_strategies,
)
from tests.common import full_state, trainable

pytestmark = [pytest.mark.usefixtures("double"),
              pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")]  # fmt: skip

Prompts = VisualPromptFineTuningStrategy
N, DIM, BLOCKS = 3, 8, 3
SIZES = {"hidden_size": DIM, "num_hidden_layers": BLOCKS, "num_attention_heads": 2,
         "intermediate_size": 12, "image_size": 8, "patch_size": 4}  # fmt: skip


def of_timm(**options: Any) -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=DIM, depth=BLOCKS, num_heads=2,
        num_classes=5, **options)  # fmt: skip


def of_torchvision() -> Any:
    net = VisionTransformer(8, 4, BLOCKS, 2, DIM, 12, num_classes=5)
    nn.init.normal_(net.heads[0].weight)  # zeros at the start
    return net


def of_transformers() -> Any:
    return ViTForImageClassification(ViTConfig(**SIZES, num_labels=5))


@dataclass(frozen=True)
class Net:
    """A vision transformer in three parts: before its blocks, the blocks, and after them."""

    make: Callable[[], Any]
    blocks: Callable[[Any], Any]
    before: Callable[[Any, Tensor], Tensor]
    after: Callable[[Any, Tensor], Tensor]


def tokens_of_torchvision(net: Any, x: Tensor) -> Tensor:
    patches = net._process_input(x)
    tokens = torch.cat([net.class_token.expand(len(x), -1, -1), patches], 1)
    return tokens + net.encoder.pos_embedding


def layers_of(net: Any) -> Any:
    return getattr(net.vit, "layers", None) or net.vit.encoder.layer


def timms(make: Callable[[], Any]) -> Net:
    return Net(make, lambda net: net.blocks,
               lambda net, x: net.norm_pre(net._pos_embed(net.patch_embed(x))),
               lambda net, x: net.forward_head(net.norm(x)))  # fmt: skip


NETS = {
    "timm": timms(of_timm),
    "timm, mean of patches": timms(lambda: of_timm(global_pool="avg")),
    "torchvision": Net(of_torchvision, lambda net: net.encoder.layers, tokens_of_torchvision,
                       lambda net, x: net.heads(net.encoder.ln(x)[:, 0])),
    "transformers": Net(of_transformers, layers_of, lambda net, x: net.vit.embeddings(x),
                        lambda net, x: net.classifier(net.vit.layernorm(x)[:, 0])),
}  # fmt: skip
nets = pytest.mark.parametrize("kind", NETS.values(), ids=NETS)


def made(kind: Net = NETS["timm"]) -> Any:
    net = kind.make().double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def logits(net: Any, x: Tensor) -> Tensor:
    output = net(x)
    return getattr(output, "logits", output)


def prompts_of(net: nn.Module) -> list[nn.Parameter]:
    """The prompts, as after some training."""
    found = [p for name, p in net.named_parameters() if name.endswith("visual_prompt_tokens")]
    for p in found:
        nn.init.normal_(p)
    return found


def by_hand(kind: Net, net: Any, x: Tensor, prompts: list[nn.Parameter]) -> Tensor:
    """With prompts behind ``[CLS]``, as in the paper; one for each block, or one for all."""
    tokens = kind.before(net, x)
    length, cls = tokens.shape[1], tokens[:, :1]
    for i, block in enumerate(kind.blocks(net)):
        cls, rest = tokens[:, :1], tokens[:, 1:]
        if i < len(prompts):
            rest = tokens[:, 1 + (tokens.shape[1] - length) :]
            rest = torch.cat([prompts[i].expand(len(x), -1, -1), rest], 1)
        tokens = block(torch.cat([cls, rest], 1))
    return kind.after(net, torch.cat([tokens[:, :1], tokens[:, 1 + N :]], 1))


@nets
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_it_is_what_the_blocks_give_for_more_tokens(kind: Net, deep: bool) -> None:
    """Value and gradients, in training with checkpoints as well."""
    base, x = made(kind), images()
    net = copy.deepcopy(base)
    report = enable_fine_tuning(net, Prompts(N, deep=deep))
    assert report.trainable_after == N * DIM * (BLOCKS if deep else 1)
    prompts = prompts_of(net)
    output, expected = logits(net, x), by_hand(kind, base, x, prompts)
    torch.testing.assert_close(output, expected)
    assert (output - logits(base, x)).abs().max() > 1e-3
    mine, theirs = (torch.autograd.grad(y.square().sum(), prompts) for y in (output, expected))
    torch.testing.assert_close(mine, theirs)
    assert all(gradient.any() for gradient in mine)
    if hasattr(net, "set_grad_checkpointing"):
        net.set_grad_checkpointing()
        again = torch.autograd.grad(logits(net.train(), x).square().sum(), prompts)
        torch.testing.assert_close(again, theirs)
    elif hasattr(net, "gradient_checkpointing_enable"):
        net.gradient_checkpointing_enable()
        again = torch.autograd.grad(logits(net.train(), x).square().sum(), prompts)
        torch.testing.assert_close(again, theirs)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_it_is_saved_copied_switched_and_taken_off(deep: bool, tmp_path: Any) -> None:
    base, x = made(), images()
    net = copy.deepcopy(base)
    before = full_state(net)
    enable_fine_tuning(net, Prompts(N, deep=deep))
    prompts_of(net)
    expected = net(x)
    gift.save(net, tmp_path / "delta.safetensors")
    loaded, fresh, bank = copy.deepcopy(base), copy.deepcopy(base), DeltaBank(copy.deepcopy(base))
    gift.load(loaded, tmp_path / "delta.safetensors")
    enable_fine_tuning(fresh, Prompts(N, deep=deep))
    fresh.load_state_dict(net.state_dict())
    bank.add("prompt", strategy=Prompts(N, deep=deep))
    bank.add("lora", strategy=LoRALinearFineTuningStrategy(rank=2))
    bank.activate("prompt")
    bank.net.load_state_dict(net.state_dict())
    bank.activate("lora")
    bank.activate("prompt")
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), gift.reference(net)
    for other in (loaded, fresh, bank.net, *copies):
        assert torch.equal(other(x), expected)
    with pytest.raises(ValueError, match="is wrapped by visual_prompt"):
        gift.merge(net)
    with gift.disabled(net):
        assert torch.equal(net(x), base(x))
    disable_fine_tuning(net)
    assert full_state(net) == before


def test_deep_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="deep is 'no', expected True or False"):
        Prompts(N, deep="no")  # type: ignore[arg-type]


def test_a_shallow_state_does_not_fit_a_deep_one() -> None:
    one, other = made(), made()
    enable_fine_tuning(one, Prompts(N))
    enable_fine_tuning(other, Prompts(N, deep=True))
    with pytest.raises(RuntimeError, match=r"Missing key|was trained with"):
        other.load_state_dict(one.state_dict())


def test_with_lora_and_a_head_in_16_bits() -> None:
    net, x = made().bfloat16(), images().bfloat16()
    both = merge_strategies(
        [Prompts(N, deep=True, head=True), LoRALinearFineTuningStrategy(rank=2)]
    )
    report = enable_fine_tuning(net, both)
    assert not report.unmatched
    assert {"head.weight", "blocks.0.visual_prompt_tokens"} <= set(trainable(net))
    assert net.blocks[0].visual_prompt_tokens.dtype is torch.float32
    net(x).float().square().sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == set(trainable(net))


def test_dropout_is_that_of_training() -> None:
    net, x = made(), images()
    enable_fine_tuning(net, Prompts(N, dropout=0.5))
    prompts_of(net)
    assert torch.equal(net(x), net(x))
    assert not torch.equal(net.train()(x), net(x))


def test_a_strategy_comes_back_from_its_description() -> None:
    for strategy in (Prompts(2, at="part"), Prompts(deep=True, at="part", blocks="blocks")):
        loaded = load_strategy_from_config(strategy.to_config())
        assert loaded.to_config() == strategy.to_config()
        nets = [nn.ModuleDict({"part": of_timm()}) for _ in range(2)]
        for net, one in zip(nets, (strategy, loaded), strict=True):
            enable_fine_tuning(net, one)
        assert trainable(nets[0]) == trainable(nets[1])


def bert() -> nn.Module:
    return BertModel(BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
        intermediate_size=12, max_position_embeddings=16))  # fmt: skip


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "stages": (resnet18, "blocks are in several stages, .*blocks="),
    "no tokens": (lambda: nn.Sequential(*[nn.Conv2d(3, 3, 1)] * 3), "takes no tokens"),
    "no blocks": (lambda: nn.Linear(3, 3), "has no nn.Sequential or nn.ModuleList"),
    "causal": (lambda: GPT2Model(GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2)), "attention is causal"),
    "pairs": (lambda: BeitModel(BeitConfig(**SIZES, use_relative_position_bias=True)),
              "a bias for each pair of positions"),
    "windows": (lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8,
                                          depths=(2, 2), num_heads=(2, 2), img_size=56),
                "a bias for each pair of positions"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_refused(make: Callable[[], nn.Module], message: str, deep: bool) -> None:
    net = make()
    before = full_state(net)
    with pytest.raises(ValueError, match=message):
        enable_fine_tuning(net, Prompts(N, deep=deep))
    assert full_state(net) == before


def test_calls_that_are_refused() -> None:
    net = bert()
    enable_fine_tuning(net, Prompts(N))
    with pytest.raises(
        ValueError, match=r"was given \['attention_mask'\], which gift does not know"
    ):
        net(torch.ones(2, 4).long(), attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    net = of_timm(pos_embed="none")
    enable_fine_tuning(net, Prompts(N))
    with pytest.raises(ValueError, match=r"takes \(2, 8\), visual prompts are for blocks"):
        net.blocks(torch.randn(2, 8))


def test_a_planned_one_and_the_meta_device() -> None:
    with torch.device("meta"):
        net = of_timm()
    report = enable_fine_tuning(net, Prompts(N, deep=True))
    assert report.trainable_after == BLOCKS * N * DIM
    net.to_empty(device="cpu").load_state_dict(of_timm().state_dict())
    values = torch.cat([p for n, p in net.named_parameters() if n.endswith("visual_prompt_tokens")])
    assert 0.01 < values.std() < 0.03
