"""Examples that cannot be read are left out, if the settings allow it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset

from gift.data.examples import Examples
from gift.errors import DataError, TrainingError
from gift.support.atomic_files import write_text
from gift.support.progress import slow
from gift.training.randomness import kept_random

FILE = "damaged.txt"
_UNREADABLE = (DataError, OSError, EOFError)


class _Tried(Dataset[str]):
    """For each example why it cannot be read, or "".

    Args:
        dataset: the examples.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> str:
        try:
            self.dataset[place]
        except _UNREADABLE as error:
            return " ".join(str(error).split()) or type(error).__name__
        return ""


def readable(examples: Any, what: str, workers: int = 0) -> tuple[Any, list[str]]:
    """Read each example once, and leave out those that cannot be read.

    So a run learns from the same batches as one from whose examples the damaged ones were removed.

    Args:
        examples: `Examples`.
        what: what they are, for errors.
        workers: number of processes that read.

    Returns:
        The examples that can be read, and a reason for each of the others.

    Raises:
        TrainingError: if none can be read, or the examples come from a data loader.
    """
    if not isinstance(examples, Examples):
        raise TrainingError(f"skip_damaged needs a data set, {what} come from a data loader")
    tried = _Tried(_plain(examples.dataset))
    loader: DataLoader[Any] = DataLoader(tried, 64, num_workers=workers, collate_fn=list)
    with kept_random(None):
        reasons = [r for part in slow(loader, f"reading {what}", len(loader)) for r in part]
    good = [place for place, reason in enumerate(reasons) if not reason]
    if len(good) == len(reasons):
        return examples, []
    damaged = [f"example {place}: {reason}" for place, reason in enumerate(reasons) if reason]
    if not good:
        raise TrainingError(f"none of {what} can be read, the first one: {damaged[0]}")
    return examples.part(good), damaged


def _plain(dataset: Any) -> Any:
    """Return the dataset without random augmentation, which takes time and changes nothing here."""
    if isinstance(dataset, Subset):
        return Subset(_plain(dataset.dataset), dataset.indices)
    return getattr(dataset, "plain", lambda: dataset)()


def write_damaged(folder: Path, damaged: Sequence[str]) -> None:
    """List the examples that were left out in a file, or remove an earlier list."""
    if damaged:
        write_text(folder / FILE, "".join(f"{line}\n" for line in damaged))
    else:
        (folder / FILE).unlink(missing_ok=True)
