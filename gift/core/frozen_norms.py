"""Norm layers whose running statistics stay frozen, whatever ``train()`` says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gift.core.dynamic_class import Generated, Spec, change_class
from gift.private.torch.layers import NORM_WITH_STATISTICS


class FrozenStatistics(Generated):
    """Mixin of a norm layer that stays in evaluation mode, which freezes its running statistics."""

    def train(self, mode: bool = True) -> Any:
        """Remember the requested mode, which `release_statistics` restores."""
        self.__dict__["_gift_mode"] = mode
        return super().train(False)


def feature(plain: type[nn.Module], spec: Spec) -> tuple[list[type], dict[str, Any]]:
    """Keep norm layers in evaluation mode."""
    return ([FrozenStatistics] if spec.statistics else []), {}


def freeze_statistics(module: nn.Module) -> int:
    """Freeze the running statistics of all norm layers in `module`, and return their number."""
    norms = [m for m in module.modules() if isinstance(m, NORM_WITH_STATISTICS)]
    layers = [norm for norm in norms if norm.track_running_stats]
    for layer in layers:
        mode = layer.training
        change_class(layer, statistics=True)
        layer.train(mode)
    return len(layers)


def release_statistics(module: nn.Module) -> None:
    """Undo `freeze_statistics` for one layer and set the mode that was last requested."""
    if "_gift_mode" in module.__dict__:
        module.training = module.__dict__.pop("_gift_mode")
        change_class(module, statistics=False)


@contextmanager
def kept_modes(net: nn.Module) -> Iterator[None]:
    """Context that restores the training mode of each module at its end."""
    modes = [(m, m.training, vars(m).get("_gift_mode")) for m in net.modules()]
    try:
        yield
    finally:
        for module, training, mode in modes:
            if module.training != training:
                module.training = training
            if mode is not None:
                vars(module)["_gift_mode"] = mode
