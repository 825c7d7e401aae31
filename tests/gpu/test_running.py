"""Streams, CUDA graphs, compiling, and recurrent layers by cuDNN."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from tests.gpu.on_device import (
    adapted,
    aside,
    assert_near,
    captured,
    gradients,
    moved,
    network,
    pictures,
)

METHODS = ("lora", "dora", "loha", "ia3", "vera")
of_some_methods = pytest.mark.parametrize("method", METHODS)
EXACT = 1e-4  # kernels of float32 sum in another order


def train(net: Any, batch: Tensor, steps: int = 3) -> Tensor:
    """Some steps of SGD; gives the last gradients."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    return gradients(net)


@of_some_methods
def test_training_on_another_stream_is_that_of_the_cpu(method: str, device: torch.device) -> None:
    net = adapted(network(), method)
    exact = copy.deepcopy(net).double()
    expected, net = train(exact, pictures().double()), net.to(device)
    with aside(device):
        found = train(net, pictures().to(device))
    assert_near(found, expected, EXACT)
    assert_near(net(pictures().to(device)), exact(pictures().double()), EXACT)


def test_what_another_stream_wrote_is_read(device: torch.device) -> None:
    """An effective weight is made once for as long as nothing was written to its parts."""
    net = adapted(network().to(device))
    batch, layer = pictures().to(device), net[2]
    with torch.no_grad():
        before = net(batch)
        assert layer.weight is not None  # it is remembered
        with aside(device):
            layer.lora_B.add_(0.5)
        changed = net(batch)
        plain = gift.merge(copy.deepcopy(net))
    assert not torch.allclose(before, changed)
    assert_near(changed, plain(batch), EXACT)


@of_some_methods
def test_a_graph_of_inference_sees_new_inputs_and_new_deltas(
    method: str, device: torch.device
) -> None:
    net = adapted(network().to(device).eval(), method)
    batch = pictures().to(device)
    with torch.no_grad():
        replay = captured(device, lambda: net(batch))
        for seed in (2, 3):
            batch.copy_(pictures(seed=seed).to(device))
            for parameter in net.parameters():
                parameter.mul_(1.5)
            assert_near(replay(), net(batch), EXACT)


@of_some_methods
def test_a_graph_of_a_training_step_trains(method: str, device: torch.device) -> None:
    net = adapted(network().to(device), method)
    batch, parameters = pictures().to(device), [*net.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        for parameter in parameters:
            parameter.grad.zero_()
        net(batch).square().mean().backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(parameter.grad, alpha=0.05)

    replay = captured(device, step)
    exact = copy.deepcopy(net).cpu().double()
    for _ in range(3):
        replay()
    train(exact, pictures().double())
    assert_near(net(batch), exact(pictures().double()), EXACT)


@of_some_methods
def test_compiled_with_less_overhead(method: str, device: torch.device, dynamo: None) -> None:
    net = adapted(network().to(device), method)
    exact = copy.deepcopy(net).cpu().double()
    ways: dict[str, Any] = {"cuda": {"mode": "reduce-overhead"}, "cpu": {"backend": "aot_eager"}}
    compiled: Any = torch.compile(net, **ways[device.type])
    for _ in range(3):  # recorded in the second call, replayed in the third
        torch.compiler.cudagraph_mark_step_begin()
        found = train(compiled, pictures().to(device), steps=1)
        assert_near(found, train(exact, pictures().double(), steps=1), EXACT)


RECURRENT = {
    "lstm": lambda: nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True),
    "projected lstm": lambda: nn.LSTM(6, 8, proj_size=4, batch_first=True),
    "gru": lambda: nn.GRU(6, 8, 2, batch_first=True),
    "rnn": lambda: nn.RNN(6, 8, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_recurrent_layers_of_cudnn(kind: str, method: str, device: torch.device) -> None:
    torch.manual_seed(0)
    net = adapted(RECURRENT[kind](), method)
    exact, sequences = copy.deepcopy(net).double(), torch.randn(3, 7, 6)
    net.to(device)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05) for one in (net, exact)]
    for _ in range(3):
        outputs = [net(sequences.to(device))[0], exact(sequences.double())[0]]
        assert_near(*outputs, EXACT)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        assert_near(gradients(net), gradients(exact), EXACT)
    net.flatten_parameters()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        without = net(sequences.to(device))[0]
    assert_near(net.eval()(sequences.to(device))[0], without, EXACT)
    merged = gift.merge(net)
    assert_near(merged(sequences.to(device))[0], exact(sequences.double())[0], EXACT)


def test_a_network_moves_to_the_device_and_back(device: torch.device) -> None:
    net, batch = adapted(network()), pictures()
    before = net(batch)
    net.to(device)
    assert {p.device.type for p in net.parameters()} == {device.type}
    assert_near(net(moved(batch, device)), before, EXACT)
    assert torch.equal(net.cpu()(batch), before)
