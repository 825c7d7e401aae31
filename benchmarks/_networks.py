"""Networks with random weights, and a training step on one batch of random data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel


@dataclass(frozen=True)
class Case:
    """A network and a batch.

    Args:
        make: makes the network.
        shape: of the batch: images ``(batch, 3, height, width)`` or tokens ``(batch, length)``.
        channels_last: whether images and weights are laid out with the channels last.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    channels_last: bool = False

    def network(self) -> nn.Module:
        """The network in training mode, with the same weights each time."""
        torch.manual_seed(0)
        return self.laid_out(self.make().train())

    def laid_out(self, network: nn.Module) -> nn.Module:
        """The network with its weights, and filters that came to them, in the case's layout."""
        return network.to(memory_format=torch.channels_last) if self.channels_last else network

    def batch(self) -> Tensor:
        """The same batch each time."""
        torch.manual_seed(1)
        if not self.images:
            return torch.randint(0, 1000, self.shape)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.randn(self.shape).contiguous(memory_format=layout)

    @property
    def images(self) -> bool:
        """Whether the network is a convolutional one."""
        return len(self.shape) > 2

    def of(self, batch: int) -> "Case":
        """The same with so many examples in a batch."""
        return replace(self, shape=(batch, *self.shape[1:]))


def loss(network: nn.Module, batch: Tensor) -> Tensor:
    """A loss in which every output takes part."""
    out: Any = network(batch)
    if isinstance(out, Tensor):
        return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])
    return out.last_hidden_state.square().mean()


def train(network: nn.Module, batch: Tensor) -> None:
    """One step without its optimizer."""
    for parameter in network.parameters():
        parameter.grad = None
    loss(network, batch).backward()


def bert(layers: int = 6) -> nn.Module:
    """A small encoder, without dropout, which would be most of the noise."""
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=6,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def llama(layers: int = 6) -> nn.Module:
    """A small decoder."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=8000,
        use_cache=False,
    )
    return LlamaModel(config)


class UNet(nn.Module):
    """Three transposed convolutions, as many steps down, and what is left out between them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(map(_twice, [3, *widths[:-1]], widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, few, 2, 2) for wide, few in pairs)
        self.joined = nn.ModuleList(_twice(wide, few) for wide, few in pairs)
        self.out = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits of all positions."""
        kept = []
        for number, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if number else x)
            kept.append(x)
        for up, block, beside in zip(self.up, self.joined, kept[-2::-1], strict=True):
            x = block(torch.cat([up(x), beside], 1))
        return self.out(x).mean((2, 3))


def _twice(inputs: int, outputs: int) -> nn.Module:
    first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, 1, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def undropped(make: Callable[[], nn.Module]) -> nn.Module:
    """A network of torchvision without dropout of its own."""
    network = make()
    for module in network.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    return network


IMAGES = (16, 3, 128, 128)
SMALL = (4, 3, 96, 96)

CASES = {
    "resnet18": Case(torchvision.models.resnet18, IMAGES),
    "resnet18, channels_last": Case(torchvision.models.resnet18, IMAGES, channels_last=True),
    "resnet50": Case(torchvision.models.resnet50, IMAGES),
    "resnet50, channels_last": Case(torchvision.models.resnet50, IMAGES, channels_last=True),
    "bert": Case(bert, (8, 128)),
    "bert, 24 x 128": Case(bert, (24, 128)),
    "bert, 2 layers": Case(partial(bert, layers=2), (8, 128)),
    "bert, 12 layers": Case(partial(bert, layers=12), (8, 128)),
    "llama": Case(llama, (4, 256)),
    "mobilenet": Case(partial(undropped, torchvision.models.mobilenet_v3_small), SMALL),
    "efficientnet": Case(partial(undropped, torchvision.models.efficientnet_b0), SMALL),
    "convnext": Case(partial(undropped, torchvision.models.convnext_tiny), SMALL),
    "unet": Case(UNet, (4, 3, 64, 64)),
}
