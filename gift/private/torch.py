"""Private parts of torch: what they answer, why no public name does, and what answers otherwise.

See `gift.private` for the rules. A part is looked up by its dotted path each time that it is asked
for, unless a compiler traces the call or each step pays for it: then once, at import.
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
"""Dotted paths of what this file needs and any torch has. Others are parts of instances, or of some
builds alone: the tests of the functions below tell."""


def part(path: str) -> Any:
    """What the dotted path of a part leads to; None where it is gone."""
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

    torch asks this itself before it applies an autograd function; no public name tells it without a
    tensor. Where it cannot be known the answer is yes: whoever asks then leaves all to autograd.
    """
    if _functorch_is_active is None:
        return True
    # Dual numbers can be made by hand, with no transform around them.
    level = getattr(torch.autograd.forward_ad, "_current_level", 0)
    return _functorch_is_active() or torch.jit.is_tracing() or level >= 0


def is_compiled_by_old() -> bool:
    """Whether a compiler traces that does not follow autograd functions where sizes are left open,
    and for which a property of a module hides what lies in its ``__dict__`` under that name.

    That of torch 2.6 fails at both, that of 2.14 does not; no version between was tried.
    """
    return _old_compiler and torch.compiler.is_compiling()


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient stands for several (``is_grads_batched``): few operations allow that.

    A tensor's public attributes are those of one of them. Where it cannot be known the answer is
    yes: what such a gradient allows any other allows as well.
    """
    if torch.compiler.is_compiling():
        return False
    return _is_legacy_batched is None or bool(_is_legacy_batched(gradient))


def is_followed() -> bool:
    """Whether a mode follows functions or operations, which knows torch's own names alone.

    Modes are public, their number is not. Where it cannot be known the answer is yes.
    """
    if _dispatch_modes is None or _function_modes is None:
        return True
    return bool(_dispatch_modes() or _function_modes())


def is_exporting() -> bool:
    """Whether a network is exported, as what serves all sizes.

    This is public since torch 2.7. Before, all that is compiled is taken for it.
    """
    return torch.compiler.is_compiling() if _exporting is None else _exporting()


def is_known(condition: Any) -> bool:
    """Whether it holds; compiled, whether it does for all sizes that the graph serves.

    To ask a size that is left open as such would fix it. Where that cannot be asked otherwise, no
    condition is known to hold.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and type(condition) is bool:
        return condition
    if compiling and _old_compiler:  # that of 2.6 does not let them be asked at all
        return False
    try:
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second
    except ImportError:
        return False
    return statically_known_true(condition)


def unfollowed() -> AbstractContextManager[Any]:
    """A context in which no mode follows functions, ours or another's.

    A mode leaves itself alone in its own code only. Otherwise what is done there is followed too,
    which takes longer.
    """
    disable = part("torch._C.DisableTorchFunction")
    return contextlib.nullcontext() if disable is None else disable()


OVERRIDES_NOTHING: Any = part("torch._C._disabled_torch_function_impl")
"""The ``__torch_function__`` of a class of tensors that overrides no function; torch's notes on
extending it name this and the next, in private places. None if it is gone."""

_as_plain = part("torch._C.DisableTorchFunctionSubclass")


def can_guard() -> bool:
    """Whether a class of tensors can look at the functions that it is given to, and then let them
    be as for plain tensors. Otherwise there is no such class, and nothing is guarded.
    """
    return OVERRIDES_NOTHING is not None and _as_plain is not None


def as_plain_tensors() -> AbstractContextManager[Any]:
    """A context in which no class of tensors overrides functions."""
    context: AbstractContextManager[Any] = _as_plain()
    return context


def has_onednn() -> bool:
    """Whether torch was built with oneDNN, and lets it multiply two matrices (`by_onednn`)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, by oneDNN where torch has that; autograd and tracers know nothing of it.

    ``a @ b`` is given to MKL, the flags of ``torch.backends`` do not change that.
    """
    if not has_onednn():
        return a @ b
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return product


def writes_of(tensor: Tensor) -> int | None:
    """How often a tensor was written into, as autograd counts; None where torch does not tell.

    Autograd speaks of this count in its public notes and errors, but shows it under this name
    alone. Tensors of inference mode have none either.
    """
    return None if tensor.is_inference() else getattr(tensor, "_version", None)


def written_since(tensor: Tensor) -> Callable[[], bool]:
    """What tells later whether the tensor has been written into: see `writes_of`.

    Where torch does not tell, by a copy of its values. Of tensors of inference mode nobody knows.
    """
    if tensor.is_inference():
        return lambda: False
    before = writes_of(tensor)
    if before is not None:
        return lambda: writes_of(tensor) != before
    values = tensor.detach().clone()
    return lambda: not torch.equal(tensor.detach(), values)


def storage_key(tensor: Tensor) -> int:
    """A number that tensors have in common that share memory.

    The public address of the memory does as well, but for fake memory, which has none.
    """
    storage = tensor.untyped_storage()
    key: int | None = getattr(storage, "_cdata", None)
    return storage.data_ptr() if key is None else key


_Dispatching: Any = part("torch.utils._python_dispatch.TorchDispatchMode") or object


class BeforeWrites(_Dispatching):
    """A context in which `before_write` hears of each tensor that is about to be written into.

    Operations say in their schema what they write into, and modes that see operations are
    documented, but both under such names. Otherwise it is taken that all is written into.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To keep its compiler away from what runs in a mode, torch would import it: two seconds in
        # the first `gift.load` of a process. Nothing is compiled here.
        return False

    def watched(self) -> Iterable[Tensor]:
        """The tensors that matter."""
        raise NotImplementedError

    def before_write(self, tensor: Tensor) -> None:
        """Called with a tensor that still has its value."""
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
        """Tell what `func` is about to write into, then run it."""
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        self.before_write(leaf)
        return func(*args, **kwargs)


def tree_map(function: Callable[..., Any], tree: Any) -> Any:
    """`function` of each leaf of nested containers, in containers like them.

    torch's own knows the containers that other libraries have registered; otherwise lists, tuples
    and dictionaries are containers.
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
    """The leaves of nested containers, as `tree_map` sees them."""
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
"""The base of transposed convolutions, or all of torch's: for ``isinstance``."""

CONV: Any = part("torch.nn.modules.conv._ConvNd") or (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    *(CONV_TRANSPOSE if isinstance(CONV_TRANSPOSE, tuple) else (CONV_TRANSPOSE,)),
)
"""The base of all convolutions, transposed ones too, or all of torch's."""

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
"""The base of norm layers that keep running statistics, or all of torch's."""


def convolve(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a convolution gives with another weight and bias.

    This is the method that subclasses override to convolve otherwise. Without it they cannot, and
    the public function does the same.
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
    """Whether a layer convolves as one of these types does: see `convolve`."""
    if "_conv_forward" in layer.__dict__:  # as recipes for tileable pictures set it
        return False
    own = getattr(type(layer), "_conv_forward", None)
    return any(own is getattr(kind, "_conv_forward", None) for kind in kinds)


def padding_around(layer: Any) -> tuple[int, ...]:
    """What a convolution with a padding mode puts around its input, as ``F.pad`` takes it."""
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
    """Recurrent layers hand a list of their weights to one kernel: here it is made when asked
    for, so that it holds the effective weights, and never stored.

    The kernel takes nothing but that list, and the layer reads it from this name. Where the name is
    gone there is no other way in: `refuse_recurrent` says so.
    """

    # Their own one would also store what it sets in the list.
    __setattr__ = nn.Module.__setattr__

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [self._gift_weight(name) for name in self._flat_weights_names]  # type: ignore[attr-defined]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        pass

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Nothing to do: the effective weights are new tensors each time."""

    @staticmethod
    def restored(module: nn.RNNBase) -> None:
        """Called once the layer is its plain self again: point the list at its weights."""
        module._init_flat_weights()


@functools.cache
def knows_recurrent() -> bool:
    """Whether recurrent layers of this torch read their weights as `FlatWeights` has it."""
    layer: Any = nn.LSTM(1, 1, device="meta")  # which draws no random numbers
    names = getattr(layer, "_flat_weights_names", ())
    held = getattr(layer, "_flat_weights", ())
    methods = ("_init_flat_weights", "_update_flat_weights")
    return (
        0 < len(names) == len(held)
        and all(tensor is getattr(layer, name) for name, tensor in zip(names, held, strict=True))
        and all(hasattr(layer, method) for method in methods)
    )


COMPILED = "_orig_mod"
"""The name of the compiled module in what ``torch.compile`` gives, and so in names in its states.
Files have such names, whatever this torch calls it."""


def callers() -> Iterator[FrameType]:
    """The frames of who called, the caller of who asks first; none where Python has no frames."""
    frame = inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None and (frame := frame.f_back) is not None:
        yield frame


def loads_strictly() -> bool:
    """Whether missing and unexpected keys of the state that a module is loading are errors.

    Hooks of its parts are not told, so the frame of `load_state_dict` is asked; False without one.
    """
    load = nn.Module.load_state_dict.__code__
    frame = next((frame for frame in callers() if frame.f_code is load), None)
    return frame is not None and frame.f_locals.get("strict") is True


_COMPILED_CALL = "_compiled_call_impl"


class _Instead:
    """What is called instead of a module for a while; then it does what the module does."""

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
        """Let the state of the module have what was there."""
        if self.compiled is None:
            del state[_COMPILED_CALL]
        else:
            state[_COMPILED_CALL] = self.compiled


@contextlib.contextmanager
def instead_of_calls(module: nn.Module, first: Callable[[], bool]) -> Iterator[None]:
    """Within it, calls of a module do something first, and begin anew if that gives True.

    A hook would not do: when hooks run, the forward method is chosen already. Where torch has no
    place for a compiled call, calls are as ever.
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
    """Let the state of a module have nothing of `instead_of_calls`."""
    instead = state.get(_COMPILED_CALL)
    if isinstance(instead, _Instead):
        instead.take_out(state)
