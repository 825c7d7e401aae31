"""Strategies without a method: they train biases, norm layers, or chosen modules."""

from collections.abc import Callable
from typing import Any

from torch import nn

from gift.core.frozen_norms import freeze_statistics
from gift.core.iterator import Site
from gift.factories import Action, ma_train, mc_norm, mc_path, pa_train, pc_bias
from gift.factories.serializable import recorded
from gift.strategies.base import FineTuningStrategy, register_strategy


@register_strategy
class BitFitFineTuningStrategy(FineTuningStrategy):
    """Train only the biases (Zaken et al. 2021, https://arxiv.org/abs/2106.10199).

    Biases are what `pc_bias` matches: the biases of all layers and norms, but not tables of
    relative positions, whatever their name. The paper also trains a new head: merge this with
    `HeadReplacementStrategy`. In a merged strategy, the layers that the other strategy adapts
    belong to it: its option ``train_bias`` trains their biases.

    Raises:
        ValueError: on application, if the network has no bias.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import BitFitFineTuningStrategy
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.LSTM(16, 4))
        >>> report = enable_fine_tuning(net, BitFitFineTuningStrategy())
        >>> list(net.state_dict())
        ['0.bias', '1.bias', '2.bias_ih_l0', '2.bias_hh_l0']
    """

    def __init__(self) -> None:
        super().__init__(para_caps=[(pc_bias(), pa_train())])


@recorded
def ma_train_norm(statistics: bool = True) -> Action:
    """Train the weight and bias of a norm layer; freeze its submodules, such as an activation.

    Args:
        statistics: whether its running statistics are updated. False keeps it in evaluation mode,
            whatever ``train()`` sets.
    """

    def prepare(network: nn.Module) -> Callable[..., None]:
        norms = [m for m in network.modules() if mc_norm()(None, "", "", type(m).__name__, m)]
        if norms and all(not _own(norm) for norm in norms):
            raise ValueError("the norm layers of this network have no weight or bias to train")
        return act

    def act(*place: Any) -> None:
        module = Site(*place).module
        for parameter in nn.Module.parameters(module):
            parameter.requires_grad = False
        for parameter in _own(module):
            parameter.requires_grad = True
        if not statistics:
            freeze_statistics(module)

    return Action(prepare=prepare)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


@register_strategy
class NormFineTuningStrategy(FineTuningStrategy):
    """Train only the weights and biases of norm layers.

    For BatchNorm in convolutional networks see Frankle et al. 2020,
    https://arxiv.org/abs/2003.00152, and for LayerNorm in transformers Zhao et al. 2023,
    https://arxiv.org/abs/2312.11420. Norm layers are what `mc_norm` matches.

    Args:
        statistics: whether running statistics are updated, as in ordinary training. They are saved
            with the delta. False keeps norm layers in evaluation mode.

    Raises:
        ValueError: on application, if the network has no norm layers, or only some without
            parameters.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import NormFineTuningStrategy
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> enable_fine_tuning(net, NormFineTuningStrategy()).trainable_after
        16
    """

    def __init__(self, statistics: bool = True) -> None:
        super().__init__([(mc_norm(), ma_train_norm(statistics=statistics))])


@register_strategy
class ModulesFineTuningStrategy(FineTuningStrategy):
    """Train chosen modules completely, and freeze the rest.

    Args:
        paths: dotted paths from the network, or shell patterns for them: ``fc``, ``layer4.*``. Each
            makes its own cap: one that claims nothing is reported, with a warning.

    Raises:
        ValueError: if no path is given; on application, if none of them claims anything.
        TypeError: if a path is not a string.

    Example:
        >>> from torchvision.models import resnet18
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import ModulesFineTuningStrategy
        >>> net = resnet18(num_classes=10)
        >>> report = enable_fine_tuning(net, ModulesFineTuningStrategy("fc", "layer4.*.bn2"))
        >>> list(dict.fromkeys(claim.name for claim in report.claims))
        ['layer4.0.bn2', 'layer4.1.bn2', 'fc']
    """

    def __init__(self, *paths: str) -> None:
        if not paths:
            raise ValueError("no path is given: name the modules to train, such as 'fc'")
        super().__init__([(mc_path(glob=path), ma_train()) for path in paths])
