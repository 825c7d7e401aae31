"""A frozen copy of a fine-tuned network, for what compares a policy with where it started."""

import copy
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from gift.core.network import frozen_names
from gift.core.record import fine_tuned_part, record_of
from gift.core.undo.temporary_state import refuse_meanwhile
from gift.quantization import is_quantised


def reference(net: nn.Module) -> nn.Module:
    """A frozen copy of a fine-tuned network as it is now, which shares the memory of the base.

    It is what preference optimisation calls the reference model: training `net` does not change
    it, also where `net` had been fine-tuned before. Deltas, other trained parameters and buffers
    are copied; frozen parameters use the memory of those of `net`, so it costs little more than
    the deltas. It is in evaluation mode and needs no gradients. Its ``state_dict()`` is whole, so
    that a digest of it tells one base from another; its ``parameters()`` are the copies of those
    of ``net.parameters()``, in their order.

    Moving or casting the copy leaves `net` alone, and gives the copy memory of its own. What is
    written into the frozen values of one can be read from the other.

    Args:
        net: a network that is being fine-tuned, or a bigger module around one.

    Returns:
        The copy.

    Raises:
        RuntimeError: if nothing in `net` is being fine-tuned, or it is merged or disabled for a
            while.

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
    # The values to which disabling returns what is trained in place are written to by nobody.
    shared += [value for _, _, value in record_of(network).undo.values]
    copied = copy.deepcopy(net, {id(tensor): _alias(tensor) for tensor in shared})
    copied.eval()
    for parameter in nn.Module.parameters(copied):
        parameter.requires_grad = False
    record_of(fine_tuned_part(copied)).only_trainable_state = False
    return copied


def _alias(tensor: Any) -> Any:
    """Another tensor over the same memory, of the same kind."""
    if is_lazy(tensor):
        return copy.deepcopy(tensor)
    if is_quantised(tensor):
        return tensor  # of which nothing is ever moved in place
    alias = tensor.detach()
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
