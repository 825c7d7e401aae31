"""The record of a network that is being fine-tuned, and how to get it."""

from collections.abc import Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from gift.core.dynamic_class import spec_of
from gift.core.movers import refuse_offloaded
from gift.core.report import Report
from gift.core.undo.temporary_state import refuse_meanwhile

if TYPE_CHECKING:  # circular: both import this file
    from gift.core.frozen_base import HeldFlags
    from gift.core.undo.snapshot import Snapshot
    from gift.core.undo.undo import Undo


@dataclass
class NetworkRecord:
    """What fine-tuning stores on a network.

    Args:
        chosen: names of the parameters that the strategy left trainable. They stay chosen while
            they are frozen temporarily.
        report: what the strategy did.
        undo: how to restore the base.
        late: the chosen names that were added later, see `gift.core.unfreeze`.
        waiting: the chosen names that stay frozen until they are due, whatever ``requires_grad_``
            says.
        held: what keeps frozen parameters frozen, one entry per module.
        warned_unfrozen: whether the warning about flags set by others has been issued.
        shares: whether layers share parameters of deltas, see `gift.core.weights.sharing`.
        keeps_base: whether `undo` has the values of what is trained in place.
        only_trainable_parameters: whether ``parameters()`` gives trained parameters only.
        only_trainable_state: whether ``state_dict()`` gives trained parameters and buffers only.
        recipe: the strategy as plain data, None if a file cannot name it.
        below: the record of the strategy on top of which this one was enabled.
        loading: prefix and keys of the state that is being loaded.
        rehearsing: whether that load is only a rehearsal.
        refusing: whether nothing of that state is loaded.
        strict: whether missing keys are errors, as far as that is known: torch does not pass
            ``strict`` to parts of a bigger module.
        before: a snapshot from before a bigger module began to load the network, torch's list of
            errors, and its length at that time.
    """

    chosen: set[str]
    report: Report
    undo: "Undo"
    late: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    held: "list[HeldFlags]" = field(default_factory=list)
    warned_unfrozen: bool = False
    shares: bool = False
    keeps_base: bool = True
    only_trainable_parameters: bool = True
    only_trainable_state: bool = True
    recipe: dict[str, Any] | None = None
    below: "NetworkRecord | None" = None
    loading: tuple[str, Set[str]] = ("", frozenset())
    rehearsing: bool = False
    refusing: bool = False
    strict: bool = True
    before: "tuple[Snapshot, list[str], int] | None" = None

    @property
    def lowest(self) -> "NetworkRecord":
        """The record of the strategy that was enabled on the plain base."""
        return self if self.below is None else self.below.lowest

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"before": None}


def record_of(network: Any) -> NetworkRecord:
    """The record of a network that is being fine-tuned."""
    record: NetworkRecord = network._gift_network
    return record


def fine_tuned_part(net: nn.Module) -> Any:
    """The network that is being fine-tuned: `net` itself or a module inside.

    Raises:
        TypeError: if `net` is not a module.
        RuntimeError: if there is none, or several.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(net).__name__}")
    found = {path: part for path, part in net.named_modules() if spec_of(part).network}
    if len(found) != 1:
        refuse_meanwhile(net)
        what = f"several parts are: {sorted(found)}" if found else "it is not"
        raise RuntimeError(
            f"expected a {type(net).__name__} that is being fine-tuned, {what}: call "
            "enable_fine_tuning first, and give one network at a time"
        )
    (part,) = found.values()
    refuse_offloaded(part)
    return part
