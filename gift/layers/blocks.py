"""Blocks of torch that run their layers in one fused kernel if nothing observes these."""

import math
from types import CodeType

import torch.nn.functional as F
from torch import nn

from gift.private.torch.calls import asks_until


def fuses_layers(module: nn.Module) -> bool:
    """Whether a module may compute what is inside it without calling its submodules."""
    return isinstance(module, nn.TransformerEncoderLayer)


def nests_batches(cls: type[nn.Module]) -> bool:
    """Whether modules of a class may pack padded batches as nested tensors."""
    return issubclass(cls, nn.TransformerEncoder)


def takes_two_sequences(module: nn.Module) -> bool:
    """Whether a module takes the sequences of an encoder and of a decoder."""
    return isinstance(module, nn.Transformer)


ASKING: dict[CodeType, float] = dict.fromkeys(
    (
        nn.TransformerEncoderLayer.forward.__code__,
        nn.TransformerEncoder.forward.__code__,
        nn.MultiheadAttention.forward.__code__,
    ),
    math.inf,
) | {F.multi_head_attention_forward.__code__: asks_until(F.multi_head_attention_forward)}
"""Functions that ask whether weights override torch functions, up to an offset in their bytecode.

If so, the forward functions do not fuse, and the function of attention lets itself be overridden as
a whole, instead of the products in it.
"""
