"""The effective weight as others read it: a tensor subclass that refuses writes.

An effective weight is computed from a frozen tensor and a delta. A write into it would be lost
silently when it is computed again, so the write raises an error instead. In all other respects it
behaves like any tensor, and results computed from it are plain tensors.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.core.fused import note_copy
from gift.core.weights.multiplying import linear
from gift.layers.blocks import ASKING
from gift.private.torch.tensors import OVERRIDES_NOTHING, as_plain_tensors, can_guard, writes_of

# The compiler must see a weight that is an argument of a function as a plain tensor.
_COMPILER = ("torch._dynamo", "torch._subclasses", "torch._functorch")

_ASSIGNED = frozenset(  # `weight += 1`, `weight[0] = 1`
    {f"__i{name}__" for name in ("add", "sub", "mul", "matmul", "div", "truediv", "floordiv")}
    | {f"__i{name}__" for name in ("mod", "pow", "and", "or", "xor", "lshift", "rshift")}
    | {"__setitem__"}
)


class _Overriding:
    """``__torch_function__`` as a descriptor, because the result depends on the calling code."""

    def __get__(self, tensor: Any, cls: type) -> Any:
        # Do not keep the current frame in a variable: it would refer to itself, and so keep the
        # tensor alive until the next garbage collection.
        frame: Any = inspect.currentframe().f_back  # type: ignore[union-attr]
        # Encoder layers never write into weights. They are told that nothing is overridden, since
        # they disable their fast path otherwise; so is attention, for the products in it.
        asks = frame.f_lasti < ASKING.get(frame.f_code, 0)
        if asks or frame.f_globals.get("__name__", "").startswith(_COMPILER):
            return OVERRIDES_NOTHING
        return _answer


class _RelatedToAll(type(Tensor)):  # type: ignore[misc]
    """Metaclass that makes every tensor an instance of `EffectiveWeight`.

    `torch.testing.assert_close` compares two tensors only if one is an instance of the other's
    class, and an effective weight must compare with parameters like a plain tensor. To test whether
    a tensor is an effective weight, use ``type(tensor) is EffectiveWeight``.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class EffectiveWeight(Tensor, metaclass=_RelatedToAll):
    """An effective weight, or a view of one, which refuses writes.

    Its detached copies (``clone()``, ``nn.Parameter(weight)``, deep copies, pickles) are plain.
    """

    __torch_function__ = _Overriding()

    _gift_name: str
    _gift_whole: bool
    _gift_frozen: Tensor
    _gift_order: tuple[str, ...]
    _gift_slices: Callable[[Tensor, int], Tensor] | None = None
    _gift_made: Any = None
    _gift_source: Any = None

    @staticmethod
    def of(tensor: Tensor, name: str, whole: bool = True) -> Any:
        """Guard a tensor against writes, or return it unchanged where torch does not allow that.

        Args:
            tensor: an effective weight, or a view of one.
            name: its name in errors.
            whole: whether it is the weight itself rather than a view.
        """
        if not can_guard():
            return tensor
        guarded: Any = tensor.as_subclass(EffectiveWeight)
        guarded._gift_name, guarded._gift_whole = name, whole
        return guarded

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_is_param":  # the last step of `nn.Parameter(weight)`
            _become_parameter(self)
        elif name == "__class__":  # `torch.utils.swap_tensors`
            raise refused(self._gift_name, "swapping it")
        else:
            super().__setattr__(name, value)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the write; torch does not call ``__torch_function__`` for this method."""
        raise refused(self._gift_name, "`set_`")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(plain(self), memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        bare = plain(self)
        bare = bare.detach().requires_grad_(bare.requires_grad)  # has none of the attributes
        return bare.__reduce_ex__(protocol)


def refused(name: str, what: str) -> RuntimeError:
    """Create the error for a write that would have no effect.

    Args:
        name: of the weight.
        what: the operation that was tried.
    """
    # Not a TypeError: `weight += 1` would treat it as "not implemented" and add to a copy.
    return RuntimeError(
        f"{name} is adapted: reading it computes a new tensor from the frozen weight and the "
        f"delta, so {what} has no effect on the layer. Call gift.merge(network) first and write "
        "into the plain weight; gift.merged(network) merges temporarily, for inference, and "
        "gift.disable_fine_tuning(network) restores the base"
    )


def plain(tensor: Tensor) -> Tensor:
    """The tensor without its guard."""
    with as_plain_tensors():
        return tensor.as_subclass(Tensor)


def _become_parameter(tensor: Any) -> None:
    """Turn what ``nn.Parameter`` detached into a plain parameter with its own memory."""
    with as_plain_tensors():
        tensor.data = tensor.detach().clone()
    note_copy(tensor._gift_name, tensor, tensor)
    vars(tensor).clear()
    object.__setattr__(tensor, "__class__", nn.Parameter)


def _answer(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """``__torch_function__`` of an effective weight."""
    kwargs = kwargs or {}
    if torch.compiler.is_compiling():
        with as_plain_tensors():
            return func(*args, **kwargs)
    guarded = list(_guarded((*args, *kwargs.values())))
    what = getattr(func, "__name__", "").partition(".")[0]
    if (flag := _flag_for(func, what, args, kwargs)) is not None:
        _check_flag(args[0], flag)
        return args[0]
    if _writes(func, what, args, kwargs):
        raise refused(guarded[0]._gift_name, f"`{_operation(func, what)}`")
    if not all(issubclass(EffectiveWeight, cls) for cls in types):  # other subclasses
        return func(*_unguarded(args), **_unguarded(kwargs))
    with as_plain_tensors():
        return _computed(func, what, args, kwargs, guarded)


def _computed(func: Any, what: str, args: Any, kwargs: dict[str, Any], guarded: list[Any]) -> Any:
    """Call a torch function that only reads effective weights."""
    if func in (F.embedding, F.embedding_bag) and kwargs.get("max_norm") is not None:
        args, kwargs = _copied(args), _copied(kwargs)  # `max_norm` rescales rows in place
    if what == "__getitem__" and (matrix := _matrix(*args)) is not None:
        return matrix
    if func is F.linear and (product := _product(*args, **kwargs)) is not None:
        return product
    versions = [writes_of(tensor) for tensor in guarded]
    result = func(*args, **kwargs) if what != "__iter__" else args[0].unbind()
    if versions != [writes_of(tensor) for tensor in guarded]:
        raise refused(guarded[0]._gift_name, f"`{_operation(func, what)}`")
    if what in ("numpy", "__array__"):
        result.flags.writeable = False
    if what != "__get__" or func.__self__.__name__ != "_base":
        result = _guard_views(result, guarded)
        if type(result) is not EffectiveWeight:
            note_copy(guarded[0]._gift_name, guarded[0], result)
    return iter(result) if what == "__iter__" else result


def _product(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """Multiply by a whole weight; None if it is another operand, or torch's own product must do."""
    if type(weight) is not EffectiveWeight or not weight._gift_whole:
        return None
    return linear(input, weight, plain(bias) if type(bias) is EffectiveWeight else bias)


def _writes(func: Any, what: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the function would write into an effective weight."""
    if what == "__set__":
        attribute, value = func.__self__.__name__, args[1]
        return attribute != "requires_grad" and not (attribute == "grad" and value is None)
    written = [kwargs.get("out")]
    in_place = what.endswith("_") and not what.endswith("__") and what != "requires_grad_"
    if in_place or what in _ASSIGNED or kwargs.get("inplace"):
        written.append(args[0] if args else next(iter(kwargs.values())))
    return next(_guarded(written), None) is not None


def _flag_for(func: Any, what: str, args: Any, kwargs: dict[str, Any]) -> bool | None:
    """The new ``requires_grad`` if the call sets that of a whole effective weight, else None."""
    if what == "requires_grad_":
        flag = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    elif what == "__set__" and func.__self__.__name__ == "requires_grad":
        flag = args[1]
    else:
        return None
    return bool(flag) if args[0]._gift_whole else None


def _check_flag(tensor: Any, requires_grad: bool) -> None:
    if tensor.requires_grad != requires_grad:
        raise RuntimeError(
            f"{tensor._gift_name} is adapted: its frozen tensor stays frozen, and the delta's own "
            "parameters decide whether it is trained: call `requires_grad_` of the module"
        )


def _matrix(weight: Any, index: object) -> EffectiveWeight | None:
    """One matrix of a batch, if it can be read without the whole weight; else None."""
    slices = weight._gift_slices if type(weight) is EffectiveWeight else None
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype == torch.int64:
        index = int(index)
    if slices is None or type(index) is not int:
        return None
    matrix = slices(weight, index)
    guarded: EffectiveWeight = EffectiveWeight.of(matrix, weight._gift_name, whole=False)
    return guarded


def _operation(func: Any, what: str) -> str:
    return f"{func.__self__.__name__} = ..." if what == "__set__" else what


def _guarded(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if type(value) is EffectiveWeight:
            yield value
        elif type(value) in (list, tuple):
            yield from _guarded(value)


def _mapped(change: Any, values: Any) -> Any:
    """Apply `change` to each effective weight among arguments."""
    if type(values) is EffectiveWeight:
        return change(values)
    if type(values) in (list, tuple):
        return type(values)(_mapped(change, value) for value in values)
    if type(values) is dict:
        return {key: _mapped(change, value) for key, value in values.items()}
    return values


def _unguarded(values: object) -> Any:
    return _mapped(plain, values)


def _copied(values: object) -> Any:
    return _mapped(lambda tensor: tensor.as_subclass(Tensor).clone(), values)


def _guard_views(result: Any, guarded: list[Any]) -> Any:
    """Guard the result of a function if it shares memory with an effective weight."""
    if type(result) is Tensor and result.layout is torch.strided:
        memory = result.untyped_storage().data_ptr()
        for tensor in guarded if memory else ():
            if tensor.untyped_storage().data_ptr() == memory:
                return EffectiveWeight.of(result, tensor._gift_name, whole=False)
    elif type(result) in (list, tuple):
        return type(result)(_guard_views(one, guarded) for one in result)
    return result
