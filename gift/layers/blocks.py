"""Blocks of torch that run their layers in one fused kernel if nothing observes these."""

from types import CodeType

from torch import nn


def fuses_layers(module: nn.Module) -> bool:
    """Whether a module may compute what is inside it without calling its submodules."""
    return isinstance(module, nn.TransformerEncoderLayer)


def nests_batches(cls: type[nn.Module]) -> bool:
    """Whether modules of a class may pack padded batches as nested tensors."""
    return issubclass(cls, nn.TransformerEncoder)


def takes_two_sequences(module: nn.Module) -> bool:
    """Whether a module takes the sequences of an encoder and of a decoder."""
    return isinstance(module, nn.Transformer)


FORWARDS_THAT_ASK: frozenset[CodeType] = frozenset(
    cls.forward.__code__
    for cls in (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)
)
"""Forward functions that ask whether weights override torch functions, and if so do not fuse."""
