"""A frozen copy of a fine-tuned network, as a reference model for preference optimisation."""

import copy
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from gift.core.record import fine_tuned_part, record_of
from gift.core.trained import frozen_names
from gift.core.undo.temporary_state import refuse_meanwhile
from gift.quantization import is_quantised


def reference(net: nn.Module) -> nn.Module:
    """Create a frozen copy of a fine-tuned network that shares the memory of the base.

    Preference optimisation calls such a copy the reference model: training `net` does not change
    it, even if `net` was fine-tuned before. Deltas, other trained parameters and buffers are
    copied. Frozen parameters use the memory of those of `net`, so the copy costs little more than
    the deltas. It is in evaluation mode and needs no gradients. Its ``state_dict()`` contains all
    parameters, so a digest of it distinguishes one base from another. Its ``parameters()`` are the
    copies of ``net.parameters()``, in the same order.

    Moving or casting the copy does not affect `net`, and gives the copy its own memory. A write
    into the frozen values of one is visible in the other.

    Args:
        net: a network that is being fine-tuned, or a bigger module around one.

    Returns:
        The copy.

    Raises:
        RuntimeError: if nothing in `net` is being fine-tuned, or it is temporarily merged or
            disabled.

    Example:
        >>> import gift, torch
        >>> from torch import nn
        >>> net, x = nn.Linear(64, 10), torch.randn(2, 64)
        >>> report = gift.enable_fine_tuning(net, gift.strategies.LoRAAllFineTuningStrategy())
        >>> before, expected = gift.reference(net), net(x)
        >>> _ = nn.init.normal_(net.lora_B)  # in the place of training
        >>> torch.equal(before(x), expected), torch.equal(net(x), expected)
        (True, False)
    """
    network = fine_tuned_part(net)
    refuse_meanwhile(net)
    frozen, names = set(frozen_names(network)), network.named_parameters(remove_duplicate=False)
    shared: list[Any] = [parameter for name, parameter in names if name in frozen]
    # Share also the saved values to which disabling restores trained base parameters: nothing
    # writes to them.
    shared += [value for _, _, value in record_of(network).undo.values]
    copied = copy.deepcopy(net, {id(tensor): _alias(tensor) for tensor in shared})
    copied.eval()
    for parameter in nn.Module.parameters(copied):
        parameter.requires_grad = False
    record_of(fine_tuned_part(copied)).only_trainable_state = False
    return copied


def _alias(tensor: Any) -> Any:
    """A tensor of the same kind over the same memory."""
    if is_lazy(tensor):
        return copy.deepcopy(tensor)
    if is_quantised(tensor):
        return tensor  # never moved or written in place
    alias = tensor.detach()
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
