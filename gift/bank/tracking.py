"""Track the rows of a batch inside a network: which tensors have them, along which axis."""

import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gift.bank import kinds
from gift.bank.call import Call, name_of, tensors_of, writes
from gift.bank.places import SAME, Lost, Mixed, One, Place, Rows, in_order, is_alike
from gift.bank.rules import place_after
from gift.core.dynamic_class import plain_class
from gift.core.forwards import argument_names
from gift.errors import GiftWarning
from gift.layers.table import operation_of
from gift.private.torch.tensors import storage_key
from gift.private.torch.tracing import is_transformed
from gift.wrappers.arguments import in_order as arguments_in_order

WAY_OUT = "Leave this layer out of the deltas, or call the network once for each delta"


class Hook:
    """A hook of a module that does nothing in copies of the module."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        """Return the result of `call`; None in a copy."""
        return None if self.call is None else self.call(*args)

    def __reduce__(self) -> Any:
        return Hook, ()


class Tracking(TorchFunctionMode):
    """Context manager that tracks where the rows of a batch are in each tensor of a network.

    A tensor computed from constants only, such as positions, is the same for all rows, whatever the
    length of its axes. A function that is not known to keep rows apart loses them.

    Args:
        net: the network.
        weights: the weights whose changes are added to the outputs of their layers, by the paths of
            these. Any other module that reads them would see the base.
        n_rows: the number of rows.
        dim: axis of the rows in the inputs of layers.
        differs: whether the rows differ. If not, nothing can be mixed.
    """

    def __init__(
        self, net: nn.Module, weights: Mapping[str, Tensor], n_rows: int, dim: int, differs: bool
    ) -> None:
        super().__init__()
        self.weights = {id(weight): path for path, weight in weights.items()}
        self.n_rows = n_rows
        self.dim = dim
        self.differs = differs
        self.batch = n_rows
        self.sizes = {n_rows}  # batch sizes: beam search repeats each row in place
        self.was_called = False
        self.repeated: set[str] = set()  # layers that got one input for all rows
        self._thread = threading.get_ident()
        self._inside: list[nn.Module] = []
        self._modules = list(net.modules())
        self._hooks: list[Any] = []
        self._places = WeakTensorKeyDictionary()
        self._overwritten: dict[int, tuple[int, Tensor]] = {}  # memory: when; kept, so not reused
        self._now = 0
        for tensor in _constants(self._modules):
            self.set_place(tensor, SAME)

    def __enter__(self) -> Any:
        for module in self._modules:
            self._hooks += self._watch(module)
        return super().__enter__()

    def _watch(self, module: nn.Module) -> Iterator[Any]:
        enter, leave = Hook(self._enter), Hook(self._leave)
        yield module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        yield module.register_forward_hook(leave, always_call=True)

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def place_of(self, tensor: Tensor) -> Place:
        """Return where the rows are in a tensor."""
        known: tuple[Place, int] | None = self._places.get(tensor)
        if known is None:
            return Lost(_unseen())
        place, when = known
        if self._overwritten:
            written, _ = self._overwritten.get(storage_key(tensor), (0, None))
            if written > when:
                return Lost("other rows were written into its memory, through another view")
        return place

    def set_place(self, tensor: Tensor, place: Place) -> None:
        """Record where the rows are in a tensor."""
        self._places[tensor] = place, self._now

    def in_layer(self, tensor: Tensor) -> Place:
        """Return where the rows are in the input of a layer.

        What is computed from constants has the rows along `dim` if it has an entry for each, all
        equal.
        """
        place, size = self.place_of(tensor), _size(tensor, self.dim)
        each = place is SAME and tensor.ndim > 1 and size and size % self.batch == 0
        if each and _alike(tensor, self.dim):
            return Rows(self.n_rows, self.dim, size // self.n_rows)
        return place

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"{type(module).__name__} is computing rows for another thread: rows differ in the "
                "thread of the with block alone"
            )
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(module).__name__} is compiled, where rows cannot differ: compile it "
                "before the with block, or call the network itself"
            )
        if not self._inside:
            given = arguments_in_order(argument_names(type(module)), args, kwargs)
            self._begin(module, list(tensors_of(given)), given)
        self._inside.append(module)
        self.was_called = True

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread or not self._inside:
            return
        self._inside.pop()
        if not self.differs or output is None:
            return
        if operation_of(type(module)) == "packed linear":
            self.set_place(output, self.place_of(args[0]))  # kernels are not seen
        if not self._inside:
            self._check_output(module, output)

    def _begin(self, module: nn.Module, inputs: list[Tensor], given: Any) -> None:
        """Find the batch: the first input has it; inputs of other sizes are equal for all rows."""
        self._overwritten.clear()
        batches = [tensor for tensor in inputs if tensor.ndim]
        own = {id(part) for part in module.modules()}
        within = [t for t in _inside_objects(given, own) if t not in self._places]  # caches
        for tensor in inputs:
            self.set_place(tensor, SAME)
        if self.dim != 0:
            for tensor in [*batches, *within]:
                self.set_place(tensor, self._find(tensor))
            return
        if not batches:
            return
        first = batches[0]
        self.batch = len(first)
        if self.batch not in self.sizes:
            raise ValueError(
                f"{type(module).__name__} gets a batch of {self.batch}, expected {self.n_rows} rows"
            )
        place = Rows(self.n_rows, 0, self.batch // self.n_rows)
        for tensor in [*batches, *within]:
            # A vector as long as the second axis may hold positions, and cannot be distinguished
            # from values for each row.
            either = tensor.ndim == 1 and first.shape[1:2] == tensor.shape and tensor is not first
            has_rows = tensor.ndim and len(tensor) == self.batch and not either
            self.set_place(tensor, place if has_rows else SAME)

    def _find(self, tensor: Tensor) -> Place:
        """Find the batch in a network that may get it first, though layers get it along `dim`."""
        for axis in (self.dim, 0):
            if _size(tensor, axis) == self.n_rows:
                return Rows(self.n_rows, axis)
        return SAME

    def _check_output(self, module: nn.Module, output: Any) -> None:
        """Raise if a network returns its rows in another order, or warn if it mixes some."""
        kind, found = type(module).__name__, [t for t in tensors_of(output) if t.ndim]
        places = [self.place_of(tensor) for tensor in found]
        lost = [place.why for place in places if isinstance(place, Lost)]
        lost += ["rows are in another order" for place in places if not in_order(place)]
        single = found[0] if isinstance(output, Tensor) and found else None
        if single is not None and isinstance(places[0], One) and len(single) == self.batch:
            lost.append(f"all of it belongs to row {places[0].row}")
        if not lost:
            return
        text = (
            f"{kind} returns {tuple(found[0].shape)}, which is not the batch of {self.n_rows} "
            f"rows: {lost[0]}. Call it once for each delta instead"
        )
        if len(lost) == len(found) or single is not None:
            raise ValueError(text)
        warnings.warn(
            f"of {len(found)} tensors that {kind} returns, {len(lost)} have no rows: {lost[0]}",
            GiftWarning,
            stacklevel=2,
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = name_of(func)
        if name == "repeat_interleave" and args[0].shape[:1] == (self.n_rows,):
            self.sizes.update(size for size in result.shape[:1] if size % self.n_rows == 0)
        if name == "__iter__":  # over slices, which are tracked too
            result = list(result)
        if self._inside:
            self._follow(name, func, args, kwargs, result)
        return iter(result) if name == "__iter__" else result

    def _check_weights(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in self.weights and not self._is_own(tensor):
                path = self.weights[id(tensor)]
                raise RuntimeError(
                    f"{type(self._inside[-1]).__name__} reads {path} itself, which "
                    f"has no single value while rows differ. {WAY_OUT}"
                )

    def _follow(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not (self.differs or self._has_weight(args) or self._has_weight(kwargs.values())):
            return  # nothing can be mixed, and each function is called for each token
        made = [args[0]] if name in ("__setitem__", "__set__") else list(tensors_of(result))
        if not made and name not in kinds.LEAVING:
            return
        call = Call(name, func, args, kwargs, self.n_rows, self.place_of, made)
        self._check_weights(call.tensors)
        if not self.differs:
            return
        if not made:
            self._check_leaving(call)
        for which, tensor in enumerate(made):
            try:
                place = place_after(call, which)
            except Mixed as error:
                place = Lost(f"{name} in {type(self._inside[-1]).__name__} {error}")
            if writes(func) and not is_alike(place, self.place_of(tensor)):
                self._now += 1
                self._overwritten[storage_key(tensor)] = self._now, tensor
            self.set_place(tensor, place)

    def _has_weight(self, values: Collection[Any]) -> bool:
        """Return whether a weight whose changes are added is among arguments."""
        if not self.weights.keys().isdisjoint(map(id, values)):
            return True
        inner = [value for value in values if isinstance(value, (list, tuple, dict))]
        return any(self._has_weight(v.values() if isinstance(v, dict) else v) for v in inner)

    def _check_leaving(self, call: Call) -> None:
        """Raise if values of rows leave torch, where what becomes of them is not seen."""
        x = call.x
        number = call.name not in ("numpy", "__array__", "__dlpack__")
        if self.place_of(x) is not SAME and not (number and not x.is_floating_point()):
            raise ValueError(
                f"{type(self._inside[-1]).__name__} takes values of rows out of torch by "
                f"{call.name}: what becomes of them cannot be followed"
            )

    def _is_own(self, weight: Tensor) -> bool:
        return any(p is weight for p in self._inside[-1]._parameters.values())


def _unseen() -> str:
    if is_transformed():
        return "torch.vmap or another transform of torch.func hides what it does"
    return (
        "it comes from what torch does not show, such as TorchScript, vmap, numpy or an "
        "extension, or from a tensor that is not a parameter, buffer or attribute of a module"
    )


def _constants(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Return what modules, their classes and the files of these hold, the same for all rows."""
    classes = {plain_class(type(module)) for module in modules}
    files = {sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules}
    holders = [vars(holder) for holder in (*modules, *classes, *files)]
    holders += [held for m in modules for held in (m._parameters, m._buffers)]
    for holder in holders:
        for value in list(holder.values()):
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple | dict):
                items = value.values() if isinstance(value, dict) else value
                yield from (item for item in list(items) if isinstance(item, Tensor))


def _inside_objects(value: Any, own: Collection[int], depth: int = 4) -> Iterator[Tensor]:
    """Return the tensors in the attributes of objects, as caches are: modules in transformers 4.48.

    Args:
        value: an object, or a container of them.
        own: ids of objects that are left out.
        depth: how many objects within objects are looked at.
    """
    if isinstance(value, Tensor | str | int | float | type) or id(value) in own or not depth:
        return
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _inside_objects(item, own, depth)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from tensors_of(item)
            yield from _inside_objects(item, own, depth - 1)


def _size(tensor: Tensor, axis: int) -> int:
    return tensor.shape[axis] if tensor.ndim > axis else 0


def _alike(tensor: Tensor, dim: int) -> bool:
    """Return whether all slices along an axis are equal."""
    return tensor.stride(dim) == 0 or torch.equal(
        tensor.narrow(dim, 0, 1).expand_as(tensor), tensor
    )
