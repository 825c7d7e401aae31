"""The properties hold in a plain loop, and each fails where it is broken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gift
from gift.strategies import LoRAAllFineTuningStrategy
from tests.clients._properties import Client

X = torch.linspace(-1, 1, 64).reshape(8, 8)
Y = X[:, :2].sin()


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def trained(spoil: Callable[[Any], object]) -> tuple[Client, list[float]]:
    net = made()
    client = Client(net, lambda: net.eval()(X))
    client.enable(LoRAAllFineTuningStrategy(rank=1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = nn.functional.mse_loss(net.train()(X), Y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        spoil(net)
    return client, losses


def reload(client: Client) -> torch.Tensor:
    fresh = made()
    gift.enable_fine_tuning(fresh, LoRAAllFineTuningStrategy(rank=1))
    fresh.load_state_dict(client.net.state_dict())
    with torch.no_grad():  # with gradients, layers may be computed in another form
        return fresh.eval()(X)


def test_all_hold_in_a_plain_loop() -> None:
    client, losses = trained(lambda net: None)
    client.check(losses, lambda: reload(client), exact=True)


def test_a_loss_that_rises_is_found() -> None:
    client, losses = trained(lambda net: None)
    with pytest.raises(AssertionError):
        client.check(losses[::-1], None)


def test_an_output_that_differs_is_found() -> None:
    client, losses = trained(lambda net: None)
    with pytest.raises(AssertionError, match="not close"):
        client.check(losses, lambda: reload(client) + 1e-3)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda net: net[0].bias.mul_(1.001),  # a frozen parameter moves
        lambda net: net[3].lora_B.zero_(),  # a delta is as it was
        lambda net: net[0].lora_A.requires_grad_(False),
        lambda net: setattr(net, "1", nn.BatchNorm1d(16, eps=1.0)),
        lambda net: net[1].register_buffer("more", torch.zeros(2)),
        lambda net: net._gift_network.undo.requires_grad.clear(),
    ],
)
def test_a_network_that_differs_is_found(spoil: Callable[[Any], object]) -> None:
    client, losses = trained(spoil)
    with pytest.raises(AssertionError):
        client.check(losses, None)
