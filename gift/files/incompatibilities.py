"""Checking whether a file fits a network."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.forwards import forward_method_of
from gift.core.state import whole_state
from gift.errors import some
from gift.files.description import describe_deltas
from gift.files.digests import digest
from gift.files.inspection import DeltaFile
from gift.files.saving import fingerprint, split, without_rows
from gift.methods import method_of
from gift.quantization import packed_names, tells_packing
from gift.strategies.resolved import PLACES
from gift.support.tensors import dtype_name, is_finite


def incompatibilities(
    network: Any, present: Mapping[str, Tensor], file: DeltaFile, check_base: bool
) -> Iterator[str]:
    """Yield the differences in settings and tensors between a file and a fine-tuned network.

    `network` may be on the meta device; `present` are the tensors that have values.
    """
    yield from _other_settings(network, file)
    state, parts, given = tensors_of(network), split(network), {*file.tensors, *file.aliases}
    # A buffer that training did not change may be part of the base in one file and not in another.
    buffers = {*parts.buffers} & {*file.base}
    if missing := sorted({*parts.saved} - buffers - given):
        yield f"it lacks {len(missing)} tensors that are trained here: {missing}"
    records = set() if check_base else packed_names(state)[1]  # its base may not be quantised
    if more := sorted({*parts.base} - {*file.base} - given - records):
        yield f"here are {len(more)} tensors that its base does not have: {more}"
    possible = {*parts.saved, *(name for name in file.buffers if name in state)}
    if unexpected := sorted(given - possible):
        yield f"it has {len(unexpected)} tensors that are not trained here: {unexpected}"
    for name in sorted(given & possible):
        value = file.tensors.get(file.aliases.get(name, name))
        if value is None:
            yield f"{name} is tied to {file.aliases[name]}, which it lacks"
            continue
        own = state[name]
        if is_lazy(own):
            continue  # reported by `other_base`
        if value.shape != own.shape:
            yield f"{name} is {tuple(value.shape)}, here it is {tuple(own.shape)}"
        elif value.dtype != own.dtype and (
            check_base or not torch.can_cast(value.dtype, own.dtype)
        ):
            yield f"{name} is {value.dtype}, here it is {own.dtype}"
        if not is_finite(value) and not _is_same_buffer(name, value, present, file):
            yield f"{name} has numbers that are not finite"


def _is_same_buffer(
    name: str, value: Tensor, present: Mapping[str, Tensor], file: DeltaFile
) -> bool:  # fmt: skip
    """Whether a buffer of the file has the same values here, as a mask does."""
    return name in file.buffers and name in present and digest(value) == digest(present[name])


def _other_settings(network: nn.Module, file: DeltaFile) -> Iterator[str]:
    try:
        there, under = _meanings(file.deltas), _meanings(file.below)
    except Exception as error:  # a file may contain anything
        yield f"its deltas are of a method that is not known here: {in_a_line(error)}"
        return
    if under != (present := _meanings(describe_deltas(network, of_base=True))):
        have, want = (some(sorted(names)) if names else "none" for names in (present, under))
        yield (
            f"it was trained on top of frozen deltas that are not those here: on {want}, here on "
            f"{have} (load those first, then this with stack=True)"
        )
    here = _meanings(describe_deltas(network))
    for name in sorted({*here, *there}):
        mine, other = here.get(name), there.get(name)
        if mine is None:
            yield f"it changes {name} by {other}, here that is not fine-tuned"
        elif other is None:
            yield f"it does not change {name}, which is fine-tuned here by {mine}"
        elif mine != other:
            yield f"it changes {name} by {other}, here by {mine}"


def _meanings(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the method, and the settings that affect outputs, of each adapted place."""
    meanings: dict[str, dict[str, Any]] = {}
    for group in groups:
        if "call" in group:
            method: Any = forward_method_of(group["call"], group["settings"])
            named = {"call": group["call"]}
        else:
            method = method_of(group["method"], group["settings"])
            named = {"method": group["method"]}
        for kind in PLACES:
            for name, shape in group.get(kind, {}).items():
                meanings[name] = (
                    named | method.compat_settings | ({} if shape is None else {"matrix": shape})
                )
    return meanings


def other_base(
    state: Mapping[str, Tensor], file: DeltaFile, check_base: bool
) -> Iterator[str]:  # fmt: skip
    """Yield the differences between this base and the one that the delta was trained for."""
    empty = [name for name, tensor in state.items() if is_lazy(tensor) or tensor.is_meta]
    if empty:
        yield f"{len(empty)} tensors have no values here yet: {some(empty)}"
        return
    own = {name: state[name] for name in file.base if name in state}
    there, those = packed_names(file.base)
    packed_here, _ = packed_names(state)
    # Without `check_base`, the delta of a quantised base fits one that is not quantised, and back.
    other_format = set() if check_base else there ^ packed_here
    records = set() if check_base else those
    if missing := [name for name in file.base if name not in own and name not in records]:
        yield f"its base has {len(missing)} tensors that this one lacks: {missing}"
    known = {
        name: without_rows(tensor, file.replaced.get(name, []))
        for name, tensor in own.items()
        if file.base[name][2] is not None
    }
    here = fingerprint(known, check_base)
    dtypes, values, packed = list[str](), list[str](), list[str]()
    for name, tensor in own.items():
        dtype, shape, digested = file.base[name]
        if tells_packing(name) and list(tensor.shape) != shape:
            packed += [name] * check_base
        elif list(tensor.shape) != shape and name not in other_format:
            yield f"{name} of its base is {tuple(shape)}, here it is {tuple(tensor.shape)}"
        elif not check_base:
            continue
        elif dtype != dtype_name(tensor.dtype):
            dtypes.append(f"{name} ({dtype}, here {dtype_name(tensor.dtype)})")
        elif digested and here[name][2] and digested != here[name][2]:
            values.append(name)
    yield from _described_base(len(file.base), dtypes, values, packed)


def _described_base(
    total: int, dtypes: list[str], values: list[str], packed: list[str]
) -> Iterator[str]:  # fmt: skip
    if packed:
        yield (
            f"{len(packed)} weights of its base are packed in another order, as bitsandbytes does "
            "in its first inference on a CPU: load before that, or with check_base=False"
        )
    if dtypes:
        yield f"{len(dtypes)} tensors of its base have another dtype: {some(dtypes)}"
    if values:
        yield (
            f"{len(values)} of {total} tensors of its base have other values, so it was trained "
            f"for another base: {some(values)} (check_base=False accepts it anyway)"
        )


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Return all tensors in the state of a network, including frozen ones."""
    state = whole_state(net)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def in_a_line(error: Exception) -> str:
    """Format an error for a list of problems."""
    return f"{type(error).__name__}: {error}".replace("\n", "\n    ")
