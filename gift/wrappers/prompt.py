"""Prompt tuning: virtual tokens in front of a module's input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.forwards import Forward, where
from gift.errors import AdaptationError
from gift.layers.blocks import takes_two_sequences
from gift.methods.settings import flag, setting, whole
from gift.wrappers.arguments import Arguments
from gift.wrappers.encoder import Encoded
from gift.wrappers.features import inputs_of, weight_beside
from gift.wrappers.tensors import with_first_changed


@dataclass(frozen=True)
class Prompt(Encoded):
    """Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691) in front of embeddings.

    Trained vectors ``P (n, dim)``, the virtual tokens, precede the embeddings ``X`` of each
    sequence, and the network with its frozen weights reads ``[P; X]``. Its outputs at the virtual
    positions are removed, so that a training loop sees the same shapes as before. It adds one
    tensor ``tokens (n, dim)``, that is ``n * dim`` parameters.

    This is the only method that changes a network's outputs at the start: attention over more keys
    has another result, whatever the new keys are. Vectors of zeros would change it too, since a
    softmax gives them weight.

    The module may be any whose first argument is ``(batch, time, dim)``, ``(time, batch, dim)`` or,
    as `nn.TransformerEncoder` allows, ``(time, dim)``. Of its other arguments, those with the names
    of torch's masks are extended. A padding mask masks no virtual token. In a mask between
    positions, every token sees all virtual ones, and a virtual one sees those before it and itself,
    so that a causal mask stays causal. A length, or a mask under another name, is passed unchanged.

    P-tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385) is prompt tuning with an `encoder`,
    a small network ``g`` between trained vectors ``E (n, dim)`` and the virtual tokens
    ``P = g(E)``, which makes training less sensitive to its start. With a hidden size of `h`, the
    encoder adds::

        mlp    dim h + h^2 + h dim + 2 h + dim
        lstm   8 (dim h + h^2 + 2 h)  for the first layer,  8 (3 h^2 + 2 h)  for each further one,
               and  4 h^2 + 2 h dim + 2 h + dim

    For language models of transformers, see `gift.wrappers.language`.

    Args:
        num_virtual_tokens: `n`.
        dim: number of features; None infers it from the module's first layer.
        batch_first: whether the batch comes before the time; None infers it from the first
            submodule with an attribute ``batch_first``, and means True if there is none.
        strip: whether to remove the outputs at the virtual positions from the first tensor of the
            output, provided that it has as many axes as the input and the extended length. False
            leaves the output unchanged.
        encoder: ``"mlp"`` or ``"lstm"`` for P-tuning; None trains the virtual tokens themselves.
        encoder_size: the hidden size `h` of the encoder; None means `dim`.
        encoder_layers: number of layers of the LSTM; None means 2.
        encoder_dropout: probability of dropout between layers of the LSTM, in training mode.
        dtype: dtype of the new parameters, or its name; None means that of the module, but at least
            float32.

    Raises:
        ValueError: if settings are out of range; the message names all of them.
    """

    name: ClassVar[str] = "prompt"
    size_setting: ClassVar[str | None] = "num_virtual_tokens"

    num_virtual_tokens: int = whole(8)
    dim: int | None = whole(None, enters_weight=False, kw_only=True)
    batch_first: bool | None = setting(
        None, "True or False", lambda value: isinstance(value, bool), kw_only=True, found=True
    )
    strip: bool = flag(True, kw_only=True)

    def fit(self, module: nn.Module) -> Self:
        """Return the method with the order of the module's axes."""
        if takes_two_sequences(module):
            raise AdaptationError("it takes two sequences: wrap its encoder or its decoder")
        if self.batch_first is not None:
            return self
        said = (getattr(part, "batch_first", None) for part in module.modules())
        first = next((value for value in said if isinstance(value, bool)), True)
        return replace(self, batch_first=first)

    def init_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return normal vectors: with a standard deviation of 0.02, or of 1 for an encoder."""
        dim = inputs_of(module) if self.dim is None else self.dim
        if dim is None:
            raise AdaptationError(
                "its first layer takes no embeddings (batch, time, dim): wrap the part of the "
                "network that does, or give dim="
            )
        like = self.beside(weight_beside(module))
        if self.encoder is not None:
            return self.encoder_parameters(dim, dim, like)
        return {"tokens": torch.randn(self.num_virtual_tokens, dim, **like) * 0.02}

    def call(
        self,
        module: nn.Module,
        forward: Forward,
        parameters: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the module's output for ``[P; X]``, without the virtual positions."""
        given = Arguments(module, args, kwargs, self.name)
        tokens = self.virtual_tokens(module, parameters)
        x = self._checked(module, given.named.get(given.first), tokens)
        axis = 0 if x.ndim == 2 or not self.batch_first else 1
        given.named[given.first] = in_front(tokens, x, axis)
        for name, extended in _MASKS.items():
            if isinstance(given.named.get(name), Tensor):
                given.named[name] = extended(given.named[name], len(tokens))
        output = given.passed_to(forward)
        if not self.strip:
            return output
        length = x.shape[axis] + len(tokens)

        def without(result: Tensor) -> Tensor:
            if result.ndim != x.ndim or result.shape[axis] != length:
                return result
            return result.narrow(axis, len(tokens), x.shape[axis])

        stripped = with_first_changed(output, without)
        return output if stripped is None else stripped

    def _checked(self, module: nn.Module, x: Any, tokens: Tensor) -> Tensor:
        if isinstance(x, Tensor) and not x.is_nested:
            if x.is_floating_point() and x.ndim in (2, 3) and x.shape[-1] == tokens.shape[1]:
                return x
            given = f"{x.dtype} of shape {tuple(x.shape)}"
        else:
            given = f"a {type(x).__name__}"
        raise AdaptationError(
            f"{where(module, self.name)} takes {given} as its first argument, its prompt is for "
            f"embeddings (batch, time, {tokens.shape[1]}): wrap the part of the network that "
            "takes them, or give dim="
        )


def in_front(tokens: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return ``[P; X]`` along that axis, in the dtype of the embeddings."""
    if x.ndim == 3:
        tokens = tokens.unsqueeze(1 - axis).expand(
            *(len(tokens) if i == axis else size for i, size in enumerate(x.shape))
        )
    return torch.cat([tokens.to(x.dtype), x], axis)


def _unmasked(mask: Tensor, n: int) -> Tensor:
    """Extend a mask of keys, ``(..., time)``, where zero or False is visible."""
    return F.pad(mask, (n, 0))


def _between(mask: Tensor, n: int) -> Tensor:
    """Extend a mask between positions, ``(..., time, time)``."""
    blocked = True if mask.dtype is torch.bool else float("-inf")
    above = F.pad(mask, (n, 0, n, 0))
    rows, columns = (torch.arange(size, device=mask.device) for size in above.shape[-2:])
    later = (rows[:, None] < n) & (columns > rows[:, None])
    return above.masked_fill(later, blocked)


def _of_rows(mask: Tensor, n: int) -> Tensor:
    """Extend a mask from positions to those of another sequence, ``(..., time, others)``."""
    return F.pad(mask, (0, 0, n, 0))


_MASKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mask": _between,
    "src_mask": _between,
    "tgt_mask": _between,
    "attn_mask": _between,
    "src_key_padding_mask": _unmasked,
    "tgt_key_padding_mask": _unmasked,
    "key_padding_mask": _unmasked,
    "memory_mask": _of_rows,
}
