"""Finding examples with non-finite values (nan, inf), and naming them in errors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gift.data.examples import Examples
from gift.errors import some
from gift.private.torch.containers import tree_leaves

_NAMED = ("inputs", "targets")


def rows_not_finite(data: Any) -> list[int]:
    """Return the rows of tensor examples that have non-finite values; for other examples, none."""
    dataset = data.dataset if isinstance(data, Examples) else None
    if not isinstance(dataset, TensorDataset):
        return []
    found = [_rows(tensor) for tensor in dataset.tensors if _may_be_infinite(tensor)]
    return sorted({row for rows in found for row in rows})


def describe_not_finite(batch: Any, places: Sequence[int] | None, number: int = 0) -> str:
    """Describe which examples of a batch have non-finite values; empty if none has.

    Args:
        batch: a batch, as a network and its task take it.
        places: indices of its examples in the data set; None if they are not known.
        number: number of the batch, which is named if `places` are not known.
    """
    texts = []
    for name, value in _parts(batch):
        items = value if isinstance(value, list | tuple) else None
        if items is not None:  # one item for each example, as detectors take them
            rows = [i for i, item in enumerate(items) if any(map(_is_odd, tree_leaves(item)))]
        else:
            rows = _rows(value) if _is_odd(value) else []
        if rows:
            known = places is not None and max(rows) < len(places)
            named = [places[row] for row in rows] if known and places is not None else rows
            shown = some([str(row) for row in named])
            where = "" if known else f" of batch {number}"
            texts.append(f"{name} of example {shown}{where}")
    return f"numbers that are not finite (nan, inf) in {', in '.join(texts)}" if texts else ""


def _parts(batch: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        # additive masks have -inf at masked positions
        yield from ((repr(k), v) for k, v in batch.items() if "mask" not in str(k))
    elif isinstance(batch, list | tuple):
        yield from zip((*_NAMED, *[f"part {n}" for n in range(2, len(batch))]), batch, strict=False)


def _may_be_infinite(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _is_odd(value: Any) -> bool:
    return _may_be_infinite(value) and not bool(torch.isfinite(value).all())


def _rows(tensor: Tensor) -> list[int]:
    if not tensor.dim():
        return []
    fine: Tensor = (
        torch.isfinite(tensor).flatten(1).all(1) if tensor.dim() > 1 else tensor.isfinite()
    )
    return (~fine).nonzero().flatten().tolist()
