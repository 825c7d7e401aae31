"""Change tensors inside a module's output, and leave everything else unchanged."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Change = Callable[[Tensor], Tensor]


def tensor_in(value: Any) -> Tensor | None:
    """Return the tensor in an argument or item: itself, or the data of a packed sequence."""
    if isinstance(value, PackedSequence):
        return value.data
    return value if isinstance(value, Tensor) else None


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """Return the first tensor among arguments."""
    return next((t for t in map(tensor_in, values) if t is not None), None)


def with_first_changed(output: Any, change: Change) -> Any:
    """Change the first tensor in `output`, keeping its type; None if it has no tensor."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, PackedSequence):
        return output._replace(data=change(output.data))
    for key, item in _items(output):
        changed = with_first_changed(item, change)
        if changed is not None:
            return with_items(output, {key: changed})
    return None


def with_all_changed(
    output: Any, change: Change, kept: Callable[[Any], bool] = lambda item: False
) -> Any:
    """Change all tensors in `output`, keeping its type; items for which `kept` is True stay."""
    changed = _all_changed(output, change, kept)
    return output if changed is None else changed


def _all_changed(output: Any, change: Change, kept: Callable[[Any], bool]) -> Any:
    """The same, but None if nothing changes."""
    if isinstance(output, Tensor):
        tensor = change(output)
        return None if tensor is output else tensor
    items = {}
    for key, item in _items(output):
        changed = None if kept(item) else _all_changed(item, change, kept)
        if changed is not None:
            items[key] = changed
    return with_items(output, items) if items else None


def _items(output: Any) -> list[tuple[Any, Any]]:
    """Return the items of a tuple, list, mapping or dataclass."""
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    if isinstance(output, Mapping):
        return list(output.items())
    if is_dataclass(output) and not isinstance(output, type):
        return [(field.name, getattr(output, field.name)) for field in fields(output)]
    return []


def with_items(output: Any, items: Mapping[Any, Any]) -> Any:
    """Replace items of `output`, keeping its type."""
    if isinstance(output, tuple):
        values = [items.get(index, item) for index, item in enumerate(output)]
        return output._make(values) if hasattr(output, "_make") else type(output)(values)
    new = copy.copy(output)
    for key, item in items.items():
        if isinstance(new, (list, Mapping)):
            new[key] = item  # type: ignore[index]
        else:
            object.__setattr__(new, key, item)  # works for frozen dataclasses too
    return new
