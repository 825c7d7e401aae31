"""Caches of transformers: all that gift asks of the cache that a language model is called with.

A cache is recognised by what it is, since its name among the arguments depends on the version of
transformers (``past_key_values``, ``cache_params``, ``cache``). Only its public methods are used.
Where a class lacks them, its tensors answer; what cannot be answered is None, and the caller
refuses it.

A cache that a prompted model has filled carries a note of that, an attribute of plain numbers. So
it is still known after `copy.deepcopy`, beam search, and cropping.
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any, NamedTuple

from torch import Tensor

# Tuples, since the compiler of old versions of torch follows no unions of types.
ROWS = (tuple, list)
FLAGS = (bool, str)
NO_CACHES = (Tensor, int, float, *FLAGS, *ROWS)
_NOTE = "_gift_prompt"
_UNANSWERED = (AttributeError, IndexError, NotImplementedError, TypeError, ValueError)


class Note(NamedTuple):
    """What a cache holds after a call of a prompted model.

    Args:
        virtual: the number of virtual tokens in it.
        length: the number of positions, with those of virtual tokens; None while compiling.
        offset: the last position given minus what it is where positions count all tokens;
            None where no positions were given.
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
    """Whether it is a cache in the form of old models: for each layer its keys and values."""
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
    """Whether an argument holds nothing: None, or a container of such."""
    return value is None or (isinstance(value, ROWS) and all(is_nothing(item) for item in value))


def caches_in(values: Iterable[Any]) -> list[Any]:
    """The caches among values, each once."""
    return list({id(value): value for value in values if is_cache(value)}.values())


def length_of(cache: Any) -> int | None:
    """The number of positions in a cache; None for a state that has none, as that of Mamba."""
    if is_tuples(cache):
        return int(cache[0][0].shape[-2])
    try:
        return int(cache.get_seq_length())
    except _UNANSWERED:
        return None


def is_empty(cache: Any) -> bool:
    """Whether no token is in a cache: all of its answers say so, and it holds zeros at most."""
    length, state = length_of(cache), _has_state(cache)
    if state is None and length:
        return False
    if length is None and state:
        return False
    # The length may be that of one layer, or of a batch, where others hold states.
    return not any(bool(tensor.any()) for tensor in _states_in(cache))


def _has_state(cache: Any) -> bool | None:
    told = getattr(cache, "has_previous_state", None)
    try:
        told = told() if callable(told) else told
    except _UNANSWERED:
        return None
    return told if isinstance(told, bool) else None


def _states_in(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """The tensors of numbers for each sequence; sizes of windows and counts are none."""
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
    """Whether a cache has room for a number of positions that was settled when it was made."""
    if is_tuples(cache) or length_of(cache) is None:
        return False
    told = getattr(cache, "is_compileable", None)
    if isinstance(told, bool):
        return told
    return getattr(cache, "max_cache_len", None) is not None


def note_of(cache: Any) -> Note | None:
    """What a prompted model noted of a cache that it filled."""
    noted = getattr(cache, "__dict__", {}).get(_NOTE)
    return None if noted is None else Note(*noted)


def put_note(cache: Any, note: Note) -> None:
    """Note what a cache holds now; one that takes no attributes stays without, and is refused."""
    try:
        setattr(cache, _NOTE, tuple(note))
    except (AttributeError, TypeError):
        return


def version() -> str:
    """The version of transformers, for messages."""
    try:
        return f"transformers {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:  # what is called only looks like a model of it
        return "no transformers"
