"""The strategy of jobs that choose none."""

from gift.factories import ma_adapt, ma_train, mc_grouped, mc_layer, mc_top
from gift.strategies.base import FineTuningStrategy, register_strategy


@register_strategy
class RecommendedFineTuningStrategy(FineTuningStrategy):
    """LoRA on linear layers and convolutions; the head and the pooler below it are trained.

    Convolutions with groups are frozen, since a delta would often be larger than their weights.

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
        layers = mc_layer("linear", "conv") & ~mc_grouped()
        adapt = ma_adapt("lora", rank=rank, clip_rank=True)
        super().__init__([(mc_top(), ma_train()), (layers, adapt)])
