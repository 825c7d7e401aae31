"""What gift knows of a network that is being fine-tuned, and where it is found."""

from collections.abc import Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from gift.core.dynamic_class import spec_of
from gift.core.movers import refuse_offloaded
from gift.core.report import Report
from gift.core.undo.temporary_state import refuse_meanwhile

if TYPE_CHECKING:  # both are made for a network that has a record
    from gift.core.frozen_base import HeldFlags
    from gift.core.undo.snapshot import Snapshot, Undo


@dataclass
class NetworkRecord:
    """What fine-tuning keeps on the network.

    Args:
        chosen: names of the parameters that the strategy left trainable. They stay chosen while
            somebody freezes them for a while.
        report: what the strategy did.
        undo: the way back.
        late: those among them that were chosen later, see `gift.core.unfreeze`.
        waiting: those that stay frozen until they are due, whatever ``requires_grad_`` says.
        held: what keeps frozen parameters frozen, module by module.
        told_unfrozen: whether somebody was warned that flags of them were set.
        keeps_base: whether the way back has the values of what is trained in place.
        only_trainable_parameters: whether ``parameters()`` gives trained parameters only.
        only_trainable_state: whether ``state_dict()`` gives these and buffers only.
        recipe: the strategy as plain data, None where a file cannot name it.
        loading: of the state that is being loaded, the prefix and the keys.
        rehearsing: whether that is only tried.
        refusing: whether nothing of it is loaded.
        strict: whether missing keys are errors, as far as that is known: torch does not tell parts
            of a bigger module.
        before: what the network was before a bigger module began to load it, torch's list of
            errors, and how many there were.
    """

    chosen: set[str]
    report: Report
    undo: "Undo"
    late: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    held: "list[HeldFlags]" = field(default_factory=list)
    told_unfrozen: bool = False
    keeps_base: bool = True
    only_trainable_parameters: bool = True
    only_trainable_state: bool = True
    recipe: dict[str, Any] | None = None
    loading: tuple[str, Set[str]] = ("", frozenset())
    rehearsing: bool = False
    refusing: bool = False
    strict: bool = True
    before: "tuple[Snapshot, list[str], int] | None" = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"before": None}


def record_of(network: Any) -> NetworkRecord:
    """The record of a network that is being fine-tuned."""
    return network._gift_network


def fine_tuned_part(net: nn.Module) -> Any:
    """The network in `net`, or itself, that is being fine-tuned.

    Raises:
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
