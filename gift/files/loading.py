"""Loading the delta in a file onto a network, completely or not at all."""

import os
import warnings
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.delta import held, present_deltas
from gift.core.dynamic_class import joined, spec_of
from gift.core.io_spec import IOSpec, load_io_spec
from gift.core.record import fine_tuned_part, record_of
from gift.core.report import Report
from gift.core.state import load_own_state, own_state
from gift.core.trained import delta_names, trained_of_the_base
from gift.core.undo.copy_on_write import CopyOnWrite
from gift.core.undo.temporary_state import refuse_meanwhile
from gift.core.unfreeze import hold_frozen, unfreeze
from gift.engine.dry_run import on_meta
from gift.engine.enable import enable_fine_tuning, enabling_trained
from gift.errors import DeltaFileError, GiftWarning, refuse
from gift.files.description import names_regex
from gift.files.incompatibilities import in_a_line, incompatibilities, other_base, tensors_of
from gift.files.inspection import DeltaFile, inspect
from gift.files.saving import buffers_of_the_base
from gift.strategies.base import FineTuningStrategy, load_strategy_from_config
from gift.strategies.classic import new_heads
from gift.support.sharding import distributed_like, is_sharded


def load(
    net: nn.Module,
    path: str | os.PathLike[str],
    check_base: bool = True,
    train: bool = True,
    **options: Any,
) -> Report:
    """Load a delta of `gift.save` onto a network, bit for bit, or leave the network unchanged.

    On a plain base, this enables the strategy that the file names and loads its values. On a
    network that is already being fine-tuned, the settings must match, and its values are replaced.
    No code from the file is run: it can only name registered parts, with plain values. Everything
    is tried on a copy without values (on the meta device) before the network is changed.

    Args:
        net: the base network, or one that is being fine-tuned, or a wrapper of such a network.
        path: path of the file.
        check_base: refuse another base of the same architecture, or with another dtype. Use False
            with care: the delta was trained for the base that the file describes.
        train: whether the delta will be trained. False is for inference: nothing requires
            gradients then, and the delta is still part of ``parameters()`` and ``state_dict()``.
        options: options of `enable_fine_tuning`, for a plain base. ``stack=True`` puts the delta on
            top of that of a network that is being fine-tuned, which then belongs to the base.

    Returns:
        The report of the strategy.

    Raises:
        FileNotFoundError: if there is no such file.
        DeltaFileError: naming everything that does not fit; the network is unchanged.
    """
    file = inspect(path)
    if not isinstance(net, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(net).__name__}")
    spec = _io_spec(file)
    stack = bool(options.get("stack"))
    if any(spec_of(part).network for part in net.modules()) and not stack:
        if options.keys() - {"stack"}:
            raise TypeError(f"{sorted(options)} are for a plain base; this is being fine-tuned")
        report = _load_onto_enabled(fine_tuned_part(net), file, spec, check_base)
        if not train:
            _freeze(fine_tuned_part(net))
        return report
    refuse_meanwhile(net, "merged", "computing rows")
    signature(enable_fine_tuning).bind(net, None, **options)  # not an error of the file
    strategy = _strategy(file)
    refuse(
        DeltaFileError, _UNFIT.format(file.path), _rehearse(net, strategy, file, check_base, stack)
    )
    try:
        with enabling_trained(net, strategy, **options) as report:
            _train_as_there(net, file)
            if check_base:
                _take_dtypes(net, file)
            _load_values(net, file.tensors, file.aliases, new=True)
            load_io_spec(net, spec)
            if not train:
                _freeze(net)
    except Exception as error:  # errors that only show with values or memory
        raise DeltaFileError(_UNFIT.format(file.path), [in_a_line(error)]) from error
    return report


def _freeze(network: nn.Module) -> None:
    hold_frozen(network, record_of(network).chosen)


def _load_onto_enabled(network: Any, file: DeltaFile, spec: IOSpec, check_base: bool) -> Report:
    # Buffers may have changed since. The base in the file is compared with their original values.
    state = tensors_of(network)
    known = buffers_of_the_base(network)
    kept = {name: known[name] for name in known if name in file.base and name in state}
    problems = [
        *incompatibilities(network, state, file, check_base),
        *other_base(state | kept, file, check_base),
    ]
    refuse(DeltaFileError, _UNFIT.format(file.path), problems)
    _load_values(network, kept | file.tensors, file.aliases)
    load_io_spec(network, spec)
    return record_of(network).report


_UNFIT = "{} does not fit this network, which is unchanged"


def _io_spec(file: DeltaFile) -> IOSpec:
    try:
        reader = file.inputs["reader"]
        if reader is not None:
            from gift.data.readers import reader_from_config  # only few files need it

            reader = reader_from_config(reader)
        return IOSpec.from_config(file.inputs, reader)
    except Exception as error:  # a file may contain anything
        problem = f"it does not say how inputs are read: {in_a_line(error)}"
        raise DeltaFileError(f"{file.path} cannot be loaded", [problem]) from error


def _strategy(file: DeltaFile) -> FineTuningStrategy:
    if file.strategy is None:
        problem = (
            f"no file can name its strategy, {file.strategy_text}, as {file.reason}: enable it in "
            "your code, then load the file onto the network"
        )
        raise DeltaFileError(f"{file.path} cannot be loaded onto a plain base", [problem])
    try:
        strategy = load_strategy_from_config(file.strategy)
        problems = list(_hazards(file, strategy))
    except Exception as error:  # a file may contain anything
        problem = f"its strategy is not known here: {in_a_line(error)}"
        raise DeltaFileError(f"{file.path} cannot be loaded", [problem]) from error
    refuse(DeltaFileError, f"{file.path} cannot be loaded", problems)
    return strategy


def _hazards(file: DeltaFile, strategy: FineTuningStrategy) -> Iterator[str]:
    """Yield what could take unbounded time or memory before the tensors are compared."""
    if strategy.dry_run:
        yield f"its strategy, a {type(strategy).__name__}, changes nothing"
    if names_regex(file.strategy):
        yield "its strategy has regular expressions, which are not run from a file"
    sizes = (size for tensor in file.tensors.values() for size in tensor.shape)
    most = max([2**16, *sizes])
    for classes in new_heads(strategy):
        if classes > most:  # networks keep a name for each class
            yield f"its strategy makes a head of {classes} classes, it has none so large"


def _rehearse(
    net: nn.Module,
    strategy: FineTuningStrategy,
    file: DeltaFile,
    check_base: bool,
    stack: bool,
) -> list[str]:
    """Return everything that does not fit, found on a copy of the base on the meta device."""
    state = tensors_of(net)
    base = list(other_base(state, file, check_base))
    twin = on_meta(net)
    try:
        # Tensors that a malicious strategy creates take no memory either.
        with torch.device("meta"), torch.random.fork_rng([]), warnings.catch_warnings():
            warnings.simplefilter("ignore", GiftWarning)
            enable_fine_tuning(twin, strategy, stack=stack)
        _train_as_there(twin, file)
        if check_base:
            _take_dtypes(twin, file)
    except Exception as error:  # a file may contain anything
        return [f"its strategy cannot be applied here: {in_a_line(error)}", *base]
    return [
        *incompatibilities(twin, state, file, check_base),
        *(base or _too_much(net, twin, file)),
    ]


def _train_as_there(network: nn.Module, file: DeltaFile) -> None:
    """Train base parameters that a schedule had unfrozen although the strategy froze them."""
    own = dict(network.named_parameters()).keys() - delta_names(network)
    known = {name for name, _ in trained_of_the_base(network)}
    unfreeze(network, [n for n in file.trained if n in own and n not in known])


def _take_dtypes(network: nn.Module, file: DeltaFile) -> None:
    """Cast deltas to the dtype of those in the file: ``half()`` may have been called on them."""
    for path, module in network.named_modules():
        for delta in present_deltas(module).values():
            own = list(delta.names.values()) if delta.owner is None else []
            saved = [file.tensors[joined(path, n)] for n in own if joined(path, n) in file.tensors]
            dtypes = {tensor.dtype for tensor in saved if tensor.is_floating_point()}
            if len(dtypes) == 1:
                _cast(module, own, dtypes.pop())


def _cast(module: nn.Module, names: list[str], dtype: torch.dtype) -> None:
    for name in names:
        tensor = held(module, name)[name]
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            continue
        if isinstance(tensor, nn.Parameter):
            tensor.data = tensor.data.to(dtype)
        else:  # a buffer, which may be shared by other layers
            module._buffers[name] = tensor.to(dtype)


def _too_much(net: nn.Module, twin: nn.Module, file: DeltaFile) -> Iterator[str]:
    """Yield a problem if deltas that are not in the file but drawn anew would be too large."""
    deltas = delta_names(twin)
    drawn = sum(b.numel() for n, b in twin.named_buffers() if n in deltas and n not in file.tensors)
    known = sum(parameter.numel() for parameter in net.parameters()) + file.parameters
    if drawn > max(2**28, 64 * known):
        yield f"its deltas need {drawn:,} more numbers, where network and file have {known:,}"


def _load_values(
    network: Any,
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str] | None = None,
    new: bool = False,
) -> None:
    """Load values into a fine-tuned network, all or none; other tensors stay unchanged.

    Args:
        network: the network.
        tensors: values by name.
        aliases: further names, mapped to the names of their values.
        new: whether the deltas are new, so that their values need not be restored on an error.
    """
    state = own_state(network)
    own = {**tensors, **{name: tensors[first] for name, first in (aliases or {}).items()}}
    worthless = delta_names(network) if new else set()
    kept = CopyOnWrite(t for n, t in state.items() if n not in worthless and not is_sharded(t))
    for name, value in own.items():
        if is_sharded(state[name]):
            value = distributed_like(value, state[name])
        state[name] = value
    try:
        with kept:
            load_own_state(network, state)
    except BaseException:  # raised again below
        kept.restore()
        raise
