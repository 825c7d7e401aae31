"""What data say of layers: second moments of inputs, gradients of weights."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Collected = dict[str, tuple[Tensor, int]]
"""The sum and the number of calls, by the path of the layer."""


class Inputs:
    """Sum of second moments ``x^H x`` of the inputs of layers.

    Args:
        layers: layers by path.
        normalised: divide the inputs of each call by their largest value, as CorDA does; else
            `centred` has the moments around the mean.
    """

    def __init__(self, layers: Mapping[str, nn.Module], normalised: bool) -> None:
        self.found: Collected = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self.layers, self.normalised = layers, normalised
        self.mask: Tensor | None = None

    def run(self, call: Callable[[Any], Any], batches: Iterable[Any]) -> int:
        """Call the network with each batch; returns how many there were."""
        count = 0
        with ExitStack() as stack, torch.no_grad():
            for path, layer in self.layers.items():
                hook = layer.register_forward_pre_hook(_reads(self._see, path), with_kwargs=True)
                stack.callback(hook.remove)
            for batch in batches:
                self.mask = _mask_of(batch)
                call(batch)
                count += 1
        return count

    def _see(self, path: str, x: Tensor) -> None:
        x = _seen(x, self.mask).double()
        if self.normalised and x.numel():
            x = x / x.max().abs().clamp(min=torch.finfo(x.dtype).tiny)
        total, calls = self.found.get(path, (0, 0))
        self.found[path] = total + x.mT @ x, calls + 1
        mean, rows = self._sums.get(path, (0, 0))
        self._sums[path] = mean + x.sum(0), rows + len(x)

    def centred(self) -> Collected:
        """The sums of moments around the mean of all inputs of a layer."""
        made: Collected = {}
        for path, (total, calls) in self.found.items():
            mean, rows = self._sums[path]
            made[path] = total - torch.outer(mean, mean) / max(rows, 1), calls
        return made


class Gradients:
    """Sum of gradients of weights, without gradients of the parameters themselves.

    Args:
        layers: layers by path.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.found: Collected = {}
        self.layers = layers

    def run(self, loss: Callable[[Any], Tensor], batches: Iterable[Any]) -> int:
        """Differentiate the loss of each batch; returns how many there were."""
        count = 0
        with ExitStack() as stack, torch.enable_grad():
            for path, layer in self.layers.items():
                hook = layer.register_forward_hook(self._after(path), with_kwargs=True)
                stack.callback(hook.remove)
            for batch in batches:
                value = loss(batch)
                wanted = [p for p in _parameters(self.layers) if p.requires_grad]
                torch.autograd.grad(value, wanted, allow_unused=True)
                count += 1
        return count

    def _after(self, path: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = (*args, *kwargs.values())[0].detach()
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda g: self._add(path, x, g))

        return see

    def _add(self, path: str, x: Tensor, g: Tensor) -> None:
        g, x = g.reshape(-1, g.shape[-1]).double(), x.reshape(-1, x.shape[-1]).double()
        total, calls = self.found.get(path, (0, 0))
        self.found[path] = total + g.mT @ x, calls + 1


def _parameters(layers: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    return [p for layer in layers.values() for p in layer._parameters.values() if p is not None]


def _reads(see: Callable[[str, Tensor], None], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        see(path, (*args, *kwargs.values())[0].detach())

    return hook


def _mask_of(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _seen(x: Tensor, mask: Tensor | None) -> Tensor:
    """The inputs as rows, without those of padding."""
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])
