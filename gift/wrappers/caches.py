"""Access to the caches of transformers that a language model is called with.

A cache is recognised by its type or contents, since its argument name depends on the version of
transformers (``past_key_values``, ``cache_params``, ``cache``). Only its public methods are used.
If a class lacks them, its tensors are inspected. If a question cannot be answered, the answer is
None, and the caller rejects the cache.

A cache that a prompted model has filled carries a note, an attribute of plain numbers. So it is
still recognised after `copy.deepcopy`, beam search and cropping.
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any, NamedTuple

from torch import Tensor

# Tuples, since the compiler of old versions of torch does not support union types here.
ROWS = (tuple, list)
FLAGS = (bool, str)
NO_CACHES = (Tensor, int, float, *FLAGS, *ROWS)
_NOTE = "_gift_prompt"
_UNANSWERED = (AttributeError, IndexError, NotImplementedError, TypeError, ValueError)


class Note(NamedTuple):
    """The contents of a cache after a call of a prompted model.

    Args:
        virtual: the number of virtual tokens in it.
        length: the number of positions, virtual tokens included; None while compiling.
        offset: the last given position minus its value if positions counted all tokens; None if no
            positions were given.
    """

    virtual: int
    length: int | None
    offset: int | None


def is_cache(value: Any) -> bool:
    """Whether an argument is an object that holds states of earlier tokens."""
    if value is None or isinstance(value, NO_CACHES):
        return False
    if callable(getattr(value, "get_seq_length", None)):
        return True
    return any("Cache" in base.__name__ for base in type(value).__mro__)


def is_tuples(value: Any) -> bool:
    """Whether the value is a cache in the format of old models: keys and values for each layer."""
    if not isinstance(value, ROWS) or not value:
        return False
    return all(
        isinstance(layer, ROWS)
        and len(layer) >= 2
        and all(isinstance(part, Tensor) and part.ndim == 4 for part in layer[:2])
        and layer[0].shape[-2] == layer[1].shape[-2]
        for layer in value
    )


def is_nothing(value: Any) -> bool:
    """Whether an argument holds nothing: None, or a container of nothing but None."""
    return value is None or (isinstance(value, ROWS) and all(is_nothing(item) for item in value))


def caches_in(values: Iterable[Any]) -> list[Any]:
    """Return the distinct caches among values."""
    return list({id(value): value for value in values if is_cache(value)}.values())


def items_of(output: Any) -> list[Any]:
    """Return the items of a model's output, caches among them."""
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, ROWS) else []


def length_of(cache: Any) -> int | None:
    """Return the number of positions in a cache; None for states without positions (Mamba)."""
    if is_tuples(cache):
        return int(cache[0][0].shape[-2])
    try:
        return int(cache.get_seq_length())
    except _UNANSWERED:
        return None


def is_empty(cache: Any) -> bool:
    """Whether a cache holds no token: all of its methods say so, and all of its states are zero."""
    length, state = length_of(cache), _has_state(cache)
    if state is None and length:
        return False
    if length is None and state:
        return False
    # The length may be that of one layer, or of the batch, while other layers hold states.
    return not any(bool(tensor.any()) for tensor in _states_in(cache))


def _has_state(cache: Any) -> bool | None:
    said = getattr(cache, "has_previous_state", None)
    try:
        said = said() if callable(said) else said
    except _UNANSWERED:
        return None
    return said if isinstance(said, bool) else None


def _states_in(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """Yield the floating-point tensors with several axes, not window sizes and counts."""
    if isinstance(value, Tensor):
        if value.ndim > 1 and (value.is_floating_point() or value.is_complex()):
            yield value
    elif depth:
        if isinstance(value, Mapping):
            items: Iterable[Any] = value.values()
        elif isinstance(value, ROWS):
            items = value
        else:
            items = getattr(value, "__dict__", {}).values()
        for item in items:
            yield from _states_in(item, depth - 1)


def has_fixed_length(cache: Any) -> bool:
    """Whether a cache was made with room for a fixed number of positions."""
    if is_tuples(cache) or length_of(cache) is None:
        return False
    said = getattr(cache, "is_compileable", None)
    if isinstance(said, bool):
        return said
    return getattr(cache, "max_cache_len", None) is not None


def note_of(cache: Any) -> Note | None:
    """Return the note that a prompted model left in a cache that it filled, or None."""
    noted = getattr(cache, "__dict__", {}).get(_NOTE)
    return None if noted is None else Note(*noted)


def put_note(cache: Any, note: Note) -> None:
    """Note a cache's contents; one that takes no attributes gets no note, and is rejected later."""
    try:
        setattr(cache, _NOTE, tuple(note))
    except (AttributeError, TypeError):
        return


def version() -> str:
    """Return the version of transformers, for messages."""
    try:
        return f"transformers {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:  # the called model only looks like one of transformers
        return "no transformers"
