"""Inspecting a file without a network."""

import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from tabulate import tabulate
from torch import Tensor

from gift.errors import DeltaFileError, refuse, some
from gift.files.container import read
from gift.strategies.resolved import PLACES
from gift.support.tensors import dtype_name


@dataclass(frozen=True)
class DeltaFile:
    """The content of a file that `gift.save` wrote; it prints as tables.

    Args:
        path: path of the file.
        network: class of the network.
        strategy: the strategy as plain data, or None if only code can create it.
        strategy_text: description of the strategy.
        reason: reason why there is no strategy.
        deltas: what each method with its settings changes, see `ResolvedStrategy`.
        trained: names of the base parameters that are trained directly.
        buffers: names of the network's buffers that training changed.
        inputs: the task, the class names and how inputs are read, as far as recorded.
        base: dtype, shape and digest of each tensor that is not in the file.
        replaced: rows of tensors of the base that the delta replaces, whose values may differ.
        below: what frozen deltas of the base change, on top of which the delta was trained.
        aliases: names of tied tensors, mapped to the name under which the tensor is stored.
        versions: versions of gift and torch.
        tensors: the tensors by name.
    """

    path: str
    network: str
    strategy: dict[str, Any] | None
    strategy_text: str
    reason: str
    deltas: list[dict[str, Any]]
    trained: list[str]
    buffers: list[str]
    inputs: dict[str, Any]
    base: dict[str, list[Any]]
    replaced: dict[str, list[int]]
    below: list[dict[str, Any]]
    aliases: dict[str, str]
    versions: dict[str, str]
    tensors: dict[str, Tensor] = field(repr=False)

    def places(self) -> Iterator[tuple[str, str, dict[str, Any], list[int] | None]]:
        """Yield each change: name, method or call, settings, and shape as a matrix."""
        for group in self.deltas:
            for kind in PLACES:
                for name, shape in group.get(kind, {}).items():
                    yield name, group.get("method") or group["call"], group["settings"], shape

    @property
    def parameters(self) -> int:
        """The number of elements in the file."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def bytes(self) -> int:
        """The size of the tensors in the file."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def summary(self) -> str:
        """Summarize the file in a few lines."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        rows = [
            ("network", self.network),
            ("strategy", self.strategy_text),
            ("can be loaded onto the base", "yes" if self.strategy else f"no: {self.reason}"),
            ("tensors", f"{len(self.tensors)}, {self.parameters:,} numbers, {self.bytes:,} bytes"),
            ("trained as they are", some(self.trained, limit=4) or "-"),
            ("buffers that training changed", some(self.buffers, limit=4) or "-"),
            ("classes", some(self.inputs["classes"] or [], limit=4) or "-"),
            ("base", f"{len(self.base)} tensors, by name, shape, dtype{self._digested}"),
            *([("on top of", "frozen deltas of the base")] if self.below else []),
            ("written by", versions),
        ]
        return _printable(f"{self.path}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}")

    @property
    def _digested(self) -> str:
        known = any(digested for *_, digested in self.base.values())
        return " and digest" if known else "; other values are not told apart, without digests"

    def details(self, limit: int | None = None) -> str:
        """List each change with its method and settings, then the tensors, up to a limit."""
        changed = [
            (name, method, "x".join(map(str, shape or ())), _settings(settings))
            for name, method, settings, shape in self.places()
        ]
        tensors = [(n, "x".join(map(str, t.shape)), dtype_name(t.dtype))
                   for n, t in self.tensors.items()]  # fmt: skip
        parts = [
            _table(changed, ["changed", "by", "as matrix", "settings"], limit),
            _table(tensors, ["tensor", "shape", "dtype"], limit),
        ]
        return _printable("\n\n".join(part for part in parts if part))

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        return f"{self.summary()}\n\n{self.details(limit=20)}"


def _printable(text: str) -> str:
    """Escape control characters, which a terminal would interpret."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)


def _table(rows: list[Any], header: list[str], limit: int | None) -> str:
    if not rows:
        return ""
    table = tabulate(rows[:limit], headers=header, disable_numparse=True)
    more = len(rows) - len(rows[:limit])
    return table + (f"\n... and {more} more" if more else "")


def inspect(path: str | os.PathLike[str]) -> DeltaFile:
    """Inspect a file of `gift.save`, without a network and without running anything from the file.

    Args:
        path: path of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        DeltaFileError: if it is not a file of gift, is damaged, or has a newer format.

    Example:
        >>> import gift, tempfile
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = gift.enable_fine_tuning(net, gift.strategies.LoRAAllFineTuningStrategy())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gift.save(net, f"{folder}/task.safetensors")
        ...     file = gift.inspect(f"{folder}/task.safetensors")
        >>> file.parameters, [name for name, *_ in file.places()]
        (606, ['0.weight', '2.weight'])
    """
    header, tensors = read(path)
    header = {"below": [], "replaced": {}} | header  # older files have neither
    problems = list(_nonsense(header))
    refuse(DeltaFileError, f"{path} cannot be read", problems)
    values = {name: header[name] for name, _ in _FIELDS}
    return DeltaFile(path=str(path), tensors=tensors, **values)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_names(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_group(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("settings"), dict):
        return False
    places = [value.get(kind, {}) for kind in PLACES]
    names = [value[key] for key in ("method", "call") if key in value]
    named = len(names) == 1 and _is_text(names[0]) and names[0]
    return bool(named) and all(isinstance(place, dict) for place in places) and all(
        shape is None or _is_shape(shape)
        for place in places
        for shape in place.values()
    )  # fmt: skip


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) for n in value)


def _is_rows(value: object) -> bool:
    return _is_shape(value) and all(type(n) is int and n >= 0 for n in value)  # type: ignore[attr-defined]


def _is_note(value: object) -> bool:
    if not isinstance(value, dict) or set(value) - {"details"} != {"task", "classes", "reader"}:
        return False
    if not isinstance(value.get("details", {}), dict):
        return False
    known = value["classes"] is None or _is_texts(value["classes"])
    return known and _is_text(value["task"]) and isinstance(value["reader"], dict | None)


def _is_fingerprint(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, list) and len(entry) == 3 and _is_text(entry[0])
        and _is_shape(entry[1]) and (entry[2] is None or _is_text(entry[2]))
        for entry in value.values()
    )  # fmt: skip


_FIELDS = (
    ("network", _is_text),
    ("strategy", lambda value: value is None or isinstance(value, dict)),
    ("strategy_text", _is_text),
    ("reason", _is_text),
    ("deltas", lambda value: isinstance(value, list) and all(map(_is_group, value))),
    ("trained", _is_texts),
    ("buffers", _is_texts),
    ("inputs", _is_note),
    ("base", _is_fingerprint),
    ("replaced", lambda value: isinstance(value, dict) and all(map(_is_rows, value.values()))),
    ("below", lambda value: isinstance(value, list) and all(map(_is_group, value))),
    ("aliases", _is_names),
    ("versions", _is_names),
)


def _nonsense(header: Mapping[str, Any]) -> Iterator[str]:
    for name, check in _FIELDS:
        if name not in header:
            yield f"its header does not say {name!r}"
        elif not check(header[name]):
            yield f"its header has a {name!r} that makes no sense: {reprlib.repr(header[name])}"
