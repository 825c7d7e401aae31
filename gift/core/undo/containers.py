"""Save and restore the contents of containers in the state of a module.

Authors put their own containers into modules. These may refuse writes (`FrozenDict`) or do more
than store values. Containers that derive from a built-in class are read and written with the
methods of that class, and written only where they differ. All others are left alone. No step calls
an author's code, except for hashes and comparisons of keys, and every step can be repeated.
"""

from collections import OrderedDict, deque
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

_KINDS = (OrderedDict, dict, list, set, deque)
_EXACT = frozenset(_KINDS)


class Missing:
    """Marks an absent entry. It is a class, so copies and pickles keep its identity."""


def kind_of(value: object) -> Any:
    """The most derived of the known built-in classes that `value` is an instance of."""
    cls = type(value)
    return cls if cls in _EXACT else next(kind for kind in _KINDS if issubclass(cls, kind))


def filled(state: Mapping[str, Any], also: Container[str] = ()) -> Iterator[tuple[str, Any]]:
    """The containers in the state of a module that are not empty, and those named in `also`."""
    for key, value in state.items():
        cls = type(value)
        if cls in _EXACT:
            if value or key in also:
                yield key, value
        elif issubclass(cls, _KINDS) and (key in also or kind_of(value).__len__(value)):
            yield key, value


def copied(container: Any) -> Any:
    """A shallow copy of a container, as a plain dictionary, list or set."""
    if type(container) is dict:  # the common case
        return dict(container)
    kind = kind_of(container)
    if issubclass(kind, dict):
        return dict(kind.items(container))
    return set(set.__iter__(container)) if kind is set else list(kind.__iter__(container))


def difference(
    before: Mapping[Any, Any], after: Mapping[Any, Any], own: Container[str]
) -> dict[Any, Any]:
    """Entries of `before` that changed or are gone; new keys except `own` map to `Missing`."""
    changed = {k: v for k, v in before.items() if after.get(k, Missing) is not v}
    if new := after.keys() - before.keys():
        changed |= {k: Missing for k in new if k not in own}
    return changed


def differ(before: Any, container: Any) -> bool:
    """Whether a list or set holds other objects, by identity (``==`` of tensors gives no bool)."""
    now = copied(container)
    if isinstance(before, set):
        return set(map(id, before)) != set(map(id, now))
    return len(before) != len(now) or any(a is not b for a, b in zip(before, now, strict=True))


def restore(container: object, before: object) -> None:
    """Restore exactly what a container held, in the same order."""
    if isinstance(before, dict):
        put_entries(container, difference(before, copied(container), ()))
        put_order(container, list(before))
    else:
        refill(container, before)


def put_entries(container: object, entries: Mapping[Any, Any]) -> None:
    """Set entries of a dictionary; those with the value `Missing` are deleted."""
    kind = kind_of(container)
    for key, value in entries.items():
        now = kind.get(container, key, Missing)
        if now is value:
            continue
        if value is Missing:
            kind.__delitem__(container, key)
        else:
            kind.__setitem__(container, key, value)


def put_order(container: object, order: Iterable[Any]) -> None:
    """Reorder a dictionary; keys that are not in `order` come last."""
    kind, now = kind_of(container), copied(container)
    wanted = {key: now[key] for key in order if key in now}
    wanted |= now
    if list(wanted) == list(now):
        return
    try:
        for key, value in wanted.items():
            kind.__delitem__(container, key)
            kind.__setitem__(container, key, value)
    finally:  # an interrupt must not lose an entry
        for key, value in wanted.items():
            kind.__setitem__(container, key, value)


def refill(container: Any, before: Any) -> None:
    """Replace the contents of a list or set, by identity."""
    if not differ(before, container):
        return
    kind = kind_of(container)
    if kind is set:
        for item in copied(container):
            if not any(item is one for one in before):
                set.discard(container, item)
        for item in before:
            set.add(container, item)
    elif kind is list:
        list.__setitem__(container, slice(None), before)
    else:
        deque.clear(container)
        deque.extend(container, before)
