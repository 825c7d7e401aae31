"""Which examples a run learns from, so that a resumed run can tell what changed."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset, TensorDataset

from gift.data.examples import Examples
from gift.data.reading import ReadDataset
from gift.errors import TrainingError, some
from gift.files.digests import digests
from gift.support.atomic_files import write_text
from gift.support.progress import slow

FILE = "examples.json"
KEYS = ("number of examples", "digests of examples")
"""Entries of the identity of a run that describe its examples."""

MOST_NAMES = 100_000
"""Number of examples above which they are counted, but not named, when they change."""


def names_of(data: Any) -> dict[str, str] | None:
    """Return a name for each example, and a digest of what is known without reading it.

    A file is named by its path below the folder that all have in common, so that a folder may be
    moved. Its digest is that of its size and label; that of a text is made of the text.

    Args:
        data: `Examples`.

    Returns:
        None if the examples have no source of files or texts.
    """
    items = _items(data.dataset) if isinstance(data, Examples) else None
    if items is None:
        return None
    listed = [*slow(items, "looking for changes", len(data))]
    paths = [raw for raw, _ in listed if _is_file(raw)]
    common = os.path.commonpath([os.path.dirname(p) for p in paths]) if paths else ""
    found: dict[str, str] = {}
    for raw, label in listed:
        if _is_file(raw):
            name, content = os.path.relpath(raw, common), f"{os.stat(raw).st_size} {label!r}"
        else:
            name, content = str(raw), f"{raw!r} {label!r}"
        name = name if len(name) <= 200 else f"{name[:160]}... {_hashed(name)}"
        while name in found:  # texts may stand there twice
            name += " (again)"
        found[name] = _hashed(content)
    return found


def _items(dataset: Any) -> Iterator[tuple[Any, Any]] | None:
    """Iterate over the pairs of input and label behind a dataset, None if there are none."""
    places: Sequence[int] | None = None
    while isinstance(dataset, Subset):
        inner = dataset.indices
        places = inner if places is None else [inner[place] for place in places]
        dataset = dataset.dataset
    source = dataset.source if isinstance(dataset, ReadDataset) else None
    if not isinstance(source, list | tuple):
        return None
    if not source or not all(isinstance(part, str | os.PathLike | tuple) for part in source[0][:1]):
        return None  # objects, such as images of PIL
    return (source[place] for place in (range(len(source)) if places is None else places))


def _is_file(raw: Any) -> bool:
    return isinstance(raw, str | os.PathLike) and os.path.isfile(raw)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def digest_of(data: Any, names: dict[str, str] | None) -> str:
    """Return a digest of all examples in their order; "" if only their number is known."""
    if names is not None:
        return _hashed(json.dumps(list(names.items())))
    if isinstance(data, Examples) and isinstance(data.dataset, TensorDataset):
        tensors = {str(place): tensor for place, tensor in enumerate(data.dataset.tensors)}
        return _hashed(json.dumps(digests(tensors)))
    return ""


class DataNames:
    """The names of the training and validation examples of a run, and of what changed in them.

    Args:
        parts: for "training" and "validation" the examples, or None.
    """

    def __init__(self, parts: dict[str, Any]) -> None:
        self.names = {what: names_of(data) for what, data in parts.items()}
        self.digests = [digest_of(data, self.names[what]) for what, data in parts.items()]
        self.numbers = [0 if data is None else len(data) for data in parts.values()]

    def write(self, folder: Path) -> None:
        """Write the names into the folder of the run."""
        kept = {w: n for w, n in self.names.items() if n is not None and len(n) <= MOST_NAMES}
        write_text(folder / FILE, json.dumps(kept, ensure_ascii=False, indent=0) + "\n")

    def changes(self, folder: Path | None, state: dict[str, Any] | None) -> list[str]:
        """Say what changed since a checkpoint was written.

        Args:
            folder: folder of the run.
            state: the checkpoint; None if there is none.
        """
        if folder is None or state is None:
            return []
        then = state["identity"]
        numbers, known = (then.get(key) for key in KEYS)
        if known is None:  # an older version wrote it
            known = self.digests
        before = _read(folder / FILE)
        found = []
        for place, (what, names) in enumerate(self.names.items()):
            if numbers[place] != self.numbers[place] or known[place] != self.digests[place]:
                then_count, now_count = numbers[place], self.numbers[place]
                text = f"there were {then_count:,} {what} examples, there are now {now_count:,}"
                if then_count == now_count:
                    text = f"some of the {now_count:,} {what} examples are other ones"
                found.append(text + _differences(before.get(what), names))
        return found


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        found: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def _differences(before: dict[str, str] | None, now: dict[str, str] | None) -> str:
    if before is None or now is None:
        return ""
    parts = {
        "gone": [name for name in before if name not in now],
        "new": [name for name in now if name not in before],
        "changed": [name for name in now if name in before and before[name] != now[name]],
    }
    texts = [f"{len(n):,} {what} ({some(n, 3)})" for what, n in parts.items() if n]
    return ": " + ", ".join(texts or ["the same ones in another order"])


def refuse_changes(changes: list[str]) -> None:
    """Raise an error about changed examples.

    Raises:
        TrainingError: if there are changes.
    """
    if changes:
        raise TrainingError(
            "the examples are not those of the run: "
            + "; ".join(changes)
            + ". To go on with them all the same: accept_changed_data=True, --accept-changed-data; "
            "to start over: restart=True, --restart"
        )
