"""Ways to train a network, from the least that there is to do to everything."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import adaptable_pattern, peft_adapts
from _networks import Case
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_layer
from gift.kernels.onednn import matmul
from gift.layers.table import family_of


def bound(network: nn.Module, rank: int) -> nn.Module:
    """Nothing is trained but one vector of the first layers: a bias where there are any.

    Its gradient needs that of nearly all activations, and no gradient of a weight.
    """
    network.requires_grad_(False)
    vectors = [(name, p) for name, p in network.named_parameters() if p.dim() == 1]
    biases = [p for name, p in vectors if name.endswith("bias")]
    (biases or [p for _, p in vectors])[0].requires_grad_(True)
    return network


class _FrozenLinear(torch.autograd.Function):
    """A frozen linear layer whose backward pass multiplies by the library that gift takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.of_bias = bias is not None and bias.requires_grad
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1]).contiguous()
        gx = matmul(flat, weight).view(*g.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return gx, None, flat.sum(0) if ctx.of_bias else None


def bound_alike(network: nn.Module, rank: int) -> nn.Module:
    """The bound, with the products of linear layers by the library that gift takes.

    On some processors that is quicker than torch's own choice, so that gift falls below the bound.
    """
    for module in bound(network, rank).modules():
        if type(module) is nn.Linear:
            module.forward = lambda x, own=module: _FrozenLinear.apply(x, own.weight, own.bias)
    return network


def full(network: nn.Module, rank: int) -> nn.Module:
    """Everything is trained."""
    return network


def gift_of(layout: str, as_peft: bool = True) -> Callable[[nn.Module, int], nn.Module]:
    """LoRA on every convolution and linear layer, with a layout of the convolutions' weights.

    Args:
        layout: of the weights of convolutions.
        as_peft: leave out the layers for which PEFT has no LoRA.
    """
    layers = mc_layer("conv", "linear")

    def check(parent: Any, name: str, path: str, kind: str, module: nn.Module) -> bool:
        wanted = peft_adapts(module) or not as_peft
        return wanted and layers(parent, name, path, kind, module)

    def adapt(network: nn.Module, rank: int) -> nn.Module:
        action = ma_adapt("lora", rank=rank, clip_rank=True, conv_layout=layout)
        strategy = FineTuningStrategy(module_caps=[(check, action)])
        enable_fine_tuning(network, strategy)
        return network

    return adapt


def peft(network: nn.Module, rank: int) -> nn.Module:
    """The same by PEFT, which has the layout ``out_as_h``."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=adaptable_pattern(network))
    return get_peft_model(network, config)


CONTENDERS = {
    "bound": bound,
    "bound, alike": bound_alike,
    "full": full,
    "gift": gift_of("out_as_h"),
    "gift, balanced": gift_of("balanced"),
    "gift, every layer": gift_of("out_as_h", as_peft=False),
    "peft": peft,
}
DELTAS = ("gift", "gift, balanced", "gift, every layer", "peft")


def taking_part(case: Case) -> list[str]:
    """The names of all contenders that differ; the layout matters for convolutions alone."""
    left_out = {"bound, alike" if case.images else "gift, balanced"}
    if all(peft_adapts(m) or not every_layer(m) for m in case.network().modules()):
        left_out.add("gift, every layer")
    return [name for name in CONTENDERS if name not in left_out]


def every_layer(module: nn.Module) -> bool:
    """Whether it is a linear layer or any convolution."""
    return family_of(module) in ("conv", "linear")


def adapted(name: str, case: Case, rank: int) -> nn.Module:
    """The case's network as that contender trains it."""
    network = case.laid_out(CONTENDERS[name](case.network(), rank))
    if name in DELTAS:
        as_after_a_step(network)
    return network


def as_after_a_step(network: nn.Module) -> None:
    """Give all that is trained values, as zeros may be quicker."""
    torch.manual_seed(2)
    for _, parameter in network.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)


def trained(network: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def networks(case: Case, rank: int, names: list[str]) -> dict[str, nn.Module]:
    """Those of some contenders; gift and PEFT must train as much as each other."""
    made = {name: adapted(name, case, rank) for name in names}
    sizes = {name: trained(made[name]) for name in ("gift", "peft") if name in made}
    if len(set(sizes.values())) > 1:
        raise RuntimeError(f"gift and PEFT do not train the same layers: {sizes}")
    return made
