"""What holds for each registered method on whole networks; layers are the matrix's affair."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from gift import disable_fine_tuning, enable_fine_tuning
from gift.methods import METHODS
from gift.strategies import STRATEGIES
from tests.cases.selection import cells
from tests.common import all_bits, full_state

everywhere = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")


def bert() -> nn.Module:
    """Its output layer is tied to its embedding, and the biases of its decoder to each other."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=32, num_labels=5,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def convnet() -> nn.Module:
    """With a depthwise convolution, and statistics that move."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


Call = Callable[[nn.Module], Tensor]
TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Network = tuple[Callable[[], nn.Module], Call]
NETWORKS: dict[str, Network] = {
    "bert": (bert, lambda net: net(TOKENS).logits),
    "gpt2": (gpt2, lambda net: net(TOKENS).logits),
    "convnet": (convnet, lambda net: net(IMAGES)),
}


def enable(net: nn.Module, method: str, **settings: Any) -> Any:
    strategy = STRATEGIES[f"{METHODS[method].strategy_prefix}AllFineTuningStrategy"]
    return enable_fine_tuning(net, strategy(**settings))


def train(net: nn.Module) -> None:
    """As after some steps: every parameter of the delta has moved."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@cells(method=[*METHODS], network=NETWORKS)
def test_a_delta_goes_through_files_copies_and_back(method: str, network: Network) -> None:
    make, call = network
    net = make()
    base = copy.deepcopy(net)
    before, output = all_bits(base), call(base).detach()
    enable(net, method)
    assert torch.equal(call(net), output)
    train(net)
    trained = call(net)
    assert not torch.allclose(trained, output, atol=1e-4)
    trained.square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    fresh = copy.deepcopy(base)
    enable(fresh, method)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(call(fresh), trained)
    twin = copy.deepcopy(net)
    train(twin)
    assert torch.equal(call(net), trained)
    assert not torch.equal(call(twin), trained)
    assert all_bits(disable_fine_tuning(net)) == before
    assert torch.equal(call(net), output)


@cells(method=[*METHODS], network=NETWORKS)
def test_a_base_that_is_loaded_later_is_the_base(method: str, network: Network) -> None:
    """Enable, load a base, load a delta: as if the base had been there before."""
    make, call = network
    base = make()
    net = copy.deepcopy(base)
    enable(net, method)
    train(net)
    late = make()
    enable(late, method)
    late.load_state_dict(base.state_dict())
    assert torch.equal(call(late), call(base))
    late.load_state_dict(net.state_dict())
    assert torch.equal(call(late), call(net))


@everywhere
def test_a_network_from_the_meta_device(method: str) -> None:
    """Enabled without values, then given memory, then a base, then a delta."""
    base = convnet()
    net = copy.deepcopy(base)
    enable(net, method)
    train(net)
    with torch.device("meta"):
        late = convnet()
    enable(late, method)
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu")
    late.load_state_dict(base.state_dict())
    assert torch.equal(late(IMAGES), base(IMAGES))
    late.load_state_dict(net.state_dict())
    assert torch.equal(late(IMAGES), net(IMAGES))


@everywhere
def test_tensors_have_the_layout_of_files(method: str) -> None:
    """A product rounds by the layout of its factors."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 6))
    enable(net, method)
    named = [*net.named_parameters(), *net.named_buffers()]
    assert [name for name, tensor in named if not tensor.is_contiguous()] == []


@everywhere
def test_lazy_layers_get_their_delta_with_their_shape(method: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6))

    net, base = make(), make()
    enable(net, method)
    for other in (net, base):
        other(IMAGES)  # now they have shapes
    net.load_state_dict(base.state_dict())
    assert torch.equal(net(IMAGES), base(IMAGES))
    fresh = copy.deepcopy(base)
    enable(fresh, method)
    train(net)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(IMAGES), net(IMAGES))


@everywhere
def test_compiled_in_one_graph(method: str) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    enable(net, method)
    train(net)
    x = torch.randn(5, 8)
    expected = net(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    output = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@everywhere
def test_an_average_of_weights(method: str) -> None:
    """The average of two deltas is what the averaged copy holds, buffers included."""
    net = convnet()
    enable(net, method)
    average = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    train(net)
    average.update_parameters(net)
    first = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    train(net)
    average.update_parameters(net)
    for name, parameter in average.module.named_parameters():
        if name in first:
            expected = (first[name] + net.get_parameter(name).detach()) / 2
            torch.testing.assert_close(parameter, expected)
    assert average(IMAGES).isfinite().all()


@everywhere
def test_a_failure_half_way_leaves_nothing(method: str) -> None:
    net = nn.Sequential(nn.Linear(8, 12), nn.Conv2d(3, 8, 3), nn.Linear(0, 4))
    before = full_state(net)
    with pytest.raises(ValueError, match="no elements"):
        enable(net, method)
    assert full_state(net) == before


@everywhere
def test_trained_in_half_precision_over_a_real_network(method: str) -> None:
    """A bfloat16 ResNet: finite, and every delta gets a gradient of its own dtype."""
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], layer_type="basic",
        num_labels=4,
    )  # fmt: skip
    net = ResNetForImageClassification(config).to(torch.bfloat16)
    enable(net, method)
    images = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    net(images).logits.float().square().sum().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@everywhere
def test_parameters_of_another_dtype_than_the_weight(method: str, dtype: torch.dtype) -> None:
    """The base loses nothing by them: the start is exact, and the delta trains."""
    net = convnet()
    before = net(IMAGES).detach()
    enable(net, method, dtype=dtype)
    assert {p.dtype for p in net.parameters()} == {dtype}
    torch.testing.assert_close(net(IMAGES), before, rtol=0, atol=0)
    train(net)
    output = net(IMAGES)
    assert output.dtype == torch.float32
    (output / output.detach().norm()).sum().backward()  # within what 16 bits can hold
    assert all(p.grad.isfinite().all() for p in net.parameters())


@everywhere
def test_a_network_that_is_cast_after_enabling(method: str) -> None:
    """To bfloat16, delta and all: still the network that it was, as far as bfloat16 can tell."""
    net = convnet()
    enable(net, method)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    expected = net(IMAGES).detach()
    net.to(torch.bfloat16)
    got = net(IMAGES.bfloat16())
    got.sum().backward()
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.05 * scale)


class Marked(Tensor):
    """Of another library: functions of torch give this class, and keep where it came from."""

    came_from = ""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs)
        if type(found) is Marked:
            found.came_from = next((a.came_from for a in args if type(a) is Marked), "")
        return found


class Unwilling(Tensor):
    """Of a library that knows the functions of torch alone."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (getattr(func, "__module__", "") or "torch").startswith("torch"):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs)


FOREIGN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear of a batch": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "conv1d of transformers": (lambda: Conv1D(4, 6), (2, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 2), (2, 4, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("layer", FOREIGN)
@everywhere
def test_tensors_of_other_libraries(method: str, layer: str) -> None:
    """They come out as they go in, may be written into, and have the gradients of plain ones."""
    make, shape = FOREIGN[layer]
    torch.manual_seed(0)
    net = make()
    enable(net, method)
    train(net)
    values = torch.randn(shape)

    def gradients(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        net.zero_grad()
        y = net(x := x.detach().requires_grad_() * 1)
        y += 1
        y.as_subclass(Tensor).square().sum().backward()
        return y, [parameter.grad.clone() for parameter in net.parameters()]

    expected, wanted = gradients(values)
    marked = values.as_subclass(Marked)
    marked.came_from = "a scanner"
    found, theirs = gradients(marked)
    assert (type(found), found.came_from) == (Marked, "a scanner")
    torch.testing.assert_close(found.as_subclass(Tensor), expected)
    torch.testing.assert_close(theirs, wanted)
    unwilling = net(values.as_subclass(Unwilling))
    assert type(unwilling) is Unwilling
    torch.testing.assert_close(unwilling.as_subclass(Tensor) + 1, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@everywhere
def test_nested_tensors(method: str, layout: torch.layout) -> None:
    """As each of the tensors in them, with their gradients."""
    torch.manual_seed(0)
    net, parts = nn.Linear(6, 4), [torch.randn(3, 6), torch.randn(5, 6)]
    enable(net, method)
    train(net)
    found = net(torch.nested.nested_tensor(parts, layout=layout)).unbind()
    expected = [net(part) for part in parts]
    torch.testing.assert_close(list(found), expected)
    given, wanted = (
        torch.autograd.grad(torch.cat(outputs).square().sum(), list(net.parameters()))
        for outputs in (list(found), expected)
    )
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-3)


KEPT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(8, 8), torch.randn(3, 8)),
    "transposed linear": (lambda: Conv1D(8, 8), torch.randn(3, 8)),
    "conv": (lambda: nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 5, 5)),
    "grouped conv": (lambda: nn.Conv1d(8, 8, 3, groups=2), torch.randn(2, 8, 9)),
    "transposed conv": (lambda: nn.ConvTranspose2d(8, 8, 3), torch.randn(2, 8, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 8), torch.arange(6)),
}


@pytest.mark.parametrize("layer", KEPT)
@everywhere
def test_a_forward_that_was_kept_computes_what_the_layer_is(method: str, layer: str) -> None:
    """Plain after the delta is gone, and with another delta once it has one."""
    make, x = KEPT[layer]
    net = make()
    expected = net(x)
    try:
        enable(net, method)
    except ValueError:
        pytest.skip("it cannot adapt this layer")
    train(net)
    kept = net.forward
    torch.testing.assert_close(kept(x), net(x), rtol=0, atol=0)
    disable_fine_tuning(net)
    torch.testing.assert_close(kept(x), expected, rtol=0, atol=0)
    for other in ("lora", "full_delta"):
        enable(net, other)
        train(net)
        torch.testing.assert_close(kept(x), net(x), rtol=0, atol=0)
        assert not torch.allclose(net(x), expected)
        disable_fine_tuning(net)
