"""Refuse fused layers that are made from adapted weights and added to the same network.

Fusing (``fuse_qkv_projections``, ``reparameterize``, ``switch_to_deploy``) copies weights into a
new layer that replaces others. A copy of adapted weights contains the deltas as they are now. The
deltas would no longer be trained, the new layer would be trained as a whole, and a saved file would
not fit any other copy of the network. So the new layer is refused when it is registered, before
anything has changed.

The values of the new layer do not identify it, as they are often written later. What identifies it
is the function that registers it: one that copied adapted weights, itself or through a function
that it called, since the last call of a network.
"""

import itertools
import threading
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from gift.core.frozen_base import HELD, is_held
from gift.core.weights.calls import calls_so_far
from gift.private.torch.calls import callers

_REGISTERING = {"__setattr__", "register_module", "add_module", "register_parameter"}


class _Copied(threading.local):
    """The last copy of an adapted weight in each thread.

    Attributes:
        weight: the name of the weight, as in errors.
        frames: the code of the functions that were running, by the id of their frames. The frames
            themselves are not stored.
        calls: how many calls of networks there had been.
    """

    weight = ""
    frames: dict[int, CodeType] = {}
    calls: int | None = None


_COPIED = _Copied()
_hooks: list[Any] = []


def note_copy(weight: str, of: Tensor, result: object) -> None:
    """Record which functions compute something from an adapted weight outside of a network's call.

    Args:
        weight: the name of the weight.
        of: the weight, or a view of it.
        result: what was computed: a tensor, several tensors (a decomposition) or a NumPy array.
    """
    if (calls := calls_so_far()) is None or torch.compiler.is_compiling():
        return
    if _is_copy(of, result):
        _COPIED.frames = {id(frame): frame.f_code for frame in callers()}
        _COPIED.weight, _COPIED.calls = weight, calls
        if not _hooks:
            _hooks.append(register_module_module_registration_hook(_module_joins))
            _hooks.append(register_module_parameter_registration_hook(_parameter_joins))


def _is_copy(of: Tensor, result: object) -> bool:
    """Whether a weight could be made from `result`; not from norms or a mask of the weight."""
    if isinstance(result, list | tuple):
        return any(_is_copy(of, one) for one in result)
    if isinstance(result, Tensor) and not (result.is_floating_point() or result.is_complex()):
        return False
    return getattr(result, "ndim", -1) >= of.ndim


def _module_joins(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    # First of all: the compiler traces this function while it wraps a module that is half made.
    if torch.compiler.is_compiling() or module is None or not _is_copying(parent):
        return
    new = (part for part in module.modules() if not is_held(part))
    if any(parameter is not None for part in new for parameter in part._parameters.values()):
        raise _joined(parent, name, f"a {type(module).__name__}")


def _parameter_joins(parent: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if torch.compiler.is_compiling() or parameter is None or name in parent._parameters:
        return
    if _is_copying(parent):
        raise _joined(parent, name, "a parameter")


def _is_copying(parent: nn.Module) -> bool:
    """Whether code that has copied adapted weights adds something to a fine-tuned module."""
    if _COPIED.calls is None or _COPIED.calls != calls_so_far() or not is_held(parent):
        return False
    for frame in itertools.islice(callers(), 1, None):  # skip the hook in this file
        library = frame.f_globals.get("__name__", "").partition(".")[0]
        if library != "torch" and frame.f_code.co_name not in _REGISTERING:
            return _COPIED.frames.get(id(frame)) is frame.f_code
    return False


def _joined(parent: nn.Module, name: str, what: str) -> RuntimeError:
    if name in parent.__dict__[HELD].empty:  # torch deletes it before it calls the hook
        parent.__dict__.setdefault(name, None)
    return RuntimeError(
        f"{what} is about to join a {type(parent).__name__} as {name!r}, but "
        f"{_COPIED.weight} is adapted and was just copied: a fused layer would hold the deltas as "
        "they are now, and they would no longer be trained. Call gift.merge(network) first and "
        "fuse the plain layers, or fuse temporarily within gift.merged(network). If nothing is "
        "fused, register it before enable_fine_tuning"
    )
