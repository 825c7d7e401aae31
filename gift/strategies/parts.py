"""Strategies without a method: biases, norm layers, or chosen modules are trained as they are."""

from collections.abc import Callable
from typing import Any

from torch import nn

from gift.core.frozen_norms import freeze_statistics
from gift.factories import Action, ma_train, mc_norm, mc_path, pa_train, pc_bias
from gift.factories.serializable import recorded
from gift.strategies.base import FineTuningStrategy, register_strategy


@register_strategy
class BitFitFineTuningStrategy(FineTuningStrategy):
    """Train the biases alone (Zaken et al. 2021, https://arxiv.org/abs/2106.10199).

    Those are what `pc_bias` finds: biases of all layers and norms, but no table of relative
    positions, whatever it is called. The paper trains a new head along with them: merge this with
    `HeadReplacementStrategy`. In a merged strategy, layers that the other one adapts are its own:
    their biases are trained by its option ``train_bias``.

    Raises:
        ValueError: when it is applied to a network that has no bias.

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
    """Train the weight and bias of a norm layer; freeze what it has inside, an activation perhaps.

    Args:
        statistics: let its running statistics move. False keeps it in evaluation mode, whatever
            ``train()`` says.
    """

    def prepare(network: nn.Module) -> Callable[..., None]:
        norms = [m for m in network.modules() if mc_norm()(None, "", "", type(m).__name__, m)]
        if norms and all(not _own(norm) for norm in norms):
            raise ValueError("the norm layers of this network have no weight or bias to train")
        return act

    def act(*place: Any) -> None:
        for parameter in nn.Module.parameters(place[4]):
            parameter.requires_grad = False
        for parameter in _own(place[4]):
            parameter.requires_grad = True
        if not statistics:
            freeze_statistics(place[4])

    return Action(prepare=prepare)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


@register_strategy
class NormFineTuningStrategy(FineTuningStrategy):
    """Train the weights and biases of norm layers alone.

    Of BatchNorm in convolutional networks: Frankle et al. 2020, https://arxiv.org/abs/2003.00152;
    of LayerNorm in transformers: Zhao et al. 2023, https://arxiv.org/abs/2312.11420. Norm layers
    are what `mc_norm` finds.

    Args:
        statistics: let running statistics move, as they do in plain training; they are saved with
            the delta. False keeps norm layers in evaluation mode.

    Raises:
        ValueError: when it is applied to a network without norm layers, or to one whose norm layers
            have no parameters.

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
    """Train chosen modules whole, and freeze the rest.

    Args:
        paths: dotted paths from the network, or shell patterns for them: ``fc``, ``layer4.*``.
            Each is a cap of its own: one that takes nothing is reported and warned about.

    Raises:
        ValueError: if no path is given; when it is applied, if none of them takes anything.
        TypeError: if a path is no text.

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
