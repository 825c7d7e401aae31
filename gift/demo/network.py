"""A small ResNet and a plain training loop, independent of gift."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem, three blocks of 32, 64 and 128 channels, and a linear head.

    Args:
        channels: number of channels of the images.
        classes: number of outputs.
        stride: stride of the stem and of the first block: 1 for tiny scans, 2 for photos.
    """

    def __init__(self, channels: int, classes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(Block(32, 32, stride), Block(32, 64, 2), Block(64, 128, 2))
        self.fc = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, classes)."""
        h = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(h.mean((2, 3)))


@dataclass
class Data:
    """Images ``(N, channels, height, width)`` and their class numbers."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def fit(net: nn.Module, data: Data, steps: int, lr: float, batch_size: int = 32) -> None:
    """Train `net`."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    net.train()
    for _ in range(steps):
        batch = torch.randint(len(data), (batch_size,))
        loss = F.cross_entropy(net(data.images[batch]), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs of `net` in evaluation mode."""
    net.eval()
    return torch.cat([net(batch) for batch in images.split(100)])


def accuracy(net: nn.Module, data: Data) -> float:
    """Return the share of `data` that `net` classifies correctly."""
    return (predict(net, data.images).argmax(1) == data.labels).double().mean().item()
