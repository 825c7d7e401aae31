"""What several test files compare a fine-tuned network with: bits, and the formula of LoRA."""

import copy
import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.conv import _ConvTransposeNd

from gift import FineTuningStrategy, GiftWarning, enable_fine_tuning
from gift.private.torch.autograd import bytes_kept_by
from gift.strategies import LoRAAllFineTuningStrategy


def enabled(net: nn.Module, strategy: FineTuningStrategy | None = None, std: float = 0.1) -> Any:
    """`net`, fine-tuned, its delta as after some training: nothing in it is zero any more.

    Layers of tests are so small that a delta is often larger than they are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        enable_fine_tuning(net, strategy or LoRAAllFineTuningStrategy())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    return net


def trainable(net: nn.Module) -> list[str]:
    return [name for name, p in net.named_parameters() if p.requires_grad]


def bits(tensor: Tensor) -> str:
    """A digest of dtype, shape and every bit."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha1(data).hexdigest()}"


def all_bits(net: nn.Module) -> dict[str, str]:
    """Every parameter and buffer of `net` under its name."""
    named = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    return {name: bits(tensor) for name, tensor in named}


def full_state(net: nn.Module) -> dict[str, Any]:
    """All that a network is: classes, objects, attributes, hooks, values, flags and gradients."""
    return {
        path: (type(module), {name: _look(value) for name, value in vars(module).items()})
        for path, module in net.named_modules(remove_duplicate=False)
    }


def _look(value: Any) -> Any:
    if isinstance(value, Tensor):
        known = "" if value.is_meta or isinstance(value, nn.UninitializedParameter) else bits(value)
        return id(value), value.requires_grad, id(value.grad), known
    if isinstance(value, dict):
        return [(str(key), _look(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_look(item) for item in value]
    if isinstance(value, bool | int | float | str | set | None):
        return copy.copy(value)
    return id(value)


def frozen_output(net: nn.Module, x: Any) -> Tensor:
    """What a network computes as long as nothing of it is trained.

    torch may multiply by a trained weight in another order than by a frozen one.
    """
    trained = [p for p in nn.Module.parameters(net) if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    output: Tensor = net(x)
    for parameter in trained:
        parameter.requires_grad_(True)
    return output


def delta(module: nn.Module, weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """``B A``, for each group, in the shape of the weight."""
    product = torch.einsum("...or,...ri->...oi", b, a)
    if isinstance(module, _ConvTransposeNd):  # (in, out / groups, *kernel)
        _, outputs, *kernel = weight.shape
        product = product.reshape(module.groups, outputs, -1, *kernel).transpose(1, 2)
    if type(module).__name__ == "Conv1D":  # of transformers: (in, out)
        product = product.T
    return product.reshape(weight.shape)


def merged(net: nn.Module, base: nn.Module) -> nn.Module:
    """A copy of the plain `base` that holds the effective weights of `net`, by the formula."""
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for _, module, weight, factors in _adapted(net, plain):
            weight += delta(module, weight, *factors)
    return plain


def _adapted(net: nn.Module, plain: nn.Module) -> list[tuple[str, nn.Module, Tensor, Any]]:
    """Names, modules and weights of `plain`, and the factors that `net` has for them."""
    factors, found = dict(net.named_parameters()), []
    for path, module in plain.named_modules():
        for name, weight in module._parameters.items():
            prefix = f"{path}.".lstrip(".") + ("" if name == "weight" else f"{name}_")
            if weight is not None and f"{prefix}lora_B" in factors:
                pair = factors[f"{prefix}lora_B"], factors[f"{prefix}lora_A"]
                found.append((prefix, module, weight, pair))
    return found


def assert_same_training(
    net: nn.Module,
    base: nn.Module,
    call: Callable[[nn.Module], Tensor],
) -> None:
    """`net` gives the output of the merged base, and its delta the gradients of the chain rule.

    Args:
        net: fine-tuned, in float64.
        base: what it was before.
        call: from a network, a differentiable output.
    """
    plain = merged(net, base).requires_grad_(True)
    output, expected = call(net), call(plain)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(expected, call(base)), "the delta of the test has no effect"
    net.zero_grad()
    output.square().sum().backward()
    expected.square().sum().backward()
    adapted = _adapted(net, plain)
    for prefix, module, weight, pair in adapted:
        wanted = torch.autograd.grad(delta(module, weight, *pair), pair, weight.grad)
        for name, parameter, gradient in zip(("B", "A"), pair, wanted, strict=True):
            difference = (parameter.grad - gradient).abs().max()
            assert difference <= 1e-8 * (1 + gradient.abs().max()), f"{prefix}lora_{name}"
    assert adapted
    assert all(p.grad is None for p in nn.Module.parameters(net) if not p.requires_grad)


def bytes_kept(net: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the storages saved for the backward pass, without parameters and the batch."""
    result = net(*inputs)
    result = result if isinstance(result, Tensor) else result[0]
    assert result.requires_grad
    parameters = (*nn.Module.parameters(net), *net.parameters())
    return bytes_kept_by(result.grad_fn, [*parameters, *inputs])


def assert_only_the_weight_is_kept(layer: nn.Linear, x: Tensor) -> None:
    """Of what hooks see saved for the backward pass, nothing else has the size of the weight."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    frozen = layer._parameters["weight"]
    assert frozen is not None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    large = [t for t in kept if t.numel() >= frozen.numel()]
    assert large
    assert all(t.data_ptr() == frozen.data_ptr() for t in large)


def weighted(y: Tensor) -> Tensor:
    """A loss whose gradient differs from place to place and has no simple strides."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return (y * weights).sum() + y.square().sum() / 2


def derivatives(call: Callable[[], Tensor], wanted: list[Tensor]) -> list[Any]:
    """The output, gradients, and gradients of their squares."""
    y = call()
    first = torch.autograd.grad(weighted(y), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)
    return [y, *first, *second]


def per_example_gradients(net: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """A function of the deltas and a batch, with the gradients of each example; and the deltas."""
    own = {name: p for name, p in net.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in net.named_parameters() if not p.requires_grad}

    def loss(deltas: dict[str, Tensor], one: Tensor) -> Tensor:
        return weighted(functional_call(net, (deltas, fixed), (one[None],)))

    return vmap(grad(loss), in_dims=(None, 0)), own


def unet() -> Any:
    """A small UNet of diffusers, with attention."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=16,
        norm_num_groups=2, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
