"""Batches of examples, in an order that depends only on the seed and the epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from gift.data.examples import Examples
from gift.errors import TrainingError
from gift.private.torch.containers import tree_map
from gift.training.balance import easiest
from gift.training.distributed import Processes


def examples_of(data: Any, task: str | None = None) -> Examples | DataLoader[Any]:
    """Convert the given data to `Examples`; a data loader is returned as it is.

    Args:
        data: `Examples`, a torch dataset, a data loader, a pair of tensors, or a Hugging Face
            dataset.
        task: task of the examples, if they do not specify it themselves.

    Raises:
        TypeError: if it is something else.
        TrainingError: if it has no length, or no examples.
    """
    if isinstance(data, Sequence) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        inputs, targets = data
        if len(inputs) != len(targets):
            raise TrainingError(f"there are {len(inputs)} inputs and {len(targets)} targets")
        data = TensorDataset(inputs, targets)
    if not isinstance(data, Examples | DataLoader):
        if hasattr(data, "with_format"):
            data = data.with_format("torch")
        elif not isinstance(data, Dataset) and not hasattr(data, "__getitem__"):
            raise TypeError(
                f"expected gift.data.Examples, a dataset, a data loader or a pair of tensors, got "
                f"a {type(data).__name__}"
            )
        data = Examples(data, task)
    try:
        number = len(data)
    except TypeError:
        raise TrainingError("the examples have no length, which training must know") from None
    if number == 0:
        raise TrainingError("there are no examples: the data set or loader is empty")
    return data


class Batches:
    """Batches of examples on the device.

    Args:
        data: what `examples_of` returns.
        batch_size: number of examples in a batch, over all processes; a data loader uses its own.
        shuffle: whether to shuffle in each epoch, for training. A last batch with fewer than two
            examples for each process is then merged into the batch before it.
        processes: the processes that take part.
        workers: number of processes that load examples.
        seed: seed of the order.

    Attributes:
        weights: weights with which examples are drawn, with repetition; None draws each once.
        curriculum: difficulty of each example, and the number of epochs until all are drawn; None
            draws from all.

    Raises:
        TrainingError: if a data loader is given while there are several processes.
    """

    def __init__(
        self,
        data: Examples | DataLoader[Any],
        batch_size: int,
        processes: Processes,
        shuffle: bool = False,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        if isinstance(data, DataLoader) and processes.number > 1:
            raise TrainingError(
                "a data loader does not split its data between processes: give its data set instead"
            )
        self.data, self.batch_size, self.processes = data, batch_size, processes
        self.shuffle, self.workers, self.seed = shuffle, workers, seed
        self.weights: Tensor | None = None
        self.curriculum: tuple[Tensor, int] | None = None

    def __len__(self) -> int:
        if isinstance(self.data, DataLoader):
            return len(self.data)
        return len(self._sizes())

    def steps(self, accumulate: int) -> int:
        """Return the number of optimizer steps in an epoch that accumulates this many batches."""
        return -(-len(self) // accumulate)

    def _sizes(self) -> list[int]:
        """Return the size of each batch."""
        assert isinstance(self.data, Examples)
        full, left = divmod(len(self.data), self.batch_size)
        if 0 < left < 2 * self.processes.number and full and self.shuffle:
            # Norm layers cannot learn from a single example.
            return [*[self.batch_size] * (full - 1), self.batch_size + left]
        return [*[self.batch_size] * full, *([left] if left else [])]

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of the data loader, if it has its own."""
        return self.data.generator if isinstance(self.data, DataLoader) else None

    def collated(self, places: list[int]) -> Any:
        """Collate the examples at these indices into a batch."""
        assert isinstance(self.data, Examples)
        return (self.data.collate or default_collate)([self.data.dataset[n] for n in places])

    def places(self, epoch: int = 0) -> list[list[int] | None]:
        """The indices of each batch of an epoch, in the order of `of`; None for a data loader."""
        if isinstance(self.data, DataLoader):
            return [None] * len(self.data)
        return [places for places, _ in self._parts(epoch)[0]]

    def _parts(self, epoch: int) -> tuple[list[tuple[list[int], bool]], torch.Generator]:
        """Return the indices of each batch and whether they count, and a generator for the loader.

        The generator is separate, so that batches depend neither on the global random state nor on
        what a resumed run has already drawn.
        """
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = self._order(epoch, generator) if self.shuffle else torch.arange(len(self.data))
        parts = [self.processes.share(part.tolist()) for part in order.split(self._sizes())]
        return parts, generator

    def _order(self, epoch: int, generator: torch.Generator) -> Tensor:
        """Return as many indices as there are examples, drawn by their weights, easy ones first."""
        number = len(self.data)
        pool = torch.arange(number)
        if self.curriculum is not None:
            difficulty, epochs = self.curriculum
            pool = easiest(difficulty, epoch / epochs)
        if self.weights is not None:
            weights = self.weights[pool]
            return pool[torch.multinomial(weights, number, replacement=True, generator=generator)]
        rounds = [torch.randperm(len(pool), generator=generator)
                  for _ in range(-(-number // len(pool)))]  # fmt: skip
        return pool[torch.cat(rounds)[:number]]

    def of(self, epoch: int = 0) -> Iterator[tuple[Any, bool]]:
        """Iterate over the batches of an epoch, still on the CPU, and whether they count."""
        if isinstance(self.data, DataLoader):
            return ((batch, True) for batch in self.data)
        parts, generator = self._parts(epoch)
        loader: DataLoader[Any] = DataLoader(
            self.data.dataset,
            batch_sampler=[places for places, _ in parts],
            collate_fn=self.data.collate or default_collate,
            num_workers=self.workers,
            pin_memory=self.processes.device.type == "cuda",
            generator=generator,
        )
        return zip(loader, (counts for _, counts in parts), strict=True)

    def on_device(self, batch: Any) -> Any:
        """Move a batch to the device of the network."""
        device = self.processes.device

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        # transformers returns its own kind of dictionary
        return tree_map(move, dict(batch) if hasattr(batch, "keys") else batch)


def windows(batches: Iterator[Any], number: int) -> Iterator[list[Any]]:
    """Group batches into lists of this length; the last list may be shorter."""
    window: list[Any] = []
    for batch in batches:
        window.append(batch)
        if len(window) == number:
            yield window
            window = []
    if window:
        yield window
