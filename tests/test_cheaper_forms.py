"""DoRA, (IA)^3, VeRA, LoHa and LoKr without their effective weight: what autograd says of it."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_layer
from gift.kernels.merged_linear import Terms
from gift.kernels.rescale import rescaled
from tests.cases.selection import cells

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.as_large,
]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("dora", {"rank": 2}),
    "dora, whole gradient": ("dora", {"rank": 2, "detach_norm": False}),
    "ia3": ("ia3", {}),
    "ia3 of inputs": ("ia3", {"feedforward": True}),
    "vera": ("vera", {"rank": 3}),
    "vera of many terms": ("vera", {"rank": 64}),
    "loha": ("loha", {"rank": 2}),
    "loha of many terms": ("loha", {"rank": 10, "clip_rank": True}),
    "lokr": ("lokr", {"rank": 1}),
    "lokr of four": ("lokr", {"rank": 1, "factor": 2, "decompose_both": True}),
    "lokr, full": ("lokr", {"full_matrix": True}),
    "boft": ("boft", {"block_size": 2, "clip_block_size": True}),
    "delora": ("delora", {"rank": 2}),
    "gralora": ("gralora", {"rank": 2}),
    "miss": ("miss", {"rank": 3}),
}
by_every_method = pytest.mark.parametrize("method", METHODS)


CIRCULAR = {f"c3a in blocks of {size}": ("c3a", {"block_size": size}) for size in (17, 32)}


def enabled(layer: nn.Module, method: str) -> nn.Module:
    """The layer, adapted and as after some steps."""
    name, settings = (METHODS | CIRCULAR)[method]
    clip = {"clip_rank": True} if "rank" in settings else {}
    caps = [(mc_layer(), ma_adapt(name, **(settings | clip)))]
    net = nn.Sequential(layer)
    enable_fine_tuning(net, FineTuningStrategy(module_caps=caps))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return net


def through_weight(net: nn.Module, x: Tensor) -> Tensor:
    """What the layer's own class does with the tensors that it reads: the general way."""
    layer: Any = net[0]
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias)
    return layer._conv_forward(x, layer.weight, layer.bias)


def compare(net: nn.Module, x: Tensor, accuracy: float = 1e-10) -> None:
    """Value and gradients of the layer are those of its effective weight."""
    leaves = [x, *(p for p in net.parameters() if p.requires_grad)]
    fast, general = net(x), through_weight(net, x)
    assert fast.dtype == general.dtype
    torch.testing.assert_close(fast, general, rtol=accuracy, atol=accuracy)
    towards = torch.randn_like(general)
    pairs = zip(
        torch.autograd.grad(fast, leaves, towards),
        torch.autograd.grad(general, leaves, towards),
        strict=True,
    )
    for found, expected in pairs:
        scale = accuracy * (1 + expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=accuracy, atol=scale)


def random_convolution(number: int) -> tuple[nn.Module, Tensor]:
    """Kernel, stride, padding, dilation, groups, bias, batch and memory format by chance."""
    dice = random.Random(number)
    axes = number % 3 + 1
    kernel = [dice.choice((1, 2, 3)) for _ in range(axes)] if number % 4 else [1] * axes
    dilation = [dice.choice((1, 1, 2)) for _ in range(axes)]
    stride, padding = [dice.choice((1, 1, 2)) for _ in range(axes)], dice.choice(("number", "same"))
    groups = dice.choice((1, 1, 1, 1, 2))
    if padding == "same":
        stride = [1] * axes
    around: Any = padding if padding == "same" else [dice.choice((0, 1)) for _ in range(axes)]
    torch.manual_seed(number)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        dice.choice((4, 6)), dice.choice((4, 8)), kernel, stride, around, dilation, groups,
        dice.random() < 0.6, dice.choice(("zeros", "zeros", "reflect", "circular")),
        dtype=torch.float64,
    )  # fmt: skip
    shape = [layer.in_channels, *(dice.choice((6, 7)) for _ in range(axes))]
    x = torch.randn(shape if dice.random() < 0.15 else [2, *shape], dtype=torch.float64)
    if axes == 2 and x.dim() == 4 and dice.random() < 0.4:
        layer, x = (
            layer.to(memory_format=torch.channels_last),
            x.to(memory_format=torch.channels_last),
        )
    return layer, x.requires_grad_()


@by_every_method
def test_convolutions_of_any_geometry(method: str) -> None:
    for number in range(24):
        layer, x = random_convolution(number)
        compare(enabled(layer, method), x)


@by_every_method
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (300,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(method: str, batch: tuple[int, ...], bias: bool) -> None:
    net = enabled(nn.Linear(12, 8, bias, dtype=torch.float64), method)
    compare(net, torch.randn(*batch, 12, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("size", [17, 32])
def test_circular_convolutions_in_the_frequency_domain(size: int, batch: tuple[int, ...]) -> None:
    """Kernels of the sizes that linear layers transform, even and odd."""
    layer = nn.Linear(2 * size, 3 * size, bias=bool(batch), dtype=torch.float64)
    net = enabled(layer, f"c3a in blocks of {size}")
    compare(net, torch.randn(*batch, 2 * size, dtype=torch.float64, requires_grad=True))
    compare(net.float(), torch.randn(*batch, 2 * size, requires_grad=True), 1e-4)
    x = torch.randn(*batch, 2 * size)
    torch.compiler.reset()  # other tests have compiled the same code
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 4, 3, padding=1), (2, 4, 5, 5)),
    "conv, strided": (lambda: nn.Conv1d(4, 6, 2, stride=2, bias=False), (2, 4, 6)),
}
on_layers = pytest.mark.parametrize("layer", LAYERS)


@on_layers
@by_every_method
def test_trained_biases_and_unfrozen_weights_get_their_gradient(method: str, layer: str) -> None:
    make, shape = LAYERS[layer]
    net = enabled(make().double(), method)
    for parameter in nn.Module.parameters(net):
        parameter.requires_grad_(True)
    compare(net, torch.randn(shape, dtype=torch.float64, requires_grad=True))


@on_layers
@by_every_method
def test_single_precision_and_autocast(method: str, layer: str) -> None:
    make, shape = LAYERS[layer]
    net, x = enabled(make(), method), torch.randn(shape, requires_grad=True)
    compare(net, x, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        found, general = net(x), through_weight(net, x)
        assert found.dtype == torch.bfloat16
    error = (found.double() - general.double()).norm() / general.double().norm()
    assert error < 2**-6  # some roundings to 8 bits
    found.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@cells(method=[n for n in METHODS if n != "dora"], layer=[*LAYERS])  # its gradient is no derivative
def test_gradients_of_gradients(method: str, layer: str) -> None:
    """They agree with differences, or are refused in words: vera keeps no inputs beside a layer."""
    make, shape = LAYERS[layer]
    net = enabled(make().double(), method)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}

    def call(x: Tensor, *leaves: Tensor) -> Tensor:
        for name, leaf in zip(trained, leaves, strict=True):
            owner, _, key = name.rpartition(".")
            net.get_submodule(owner)._parameters[key] = leaf  # type: ignore[assignment]
        return net(x)

    assert gradcheck(call, (x, *trained.values()))
    if method == "vera" and layer == "linear":
        with pytest.raises(RuntimeError, match="keeps no inputs"):
            gradgradcheck(call, (x, *trained.values()))
    else:
        assert gradgradcheck(call, (x, *trained.values()))


@on_layers
@by_every_method
def test_checkpoints_and_transforms(method: str, layer: str) -> None:
    make, shape = LAYERS[layer]
    net, x = enabled(make().double(), method), torch.randn(shape, dtype=torch.float64)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(through_weight(net, x).square().sum(), parameters.values())
    again = checkpoint(net, x, use_reentrant=False).square().sum()
    torch.testing.assert_close(torch.autograd.grad(again, parameters.values()), expected)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(tuple(found.values()), expected)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(tuple(g.sum(0) for g in each.values()), expected)


@cells(method=[*METHODS], layer=[*LAYERS])
def test_compiled_in_one_graph(method: str, layer: str) -> None:
    make, shape = LAYERS[layer]
    torch._dynamo.reset()
    net, x = enabled(make().double(), method), torch.randn(shape, dtype=torch.float64)
    parameters = list(net.parameters())
    expected = torch.autograd.grad(through_weight(net, x).square().sum(), parameters)
    output = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), parameters), expected)


class Doubled(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.square(), bias)


@by_every_method
def test_a_convolution_that_computes_something_else(method: str) -> None:
    net = enabled(Doubled(4, 4, 3).double(), method)
    compare(net, torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True))


# Outputs times factors.


@pytest.mark.parametrize("method", ["dora", "ia3"])
@on_layers
def test_an_output_that_is_overwritten(method: str, layer: str) -> None:
    """As by ``nn.ReLU(inplace=True)``, which is not an error behind a layer that is trained."""
    make, shape = LAYERS[layer]
    net = enabled(make().double(), method)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *net.parameters()]
    found = torch.autograd.grad(net(x).relu_().square().sum(), leaves)
    expected = torch.autograd.grad(through_weight(net, x).relu().square().sum(), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [0.0, 1e-9, -1.0])
def test_factors_of_any_size(value: float) -> None:
    net = enabled(nn.Conv2d(4, 4, 3).double(), "ia3")
    with torch.no_grad():
        net[0].ia3_l[1] = value
    compare(net, torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True))


def test_what_is_kept_is_the_output_and_nothing_of_its_size_beside_it() -> None:
    z = torch.randn(2, 3, 4, requires_grad=True) * 1
    ratio = torch.rand(4).add(1).requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = rescaled(z, ratio, None, lambda: z, ())
    assert y.data_ptr() in kept
    assert z.data_ptr() not in kept


def test_when_a_delta_goes_beside_its_weight() -> None:
    """Fewer terms, fewer positions, a larger weight: each can only speak for it."""
    base = Terms(256, 256, 16, 512)
    for trains in (True, False):
        for both in (True, False):
            for fewer in (1, 4, 64, 256):
                now = Terms(256, 256, fewer, 512).go_beside(trains, both)
                more = Terms(256, 256, fewer * 2, 512).go_beside(trains, both)
                assert now or not more
    assert base.go_beside()
    assert not Terms(256, 256, 256, 512).go_beside()
