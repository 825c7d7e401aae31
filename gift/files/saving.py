"""Saving the delta of a network to a file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.dynamic_class import joined
from gift.core.io_spec import io_spec_of
from gift.core.record import fine_tuned_part, record_of
from gift.core.state import whole_state
from gift.core.trained import delta_names, frozen_names, trained_of_the_base, trained_tensors
from gift.core.unfreeze import unfreezable_problems
from gift.core.weights.record import present_weight_deltas
from gift.errors import DeltaFileError, refuse
from gift.files.container import write
from gift.files.description import describe_deltas, names_regex, resolve
from gift.files.digests import digest, digests
from gift.quantization import is_quantised, quant_state_names
from gift.support.sharding import is_sharded, whole
from gift.support.tensors import dtype_name, is_finite
from gift.version import __version__

_NOT_SAVED = "the network cannot be saved, nothing was written"


def save(net: nn.Module, path: str | os.PathLike[str], digest_base: bool = True) -> None:
    """Save the result of fine-tuning a network to one safetensors file.

    The file has the trained tensors and the buffers that training changed. It has the strategy by
    its registered names or, if it has lambdas, in resolved form, and the method and settings of
    each tensor. It records how inputs are read and what the classes are, if known. Of the base it
    has names, shapes, dtypes and digests, so that `gift.load` can detect another base.
    Frozen deltas under the trained one (``stack=True``) belong to the base: load them first. It is
    written next to `path`, flushed to disk and renamed, so that `path` always holds the old file
    or the new one.

    Args:
        net: a network that is being fine-tuned, or a module that wraps or contains one (DDP, a
            compiled network, a bigger module). If it is sharded, all processes must call this, and
            the first one writes.
        path: path of the file, usually ``.safetensors``; its folder is created if necessary.
        digest_base: hash the values of the base, which takes about a second per gigabyte and core.
            Without digests, another base with the same names, shapes and dtypes cannot be
            detected.

    Raises:
        RuntimeError: if nothing in `net` is being fine-tuned.
        DeltaFileError: if trained values are not finite, if a tensor that a delta was derived from
            is trained as well (which `gift.load` would refuse), or if the state of the network has
            entries that a safetensors file cannot hold. Nothing is written then.

    Example:
        >>> import gift, tempfile, torch
        >>> from torch import nn
        >>> net, fresh = nn.Linear(64, 10), nn.Linear(64, 10)
        >>> _ = fresh.load_state_dict(net.state_dict())  # the same base
        >>> report = gift.enable_fine_tuning(net, gift.strategies.LoRAAllFineTuningStrategy())
        >>> _ = nn.init.normal_(net.lora_B)  # in the place of training
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gift.save(net, f"{folder}/task.safetensors")
        ...     report = gift.load(fresh, f"{folder}/task.safetensors")
        >>> torch.equal(fresh.weight, net.weight)
        True
    """
    network = fine_tuned_part(net)
    parts = split(network)
    refuse(
        DeltaFileError,
        _NOT_SAVED,
        (
            f"{name} is a {type(value).__name__}, which no safetensors file can hold"
            for name, value in parts.foreign.items()
        ),
    )
    refuse(
        DeltaFileError,
        _NOT_SAVED,
        (
            f"{name} is trained, but is not in the network's state under its own name"
            for name in trained_tensors(network)
            if name not in parts.saved
        ),
    )
    lazy = [name for name, tensor in parts.base.items() if is_lazy(tensor)]
    empty = [name for name, tensor in parts.saved.items() if is_lazy(tensor) or tensor.is_meta]
    refuse(DeltaFileError, _NOT_SAVED, [f"{name} has no values yet" for name in (*lazy, *empty)])
    trained = [p for _, p in trained_of_the_base(network)]
    refuse(DeltaFileError, _NOT_SAVED, unfreezable_problems(network, trained))
    sharded = any(is_sharded(t) for t in (*parts.saved.values(), *parts.base.values()))
    saved, aliases = _once(network, parts.saved)
    own = {name: whole(tensor) for name, tensor in saved.items()}
    keeps_base = record_of(network).keeps_base  # otherwise a buffer may always have been so
    refuse(
        DeltaFileError,
        _NOT_SAVED,
        (
            f"{name} has numbers that are not finite: training diverged"
            for name, tensor in own.items()
            if (keeps_base or name not in parts.buffers) and not is_finite(tensor)
        ),
    )
    header = _describe(network, parts, digest_base) | {"aliases": aliases}
    (_write_in_one_process if sharded else write)(path, header, own)


def _write_in_one_process(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write in the first process, and tell all whether it failed, so that none waits forever."""
    failed: list[str | None] = [None]
    try:
        if torch.distributed.get_rank() == 0:
            write(path, header, tensors)
    except BaseException as error:  # raised again below
        failed = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        torch.distributed.broadcast_object_list(failed)
    if failed[0] is not None:
        raise OSError(f"the first process could not write the file: {failed[0]}")


@dataclass(frozen=True)
class Parts:
    """The state of a fine-tuned network, in parts.

    Args:
        saved: trained tensors, and buffers that training changed.
        base: all other tensors, of which a file only has fingerprints.
        buffers: names of the buffers of the base that are in `saved`.
        foreign: entries that are not tensors.
    """

    saved: dict[str, Tensor]
    base: dict[str, Tensor]
    buffers: list[str]
    foreign: dict[str, Any]


def split(network: Any) -> Parts:
    """Split the state of a fine-tuned network."""
    state = whole_state(network)
    foreign = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    tensors = {name: value for name, value in state.items() if name not in foreign}
    still = {
        name
        for name, value in buffers_of_the_base(network).items()
        if name in tensors and digest(tensors[name]) == digest(value)
    }
    frozen = {*frozen_names(network), *quant_state_names(network)}
    saved = {n: t for n, t in tensors.items() if n not in frozen and n not in still}
    own = {
        *delta_names(network),
        *(name for name, _ in network.named_parameters(remove_duplicate=False)),
    }
    return Parts(
        saved=saved,
        base={name: tensor for name, tensor in tensors.items() if name not in saved},
        buffers=[name for name in saved if name not in own],
        foreign=foreign,
    )


def buffers_of_the_base(network: Any) -> dict[str, Tensor]:
    """Return the buffers as they were when fine-tuning was enabled, as far as they were kept."""
    record = record_of(network)
    kept = {id(m._buffers.get(name)): value for m, name, value in record.undo.values}
    return {
        name: kept[id(buffer)]
        for name, buffer in network.named_buffers(remove_duplicate=False)
        if id(buffer) in kept and not kept[id(buffer)].is_meta
    }


def _once(network: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor under its first name, and the other names of tied ones."""
    known = {
        name: id(tensor)
        for named in (network.named_parameters, network.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }
    first: dict[Any, str] = {}
    names = {name: first.setdefault(known.get(name, name), name) for name in tensors}
    aliases = {name: own for name, own in names.items() if own != name}
    return {name: tensors[name] for name in names if name not in aliases}, aliases


def _describe(network: Any, parts: Parts, digest_base: bool) -> dict[str, Any]:
    record = record_of(network)
    strategy, reason = record.recipe, ""
    if strategy is None or names_regex(strategy):  # `load` refuses regular expressions
        try:
            strategy = resolve(network).to_config()
        except ValueError as error:
            strategy, reason = None, str(error)
    trained = [name for name, _ in trained_of_the_base(network)]
    replaced = _replaced_rows(network)
    return {
        "network": record.report.network,
        "strategy": strategy,
        "strategy_text": record.report.strategy,
        "reason": reason,
        "deltas": describe_deltas(network),
        "below": describe_deltas(network, of_base=True),
        "trained": trained,
        "buffers": parts.buffers,
        "inputs": io_spec_of(network).to_config(),
        "base": fingerprint(_without(parts.base, replaced), digest_base),
        "replaced": replaced,
        "versions": {"gift": __version__, "torch": str(torch.__version__)},
    }


def _replaced_rows(network: Any) -> dict[str, list[int]]:
    """Return the rows of each frozen tensor that a delta replaces, under every name of it."""
    found: dict[str, list[int]] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        for tensor, delta in present_weight_deltas(module).items():
            rows = list(delta.method.replaced_rows)
            layout = delta.layout
            if layout is None or delta.below is not None or len(layout.matrix) != 2:
                continue
            if rows and layout.is_trivial:
                found[joined(path, tensor)] = rows
    return found


def without_rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Return a tensor with zeros in some of its rows, which no digest then tells apart."""
    if is_quantised(tensor) or is_sharded(tensor) or not (rows and max(rows) < len(tensor)):
        return tensor
    return tensor.detach().index_fill(0, torch.tensor(rows, device=tensor.device), 0)


def _without(tensors: Mapping[str, Tensor], replaced: Mapping[str, list[int]]) -> dict[str, Tensor]:
    return {name: without_rows(t, replaced.get(name, [])) for name, t in tensors.items()}


def fingerprint(tensors: Mapping[str, Tensor], with_digests: bool) -> dict[str, list[Any]]:
    """Return the dtype and shape of each tensor and, if requested, a digest of its bits."""
    known = {name: t for name, t in tensors.items() if with_digests and not t.is_meta}
    made = _digests(known)
    return {
        name: [dtype_name(tensor.dtype), list(tensor.shape), made.get(name)]
        for name, tensor in tensors.items()
    }


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    plain = {name: t for name, t in tensors.items() if not is_sharded(t)}
    made = digests(plain)
    for name, tensor in tensors.items():  # one by one: processes must keep the same order
        if name not in made:
            made[name] = digest(whole(tensor))
    return made
