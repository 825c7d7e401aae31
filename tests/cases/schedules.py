"""The network of the tests of schedules."""

import torch
from torch import nn

from gift import FineTuningStrategy, enable_fine_tuning
from gift.schedules import Schedule
from tests.common import trainable

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    """Six units with parameters, of which "1" is a batch norm and "9" the head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8), nn.Linear(8, 2),
    )  # fmt: skip


def attached(schedule: Schedule, strategy: FineTuningStrategy | None = None) -> nn.Sequential:
    net = network()
    if strategy is not None:
        enable_fine_tuning(net, strategy)
    schedule.attach(net)
    return net


def units(net: nn.Module) -> str:
    """The units that are trained, at least in part."""
    return " ".join(dict.fromkeys(name.partition(".")[0] for name in trainable(net)))


def moves(net: nn.Module, layer: int) -> bool:
    """Whether the running statistics of a layer move in training."""
    before = net[layer].running_mean.clone()
    net.train()(X)
    return not torch.equal(before, net[layer].running_mean)
