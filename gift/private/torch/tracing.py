"""What traces, transforms or intercepts the code that is running: functorch, modes, compilers."""

import contextlib
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gift.private.torch.parts import part

PARTS = (
    "torch._C._are_functorch_transforms_active",
    "torch.autograd.forward_ad._current_level",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._len_torch_function_stack",
    "torch._C.DisableTorchFunction",
    "torch.fx.experimental.symbolic_shapes.statically_known_true",
)

_functorch_is_active = part("torch._C._are_functorch_transforms_active")
_is_legacy_batched = part("torch._C._functorch.is_legacy_batchedtensor")
_dispatch_modes = part("torch._C._len_torch_dispatch_stack")
_function_modes = part("torch._C._len_torch_function_stack")
_exporting = getattr(torch.compiler, "is_exporting", None)
_old_compiler = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9)


def is_transformed() -> bool:
    """Whether a transform of torch.func, dual numbers or a trace of TorchScript is active.

    torch itself checks this before it applies an autograd function, but no public name tells it
    without a tensor. If it is unknown, the answer is True, and the caller then leaves everything to
    autograd.
    """
    if _functorch_is_active is None:
        return True
    # Dual numbers can be made without a transform around them.
    level = getattr(torch.autograd.forward_ad, "_current_level", 0)
    return _functorch_is_active() or torch.jit.is_tracing() or level >= 0


def is_compiled_by_old() -> bool:
    """Whether an old compiler is tracing, with two known defects.

    It does not follow autograd functions with dynamic sizes, and reads a property of a module
    instead of the entry of that name in its ``__dict__``. torch 2.6 fails at both and 2.14 at
    neither; no version in between was tried.
    """
    return _old_compiler and torch.compiler.is_compiling()


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient is a batch of gradients (``is_grads_batched``); few operations allow it.

    The public attributes of such a tensor are those of one gradient. If it is unknown, the answer
    is True: what works for a batched gradient works for any other.
    """
    if torch.compiler.is_compiling():
        return False
    return _is_legacy_batched is None or bool(_is_legacy_batched(gradient))


def is_followed() -> bool:
    """Whether a mode of torch intercepts functions or operations; it knows torch's own ones only.

    Modes are public, their number is not. If it is unknown, the answer is True.
    """
    if _dispatch_modes is None or _function_modes is None:
        return True
    return bool(_dispatch_modes() or _function_modes())


def is_exporting() -> bool:
    """Whether a network is being exported, so the graph must serve all sizes.

    This is public since torch 2.7. Before that, everything that is compiled counts as exported.
    """
    return torch.compiler.is_compiling() if _exporting is None else _exporting()


def is_known(condition: Any) -> bool:
    """Whether a condition holds; while compiling, whether it holds for all sizes of the graph.

    A plain ``bool`` of a dynamic size would fix that size. If there is no other way to evaluate it,
    the condition counts as unknown, which is False.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and type(condition) is bool:
        return condition
    if compiling and _old_compiler:  # torch 2.6 cannot evaluate them at all
        return False
    try:
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second
    except ImportError:
        return False
    return statically_known_true(condition)


def unfollowed() -> AbstractContextManager[Any]:
    """A context in which no mode intercepts functions, neither gift's nor another one.

    A mode is only disabled in its own code. Without this context, the work inside is intercepted
    too, which takes longer.
    """
    disable = part("torch._C.DisableTorchFunction")
    return contextlib.nullcontext() if disable is None else disable()


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which compiled functions run as they are written.

    The public function imports the compiler, which takes seconds. Before anything was compiled, the
    compiler is not imported, which its private name shows.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
