"""The weights of a network with AdaLoRA, seen as triplets."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gift.core.dynamic_class import joined
from gift.core.record import fine_tuned_part
from gift.core.weights.record import WeightDelta, weight_deltas
from gift.methods import AdaLoRA

FACTORS = ("adalora_P", "adalora_lambda", "adalora_Q")


def orthogonality(net: nn.Module) -> Tensor:
    r"""Return how far the factors of AdaLoRA are from orthogonal.

    .. math:: \frac{1}{2 n} \sum_{i=1}^{n} \|P_i^H P_i - I\|_F + \|Q_i Q_i^H - I\|_F

    The sum is over the `n` matrices with AdaLoRA. The paper sums squares of these norms; this is
    what its authors' code and PEFT add to the loss, with a factor of 0.1 to 0.5.

    Args:
        net: a network with AdaLoRA, or a module that contains one.

    Raises:
        ValueError: if no weight has AdaLoRA.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.schedules import orthogonality
        >>> from gift.strategies import AdaLoRAAllFineTuningStrategy
        >>> net = nn.Linear(16, 16)
        >>> _ = enable_fine_tuning(net, AdaLoRAAllFineTuningStrategy(rank=4))
        >>> bool(abs(orthogonality(net) - 2) < 0.1)  # of small random factors: the norm of I
        True
    """
    distances = [
        distance for _, delta in triplets(fine_tuned_part(net)) for distance in delta.distances()
    ]
    if not distances:
        raise ValueError("the network has no weight with AdaLoRA")
    return torch.cat(distances).mean()


class Triplets(NamedTuple):
    """A weight with AdaLoRA."""

    module: nn.Module
    tensor: str
    delta: WeightDelta

    @property
    def is_there(self) -> bool:
        """Whether the weight still has this delta."""
        return weight_deltas(self.module).get(self.tensor) is self.delta

    @property
    def tensors(self) -> list[Any]:
        """`P`, `lambda` and `Q`."""
        own = self.delta.tensors(self.module)
        return [own[key] for key in FACTORS]

    @property
    def factors(self) -> list[Any]:
        """`P` and `Q`."""
        left, _, right = self.tensors
        return [left, right]

    @property
    def matrices(self) -> int:
        """The number of matrices of the weight: one, or one for each group."""
        *groups, rank = self.tensors[1].shape
        return self.tensors[1].numel() // rank if groups else 1

    @property
    def rank(self) -> int:
        """The number of triplets with an effect."""
        own = self.delta.tensors(self.module)
        return int(torch.count_nonzero(own["adalora_lambda"] * own["adalora_mask"]))

    def distances(self) -> Iterator[Tensor]:
        """Yield the distances of `P` and `Q` from orthogonal factors, one for each matrix."""
        left, right = self.factors
        dtype = torch.promote_types(left.dtype, torch.float32)
        with torch.autocast(left.device.type, enabled=False):
            for factor in (left.to(dtype), right.mH.to(dtype)):
                gram = factor.mH @ factor
                one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
                yield torch.linalg.matrix_norm(gram - one).flatten()

    def pruned(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Return `lambda` and mask of the triplets to keep."""
        own = self.delta.tensors(self.module)
        here = keep.to(own["adalora_mask"].device)
        mask = here.to(own["adalora_mask"].dtype)
        return own["adalora_lambda"].detach().masked_fill(~here, 0), mask

    def put(self, pruned: tuple[Tensor, Tensor], final: bool) -> None:
        """Write `lambda`, and in the end the mask."""
        own = self.delta.tensors(self.module)
        with torch.no_grad():
            own["adalora_lambda"].copy_(pruned[0])
            if final:
                own["adalora_mask"].copy_(pruned[1])


def triplets(network: nn.Module) -> Iterator[tuple[str, Triplets]]:
    """Yield all weights with AdaLoRA, by their names; a tied one once."""
    for path, module in network.named_modules():
        for tensor, delta in weight_deltas(module).items():
            if isinstance(delta.method, AdaLoRA) and delta.owner is None and delta.layout:
                yield joined(path, tensor), Triplets(module, tensor, delta)
