"""What the nodes of an autograd graph keep: private parts of torch.

Nodes, their names and their edges are public, and so is a hook on what they keep. What they keep
has private names. Everything here raises `Unknown` if a part is gone or does not tell, and callers
then keep a tensor of their own. See `gift.private` for the rules.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gift.private.torch.parts import part

PARTS = ("torch._C._autograd.SavedTensor",)

_top_hooks = part("torch._C._autograd._top_saved_tensors_default_hooks")  # not in torch 2.6
_tells_hooks = all(hasattr(part(PARTS[0]), name) for name in ("unpack_hook", "data"))
_PLAIN = (Tensor, nn.Parameter)


class Unknown(Exception):
    """A part is gone, or a node does not keep what was asked for."""


def hides_hooks() -> bool:
    """Whether torch does not tell which saved-tensor hooks are active (torch 2.6)."""
    return _top_hooks is None or not _tells_hooks


def active_hook() -> Any:
    """Return the unpack function of the saved-tensor hooks that are active; None if there are none.

    Contexts of hooks are public, but not whether one is active.

    Raises:
        Unknown: if torch does not tell; in checkpoints of torch, where hooks of another kind are
            active as the forward pass is repeated, which must save as many tensors.
    """
    if hides_hooks():
        raise Unknown
    hooks = _top_hooks(True)
    if hooks is None:
        return None
    if getattr(hooks[1], "__module__", None) == "torch.utils.checkpoint":
        raise Unknown
    return hooks[1]


def kept_by(node: Any, name: str) -> Tensor | None:
    """Return the tensor that a node keeps under a name, or None if it keeps none.

    What hooks packed is not unpacked: that may take long, and gives other memory. If the hooks that
    are active now gave a tensor, that tensor is returned: they will give one for it as well.

    Raises:
        Unknown: if the node has no such tensor, or keeps it no longer or in another way.
    """
    raw = getattr(node, f"_raw_saved_{name}", None)
    try:
        if raw is None:
            raise Unknown
        tensor = getattr(node, f"_saved_{name}") if raw.unpack_hook is None else raw.data
        if tensor is not None and raw.unpack_hook is not active_hook():
            raise Unknown
    except (AttributeError, RuntimeError) as error:  # gone; freed, or written since
        raise Unknown from error
    if tensor is None:
        return None
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_inference():
        raise Unknown
    if tensor.numel() and not tensor.untyped_storage().nbytes():  # FSDP frees memory of weights
        raise Unknown
    kept: Tensor = tensor if raw.unpack_hook is None else tensor.detach()
    return kept


def saved_by(root: Any) -> Iterator[Tensor]:
    """Yield all tensors that the nodes of a graph keep.

    The public way, hooks on what is saved, would change it: gift does not recompute inputs then.

    Args:
        root: the ``grad_fn`` of the graph's output.
    """
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in [*saved, getattr(node, "saved_tensors", ())]:
            several = value if isinstance(value, list | tuple) else [value]
            yield from (tensor for tensor in several if isinstance(tensor, Tensor))


def bytes_kept_by(root: Any, besides: Iterable[Tensor]) -> int:
    """Return the size of all storages that a graph keeps, but for those of some tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in besides}
    storages = (tensor.untyped_storage() for tensor in saved_by(root))
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for place, size in sizes.items() if place not in own)


def argument(node: Any, name: str) -> Any:
    """Return an argument of the operation that made a node: numbers or a text.

    Raises:
        Unknown: if the node has none of that name.
    """
    try:
        value = getattr(node, f"_saved_{name}")
    except (AttributeError, RuntimeError) as error:
        raise Unknown from error
    return tuple(map(_signed, value)) if isinstance(value, list | tuple) else _signed(value)


def _signed(number: Any) -> Any:
    """Axes that count from the end come as unsigned numbers of 64 bits."""
    return number - 2**64 if type(number) is int and number >= 2**63 else number


def output_of(node: Any, number: int) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """Return shape, dtype and device of an output of the operation that made a node.

    Raises:
        Unknown: if the node does not tell.
    """
    try:
        facts = node._input_metadata[number]
        return tuple(facts.shape), facts.dtype, facts.device
    except (AttributeError, IndexError, RuntimeError) as error:
        raise Unknown from error


def number_of(node: Any) -> int:
    """Return a number that no other node made by this thread has.

    Raises:
        Unknown: if the node does not tell.
    """
    try:
        number: int = node._sequence_nr()
    except AttributeError as error:
        raise Unknown from error
    return number
