"""Strategies that wrap modules and freeze all weights; meant to be merged with others."""

from collections.abc import Sequence
from typing import Any

from gift.factories import (
    Check,
    ma_activated_lora,
    ma_bottleneck,
    ma_invocation,
    ma_loreft,
    ma_prefix,
    ma_prompt,
    ma_train,
    ma_visual_prompt,
    mc_blocks,
    mc_last_linear,
    mc_layer,
    mc_path,
)
from gift.strategies.base import CapLike, FineTuningStrategy, register_strategy

Where = Check | str | list[str] | None


def _check(given: Where, default: Check) -> Check:
    """Return the check that a user means by a check, by glob patterns of paths, or by None."""
    if given is None:
        return default
    return mc_path(glob=given) if isinstance(given, str | list | tuple) else given


def _trained_head(head: bool | Where) -> list[CapLike]:
    """Return the caps that train a head: the last linear layer for True, none for False or None."""
    if head is False or head is None:
        return []
    return [(_check(None if head is True else head, mc_last_linear()), ma_train())]


@register_strategy
class BottleneckFineTuningStrategy(FineTuningStrategy):
    """Bottleneck adapters after blocks, or beside them; see `gift.wrappers.Bottleneck`.

    The network's output is bit-identical until the first training step. All of its weights are
    frozen. Merged before other strategies, bottlenecks leave the blocks and their submodules to
    these::

        merge_strategies([BottleneckFineTuningStrategy(), LoRALinearFineTuningStrategy()])

    Args:
        size: width of the bottlenecks.
        parallel: whether bottlenecks read a block's input instead of its output.
        after: the modules, by a check or by glob patterns of their paths; None means the blocks of
            the network, see `gift.factories.mc_blocks`.
        settings: ``activation``, ``scaling``, ``dropout``, ``dim``, ``axis`` and ``dtype`` of
            `gift.wrappers.Bottleneck`.

    Raises:
        ValueError: if settings are out of range.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import BottleneckFineTuningStrategy
        >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64), num_layers=2)
        >>> report = enable_fine_tuning(net, BottleneckFineTuningStrategy(size=4))
        >>> [name for name in net.state_dict() if name.startswith("layers.0")]
        ['layers.0.bottleneck_down_weight', 'layers.0.bottleneck_down_bias',
         'layers.0.bottleneck_up_weight', 'layers.0.bottleneck_up_bias']
    """

    def __init__(
        self, size: int = 16, parallel: bool = False, after: Where = None, **settings: Any
    ) -> None:
        action = ma_bottleneck(size, parallel=parallel, **settings)
        super().__init__([(_check(after, mc_blocks()), action)])


@register_strategy
class ActivatedLoRAFineTuningStrategy(FineTuningStrategy):
    """Activated LoRA: deltas that act from an invocation on; see `gift.wrappers.ActivatedLoRA`.

    (Greenewald et al. 2025, https://arxiv.org/abs/2504.12397.) For language models of transformers.
    Before the invocation the model computes what it did, so that the cache of a text can be shared
    between the model and any number of such deltas. All weights are frozen.

    Args:
        invocation_tokens: ids of the tokens that invoke the delta; of several invocations in a row,
            the last one counts.
        rank: rank of the factors.
        layers: the linear layers, by a check or glob patterns of paths; None means all but the last
            one, the head.
        at: the language model, by a check or glob patterns; None means the network itself.
        settings: ``lora_alpha``, ``lora_dropout`` and ``dtype`` of `gift.wrappers.ActivatedLoRA`.

    Raises:
        ValueError: if settings are out of range.

    Example:
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import ActivatedLoRAFineTuningStrategy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> net = LlamaForCausalLM(config)
        >>> strategy = ActivatedLoRAFineTuningStrategy([5, 6], rank=2, layers="*.q_proj")
        >>> report = enable_fine_tuning(net, strategy)
        >>> [(name, tuple(p.shape)) for name, p in net.named_parameters() if p.requires_grad]
        [('model.layers.0.self_attn.q_proj.alora_B', (8, 2)),
         ('model.layers.0.self_attn.q_proj.alora_A', (2, 8))]
    """

    def __init__(
        self,
        invocation_tokens: Sequence[int],
        rank: int = 8,
        layers: Where = None,
        at: Where = None,
        **settings: Any,
    ) -> None:
        check = _check(layers, mc_layer("linear") & ~mc_last_linear())
        super().__init__(
            [
                (_check(at, mc_path("")), ma_invocation(invocation_tokens)),
                (check, ma_activated_lora(rank, **settings)),
            ]
        )


@register_strategy
class PromptFineTuningStrategy(FineTuningStrategy):
    """Prompt tuning: virtual tokens in front of every sequence; see `gift.wrappers.Prompt`.

    A language model of transformers is used with its head. In other networks, the wrapped module is
    the part that takes embeddings. All weights are frozen. This is the only strategy that changes
    the network's outputs at the start, since attention over more keys has another result.

    Args:
        num_virtual_tokens: number of virtual tokens.
        head: whether to train the head too, usually a new classifier: True for the last linear
            layer, or a check or glob patterns of paths.
        at: the module that takes the embeddings, by a check or glob patterns; None means the
            network itself.
        settings: ``dim``, ``batch_first``, ``strip``, ``encoder``, ``encoder_size``,
            ``encoder_layers``, ``encoder_dropout`` and ``dtype`` of `gift.wrappers.Prompt`.

    Raises:
        ValueError: if settings are out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import PromptFineTuningStrategy
        >>> layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        >>> net = nn.TransformerEncoder(layer, num_layers=2)
        >>> report = enable_fine_tuning(net, PromptFineTuningStrategy(num_virtual_tokens=4))
        >>> [(name, tuple(p.shape)) for name, p in net.named_parameters() if p.requires_grad]
        [('prompt_tokens', (4, 32))]
        >>> net(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        num_virtual_tokens: int = 8,
        head: bool | Where = False,
        at: Where = None,
        **settings: Any,
    ) -> None:
        action = ma_prompt(num_virtual_tokens, **settings)
        super().__init__([(_check(at, mc_path("")), action), *_trained_head(head)])


@register_strategy
class PTuningFineTuningStrategy(PromptFineTuningStrategy):
    """P-tuning: virtual tokens that a prompt encoder computes; see `gift.wrappers.Prompt`.

    (Liu et al. 2021, https://arxiv.org/abs/2103.10385.) As `PromptFineTuningStrategy`, with a small
    network between the trained vectors and the virtual tokens. After training, only the virtual
    tokens are needed: `gift.interop.save_peft` writes these, and `gift.save` what training needs.

    Args:
        num_virtual_tokens: number of virtual tokens.
        encoder: ``"mlp"`` or ``"lstm"``.
        head: whether to train the head too, usually a new classifier: True for the last linear
            layer, or a check or glob patterns of paths.
        at: the module that takes the embeddings, by a check or glob patterns; None means the
            network itself.
        settings: ``encoder_size``, ``encoder_layers``, ``encoder_dropout``, ``dim``,
            ``batch_first``, ``strip`` and ``dtype`` of `gift.wrappers.Prompt`.

    Raises:
        ValueError: if settings are out of range.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import PTuningFineTuningStrategy
        >>> layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        >>> net = nn.TransformerEncoder(layer, num_layers=2)
        >>> report = enable_fine_tuning(net, PTuningFineTuningStrategy(4, encoder_size=16))
        >>> report.trainable_after == 4 * 32 + (32 * 16 + 16) + (16 * 16 + 16) + (16 * 32 + 32)
        True
    """

    def __init__(
        self,
        num_virtual_tokens: int = 8,
        encoder: str = "mlp",
        head: bool | Where = False,
        at: Where = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_virtual_tokens, head, at, encoder=encoder, **settings)


@register_strategy
class PrefixFineTuningStrategy(FineTuningStrategy):
    """Prefix tuning: trained keys and values in each attention layer; see `gift.wrappers.Prefix`.

    (Li and Liang 2021, https://arxiv.org/abs/2101.00190.) For language models of transformers that
    have a cache of keys and values: decoders, and the decoders of encoder-decoder models. All
    weights are frozen. As virtual tokens do, a prefix changes the network's outputs at the start.

    Args:
        num_virtual_tokens: number of keys and values in front of those of the text.
        encoder: ``"mlp"`` to train the prefix through a small network, as the paper does, or None.
        head: whether to train the head too, usually a new classifier: True for the last linear
            layer, or a check or glob patterns of paths.
        at: the language model, by a check or glob patterns; None means the network itself.
        settings: ``encoder_size``, ``layers``, ``heads``, ``head_dim`` and ``dtype`` of
            `gift.wrappers.Prefix`.

    Raises:
        ValueError: if settings are out of range.

    Example:
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import PrefixFineTuningStrategy
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=3, n_head=2)
        >>> net = GPT2LMHeadModel(config)
        >>> report = enable_fine_tuning(net, PrefixFineTuningStrategy(num_virtual_tokens=4))
        >>> [(name, tuple(p.shape)) for name, p in net.named_parameters() if p.requires_grad]
        [('transformer.prefix_tokens', (4, 48))]
    """

    def __init__(
        self,
        num_virtual_tokens: int = 8,
        encoder: str | None = None,
        head: bool | Where = False,
        at: Where = None,
        **settings: Any,
    ) -> None:
        action = ma_prefix(num_virtual_tokens, encoder=encoder, **settings)
        super().__init__([(_check(at, mc_path("")), action), *_trained_head(head)])


@register_strategy
class VisualPromptFineTuningStrategy(FineTuningStrategy):
    """Visual prompt tuning: trained tokens beside the patches; see `gift.wrappers.VisualPrompt`.

    (Jia et al. 2022, https://arxiv.org/abs/2203.12119.) For vision transformers of timm,
    torchvision and transformers, and others whose blocks take ``(batch, time, dim)`` and nothing
    else. All weights are frozen. As virtual tokens of a text do, they change the network's outputs
    at the start.

    Args:
        num_virtual_tokens: number of trained vectors.
        deep: whether each block has vectors of its own; False for those of the first block, which
            go through all of them.
        head: whether to train the head too, usually a new classifier: True for the last linear
            layer, or a check or glob patterns of paths.
        at: the vision transformer, by a check or glob patterns; None means the network itself.
        settings: ``blocks`` of `gift.factories.ma_visual_prompt`; ``dropout``, ``dim`` and
            ``dtype`` of `gift.wrappers.VisualPrompt`.

    Raises:
        ValueError: if settings are out of range.

    Example:
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import VisualPromptFineTuningStrategy
        >>> from torchvision.models import VisionTransformer
        >>> net = VisionTransformer(
        ...     image_size=8, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16)
        >>> report = enable_fine_tuning(net, VisualPromptFineTuningStrategy(4, deep=True))
        >>> [(name, tuple(p.shape)) for name, p in net.named_parameters() if p.requires_grad]
        [('encoder.layers.encoder_layer_0.visual_prompt_tokens', (4, 8)),
         ('encoder.layers.encoder_layer_1.visual_prompt_tokens', (4, 8)),
         ('encoder.layers.encoder_layer_2.visual_prompt_tokens', (4, 8))]
    """

    def __init__(
        self,
        num_virtual_tokens: int = 8,
        deep: bool = False,
        head: bool | Where = False,
        at: Where = None,
        **settings: Any,
    ) -> None:
        action = ma_visual_prompt(num_virtual_tokens, deep, **settings)
        super().__init__([(_check(at, mc_path("")), action), *_trained_head(head)])


@register_strategy
class LoReFTFineTuningStrategy(FineTuningStrategy):
    """LoReFT: interventions on hidden states in a low-rank subspace; see `gift.wrappers.LoReFT`.

    (Wu et al. 2024, https://arxiv.org/abs/2404.03592.) The network's output is bit-identical until
    the first training step. All of its weights are frozen.

    Args:
        rank: dimensions of the subspace.
        positions: ``"all"``, or the number of first and last tokens, as ``"f5+l5"``, ``"f5"`` or
            ``"l5"``: those of the prompt for a language model.
        after: the modules, by a check or by glob patterns of their paths; None means the blocks of
            the network, see `gift.factories.mc_blocks`.
        head: whether to train the head too, usually a new classifier: True for the last linear
            layer, or a check or glob patterns of paths.
        settings: ``dropout``, ``dim`` and ``dtype`` of `gift.wrappers.LoReFT`.

    Raises:
        ValueError: if settings are out of range.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import LoReFTFineTuningStrategy
        >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64), num_layers=2)
        >>> report = enable_fine_tuning(net, LoReFTFineTuningStrategy(rank=4, after="layers.1"))
        >>> [(name, tuple(p.shape)) for name, p in net.named_parameters() if p.requires_grad]
        [('layers.1.loreft_rotation', (32, 4)), ('layers.1.loreft_weight', (4, 32)),
         ('layers.1.loreft_bias', (4,))]
    """

    def __init__(
        self,
        rank: int = 4,
        positions: str = "all",
        after: Where = None,
        head: bool | Where = False,
        **settings: Any,
    ) -> None:
        action = ma_loreft(rank, positions, **settings)
        super().__init__([(_check(after, mc_blocks()), action), *_trained_head(head)])
