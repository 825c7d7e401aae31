"""Private parts of torch: what each tells, why no public name does, and the fallback.

See `gift.private` for the rules. A part is looked up by its dotted path on each use. It is looked
up once, at import, if a compiler traces the use or if each training step would pay for it.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = (
    "torch._C._are_functorch_transforms_active",
    "torch.autograd.forward_ad._current_level",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._len_torch_function_stack",
    "torch._C.DisableTorchFunction",
    "torch._C.DisableTorchFunctionSubclass",
    "torch._C._disabled_torch_function_impl",
    "torch.fx.experimental.symbolic_shapes.statically_known_true",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_leaves",
    "torch.nn.modules.conv._ConvNd",
    "torch.nn.modules.conv._ConvTransposeNd",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.Conv2d._conv_forward",
    "torch.nn.LSTM._init_flat_weights",
    "torch.Tensor._version",
    "torch.UntypedStorage._cdata",
    "torch.nn.Module._call_impl",
)
"""Dotted paths of the parts that every version of torch has. Others are attributes of instances, or
exist in some builds only; the tests of the functions below check these."""


def part(path: str) -> Any:
    """The object at the dotted path of a part, or None if it is gone."""
    root, *names = path.split(".")
    found: Any = sys.modules.get(root)
    for i, name in enumerate(names):
        inner = getattr(found, name, None)
        if inner is None:
            module = ".".join((root, *names[: i + 1]))
            with contextlib.suppress(ImportError):
                inner = __import__(module, fromlist=["_"])
        if inner is None:
            return None
        found = inner
    return found


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


OVERRIDES_NOTHING: Any = part("torch._C._disabled_torch_function_impl")
"""The ``__torch_function__`` of a tensor class that overrides no function. torch's notes on
extending it name this and the next part, in private places. None if it is gone."""

_as_plain = part("torch._C.DisableTorchFunctionSubclass")


def can_guard() -> bool:
    """Whether a tensor subclass can inspect functions and then run them as for plain tensors.

    If not, there is no such subclass, and effective weights are not guarded.
    """
    return OVERRIDES_NOTHING is not None and _as_plain is not None


def as_plain_tensors() -> AbstractContextManager[Any]:
    """A context in which no tensor subclass overrides functions."""
    context: AbstractContextManager[Any] = _as_plain()
    return context


def has_onednn() -> bool:
    """Whether torch was built with oneDNN and can multiply two matrices with it (`by_onednn`)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by oneDNN if torch has it; autograd and tracers do not see the operation.

    torch passes ``a @ b`` to MKL, and the flags of ``torch.backends`` do not change that.
    """
    if not has_onednn():
        return a @ b
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return product


def writes_of(tensor: Tensor) -> int | None:
    """How often a tensor was written, as counted by autograd; None if torch does not tell.

    Autograd's public notes and errors mention this version counter, but only the private name gives
    it. Tensors of inference mode have none.
    """
    return None if tensor.is_inference() else getattr(tensor, "_version", None)


def written_since(tensor: Tensor) -> Callable[[], bool]:
    """Return a function that tells whether the tensor has been written since now: see `writes_of`.

    Without a version counter, it compares values with a copy. For tensors of inference mode, writes
    cannot be detected.
    """
    if tensor.is_inference():
        return lambda: False
    before = writes_of(tensor)
    if before is not None:
        return lambda: writes_of(tensor) != before
    values = tensor.detach().clone()
    return lambda: not torch.equal(tensor.detach(), values)


def storage_key(tensor: Tensor) -> int:
    """A number that is equal for all tensors that share memory.

    The public address of the memory would do, but fake memory has none.
    """
    storage = tensor.untyped_storage()
    key: int | None = getattr(storage, "_cdata", None)
    return storage.data_ptr() if key is None else key


_Dispatching: Any = part("torch.utils._python_dispatch.TorchDispatchMode") or object


class BeforeWrites(_Dispatching):
    """A context that calls `before_write` for each tensor that is about to be written.

    The schema of an operation says what it writes to, and modes that see operations are documented,
    but both have private names. Without them, all watched tensors count as written.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's default disables Dynamo inside a mode, which imports Dynamo: two seconds in the
        # first `gift.load` of a process. Nothing is compiled here.
        return False

    def watched(self) -> Iterable[Tensor]:
        """The tensors to watch."""
        raise NotImplementedError

    def before_write(self, tensor: Tensor) -> None:
        """Called with a tensor that still has its old value."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        if _Dispatching is not object:
            return super().__enter__()
        for tensor in self.watched():
            self.before_write(tensor)
        return self

    def __exit__(self, *error: Any) -> Any:
        return super().__exit__(*error) if _Dispatching is not object else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Report what `func` is about to write, then run it."""
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        self.before_write(leaf)
        return func(*args, **kwargs)


def tree_map(function: Callable[..., Any], tree: Any) -> Any:
    """Apply `function` to each leaf of nested containers and return containers of the same types.

    torch's own version knows the containers that other libraries have registered. The fallback
    knows lists, tuples and dictionaries.
    """
    own = part("torch.utils._pytree.tree_map")
    return _mapped(function, tree) if own is None else own(function, tree)


def _mapped(function: Callable[..., Any], tree: Any) -> Any:
    kind = type(tree)
    if isinstance(tree, dict):
        pairs = [(key, _mapped(function, value)) for key, value in tree.items()]
        made = (tree.default_factory,) if hasattr(tree, "default_factory") else ()
        return kind(*made, pairs)
    if isinstance(tree, list | tuple):
        values = [_mapped(function, value) for value in tree]
        return kind(*values) if hasattr(tree, "_fields") else kind(values)
    return function(tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of nested containers, by the rules of `tree_map`."""
    own = part("torch.utils._pytree.tree_leaves")
    if own is not None:
        return list(own(tree))
    leaves: list[Any] = []
    _mapped(leaves.append, tree)
    return leaves


CONV_TRANSPOSE: Any = part("torch.nn.modules.conv._ConvTransposeNd") or (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""The base class of transposed convolutions, or a tuple of torch's classes, for ``isinstance``."""

CONV: Any = part("torch.nn.modules.conv._ConvNd") or (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    *(CONV_TRANSPOSE if isinstance(CONV_TRANSPOSE, tuple) else (CONV_TRANSPOSE,)),
)
"""The base class of all convolutions, transposed ones included, or a tuple of torch's classes."""

NORM_WITH_STATISTICS: Any = part("torch.nn.modules.batchnorm._NormBase") or (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LazyInstanceNorm1d,
    nn.LazyInstanceNorm2d,
    nn.LazyInstanceNorm3d,
)
"""The base class of norm layers with running statistics, or a tuple of torch's classes."""


def convolve(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a convolution with another weight and bias.

    Subclasses override this private method to convolve in another way. Without the method they
    cannot, and the public function does the same.
    """
    own = getattr(layer, "_conv_forward", None)
    return _convolved(layer, x, weight, bias) if own is None else own(x, weight, bias)


def _convolved(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    apply: Callable[..., Tensor] = getattr(F, f"conv{weight.dim() - 2}d")
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, padding_around(layer), mode=layer.padding_mode), 0
    return apply(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


def convolves_as(layer: Any, kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether a layer uses the same convolution as one of these types: see `convolve`."""
    if "_conv_forward" in layer.__dict__:  # recipes for tileable images set it
        return False
    own = getattr(type(layer), "_conv_forward", None)
    return any(own is getattr(kind, "_conv_forward", None) for kind in kinds)


def padding_around(layer: Any) -> tuple[int, ...]:
    """The padding that a convolution with a padding mode adds to its input, as for ``F.pad``."""
    own = getattr(layer, "_reversed_padding_repeated_twice", None)
    if own is not None:
        return tuple(own)
    axes = zip(layer.kernel_size, layer.dilation, strict=True)
    if layer.padding == "valid":
        sides = [(0, 0) for _ in axes]
    elif layer.padding == "same":
        totals = [d * (k - 1) for k, d in axes]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(padding, padding) for padding in layer.padding]
    return tuple(side for both in reversed(sides) for side in both)


class FlatWeights:
    """Mixin of recurrent layers that passes effective weights to their fused kernel.

    The kernel takes a list of weights, which the layer reads from this private name. Here the list
    is a property: it is computed when it is read, and never stored. There is no other way to pass
    weights to the kernel. If the name is gone, recurrent layers are refused (see
    `knows_recurrent`).
    """

    # ``__setattr__`` of nn.RNNBase would also write into the list.
    __setattr__ = nn.Module.__setattr__

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [self._gift_weight(name) for name in self._flat_weights_names]  # type: ignore[attr-defined]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        pass

    @property
    def _flat_weight_refs(self) -> Any:
        return vars(self).get("_flat_weight_refs")

    @_flat_weight_refs.setter
    def _flat_weight_refs(self, value: Any) -> None:
        # `_apply` empties the list and lets `_init_flat_weights` fill it, which does nothing here.
        # Copies are made of the plain layer, which needs the list that it had.
        pass

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: effective weights are new tensors each time."""

    @staticmethod
    def restored(module: nn.RNNBase) -> None:
        """Called when the layer is plain again: let the list refer to its weights."""
        module._init_flat_weights()


@functools.cache
def knows_recurrent() -> bool:
    """Whether recurrent layers of this torch read their weights as `FlatWeights` expects."""
    layer: Any = nn.LSTM(1, 1, device="meta")  # on meta it draws no random numbers
    names = getattr(layer, "_flat_weights_names", ())
    held = getattr(layer, "_flat_weights", ())
    methods = ("_init_flat_weights", "_update_flat_weights")
    return (
        0 < len(names) == len(held)
        and all(tensor is getattr(layer, name) for name, tensor in zip(names, held, strict=True))
        and all(hasattr(layer, method) for method in methods)
    )


COMPILED = "_orig_mod"
"""The name of the original module in the result of ``torch.compile``, and so in its state dicts.
Existing files have such names, whatever this version of torch calls it."""


def callers() -> Iterator[FrameType]:
    """The frames of the callers, innermost first; empty if Python provides no frames."""
    frame = inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None and (frame := frame.f_back) is not None:
        yield frame


def loads_strictly() -> bool:
    """Whether missing and unexpected keys of the state that a module is loading are errors.

    torch does not pass ``strict`` to the hooks of submodules, so this reads it from the frame of
    `load_state_dict`. False if there is no such frame.
    """
    load = nn.Module.load_state_dict.__code__
    frame = next((frame for frame in callers() if frame.f_code is load), None)
    return frame is not None and frame.f_locals.get("strict") is True


_COMPILED_CALL = "_compiled_call_impl"


class _Instead:
    """Temporary replacement for the call of a module; afterwards it only calls the module."""

    def __init__(self, module: nn.Module, first: Callable[[], bool]) -> None:
        self.module = module
        self.first: Callable[[], bool] | None = first
        self.compiled = module.__dict__.get(_COMPILED_CALL)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if self.first is not None and self.first():
            return type(module).__call__(module, *args, **kwargs)
        return (self.compiled or module._call_impl)(*args, **kwargs)

    def take_out(self, state: dict[str, Any]) -> None:
        """Restore the entry in the module's ``__dict__``."""
        if self.compiled is None:
            del state[_COMPILED_CALL]
        else:
            state[_COMPILED_CALL] = self.compiled


@contextlib.contextmanager
def instead_of_calls(module: nn.Module, first: Callable[[], bool]) -> Iterator[None]:
    """Context in which calls of a module run `first`, and start again if that returns True.

    A hook would come too late, because torch has chosen the forward method before it runs hooks. If
    torch has no place for a compiled call, calls are unchanged.
    """
    instead = _Instead(module, first)
    if hasattr(nn.Module, _COMPILED_CALL):
        module.__dict__[_COMPILED_CALL] = instead
    try:
        yield
    finally:
        instead.first = None
        as_called(module.__dict__)


def as_called(state: dict[str, Any]) -> None:
    """Remove the replacement of `instead_of_calls` from the ``__dict__`` of a module."""
    instead = state.get(_COMPILED_CALL)
    if isinstance(instead, _Instead):
        instead.take_out(state)
