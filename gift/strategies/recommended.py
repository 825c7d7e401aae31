"""The strategy that is taken where none is chosen."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from gift.core.iterator import Site
from gift.factories import Check, ma_adapt, ma_train, mc_layer
from gift.factories.checks import last_linear
from gift.factories.serializable import recorded
from gift.strategies.base import FineTuningStrategy, register_strategy


@recorded
def mc_top() -> Check:
    """Match what stands above the body of a network: its head, and the pooler below it.

    For networks of transformers these are the layers outside of the base model, and its pooler;
    language models have none, since their head belongs to the vocabulary. For other networks it is
    the last linear layer. Layers that hold parameters are matched one by one.
    """

    def prepare(network: nn.Module) -> Callable[..., bool]:
        found = {id(module) for module in _top(network) if _holds_parameters(module)}
        return lambda *place: id(Site(*place).module) in found

    check = Check(prepare=prepare)
    check.optional = True
    return check


@recorded
def mc_depthwise() -> Check:
    """Match convolutions with a group for each channel, which are smaller than their delta."""

    def test(*place: Any) -> bool:
        module = Site(*place).module
        return getattr(module, "groups", 1) > 1 and hasattr(module, "kernel_size")

    return Check(test)


@register_strategy
class RecommendedFineTuningStrategy(FineTuningStrategy):
    """LoRA on linear layers and convolutions; the head and the pooler below it are trained.

    A pooler is made for the task of pre-training, or has random values where the weights lack one.
    A small delta cannot change it enough, so it is trained whole, as the head is.

    Args:
        rank: rank of the deltas, clipped where a layer is smaller.

    Raises:
        ValueError: if `rank` is below 1.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import RecommendedFineTuningStrategy
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> report = enable_fine_tuning(net, RecommendedFineTuningStrategy(rank=2))
        >>> sorted(net.state_dict())
        ['0.lora_A', '0.lora_B', '2.bias', '2.weight']
    """

    def __init__(self, rank: int = 8) -> None:
        layers = mc_layer("linear", "conv") & ~mc_depthwise()
        adapt = ma_adapt("lora", rank=rank, clip_rank=True)
        super().__init__([(mc_top(), ma_train()), (layers, adapt)])


def _top(network: nn.Module) -> Iterator[nn.Module]:
    body = getattr(network, str(getattr(network, "base_model_prefix", "") or "-"), None)
    if not isinstance(body, nn.Module) or body is network:
        yield from [layer for layer in [last_linear(network)[1]] if layer is not None]
        return
    outputs = getattr(network, "get_output_embeddings", None)
    if callable(outputs) and outputs() is not None:
        return
    inside = {id(module) for module in body.modules()}
    yield from (module for module in network.modules() if id(module) not in inside)
    for module in body.modules():
        if type(module).__name__.endswith("Pooler"):
            yield from module.modules()


def _holds_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())
