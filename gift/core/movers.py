"""Support for code that moves the tensors of a module by name, such as accelerate's hooks.

Such code reads a tensor from its module and replaces it by another one: on another device, on the
meta device while the module does not run, or spread over processes. For an adapted weight it must
see the frozen tensor.
The state from which it copies tensors back must contain all tensors. It treats deltas like any
other tensor, so they are on the device on which the module computes.
"""

from types import FrameType

from torch import nn

from gift.core.delta import named_deltas
from gift.core.forwards import named_forward_deltas
from gift.core.weights.record import weight_deltas
from gift.core.weights.sharing import in_several_modules
from gift.private.torch.calls import callers

_PACKAGE = "accelerate."
_MOVERS = (_PACKAGE, "torch.distributed.fsdp.", "torch.distributed.tensor.")
_STATES = "accelerate.big_modeling"


def moves(reader: FrameType | None) -> bool:
    """Whether a function is called by code that moves tensors.

    Args:
        reader: the frame of the function.
    """
    caller = None if reader is None else reader.f_back
    return caller is not None and caller.f_globals.get("__name__", "").startswith(_MOVERS)


def needs_all(network: nn.Module) -> bool:
    """Whether the ``state_dict`` being made must contain everything that `network` computes with.

    The call may be on a bigger module, whose ``state_dict`` calls that of the network.

    Raises:
        RuntimeError: if tensors cannot be fetched module by module, or have no values yet.
    """
    names = (frame.f_globals.get("__name__") or "" for frame in callers())
    asking = next((name for name in names if not name.startswith(("gift.", "torch."))), "")
    if not asking.startswith(_PACKAGE):
        return False
    if empty := [m for m, _, delta in named_deltas(network) if delta.is_on_meta(m)]:
        raise RuntimeError(
            f"the deltas of {len(empty)} modules are on the meta device, and no checkpoint of the "
            "base has values for them: load it before enable_fine_tuning"
        )
    if asking != _STATES:
        return False
    if stuck := _stuck(network):
        raise RuntimeError(
            f"{stuck}, which cannot be fetched with each module: call gift.merge(network) before "
            "offloading, or offload the network without them"
        )
    return True


def _stuck(network: nn.Module) -> str:
    """What uses tensors outside of a module's own ``forward``, in words; empty if nothing does."""
    tied = [
        path
        for path, module in network.named_modules()
        if any(a.owner not in (None, module) for a in weight_deltas(module).values())
    ]
    if tied:
        return f"{tied} have the delta of a tied tensor"
    if in_several_modules(network):
        return "modules share parameters of their deltas"
    wrapped = [path for path, _, wrapper in named_forward_deltas(network) if wrapper.names]
    return f"{wrapped} are wrapped by deltas" if wrapped else ""


def offloaded(network: nn.Module) -> str:
    """Describe the modules whose own tensors are offloaded; empty if there are none."""
    found = [path for path, module in network.named_modules() if _is_offloaded(module)]
    if not found:
        return ""
    first = found[0] or "the network"
    return f"{len(found)} modules are offloaded by accelerate, the first is {first!r}"


def _is_offloaded(module: nn.Module) -> bool:
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", None) or [hook]  # a `SequentialHook` has several
    return any(getattr(one, "offload", False) is True for one in hooks)


def refuse_offloaded(network: nn.Module) -> None:
    """Refuse an offloaded network, for operations that need its tensors.

    Raises:
        RuntimeError: if tensors are offloaded.
    """
    if found := offloaded(network):
        raise RuntimeError(
            f"the tensors of {found}: call "
            "accelerate.hooks.remove_hook_from_submodules(network) before this"
        )
