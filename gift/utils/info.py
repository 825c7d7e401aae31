"""What is trainable in a network, as rows, tables and summaries."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate
from torch import nn
from torch.nn.parameter import is_lazy

from gift.claims import size_of
from gift.generated import spec_of
from gift.network import named_trainable

ROW_HEADER = ("index", "name", "shape", "count")


def collect_trainable_parameters(net: nn.Module) -> tuple[list[list[Any]], int]:
    """The trainable parameters of any network, fine-tuned or not.

    Returns:
        Rows of ``[index, name, shape, count]`` in the order of the network, and the total count.
        A lazy parameter has no shape and counts as zero.

    Example:
        >>> from torch import nn
        >>> from gift.utils.info import collect_trainable_parameters
        >>> collect_trainable_parameters(nn.Linear(3, 2))
        ([[0, 'weight', [2, 3], 6], [1, 'bias', [2], 2]], 8)
    """
    rows: list[list[Any]] = []
    for index, (name, parameter) in enumerate(named_trainable(net)):
        shape = None if is_lazy(parameter) else list(parameter.shape)
        rows.append([index, name, shape, size_of([parameter])])
    return rows, sum(row[3] for row in rows)


def table_info(rows: Sequence[Sequence[Any]], header: Sequence[str] = ROW_HEADER) -> str:
    """Rows as a table.

    Args:
        rows: as from `collect_trainable_parameters`.
        header: one title for each column.

    Example:
        >>> from gift.utils.info import table_info
        >>> print(table_info([[0, "fc.bias", [2], 2]], header=["index", "name", "shape", "count"]))
          index  name     shape      count
        -------  -------  -------  -------
              0  fc.bias  [2]            2
    """
    return tabulate([[_plain(v) for v in row] for row in rows], headers=list(header))


def _plain(value: Any) -> Any:
    return str(list(value)) if isinstance(value, list | tuple) else value


def summary(net: nn.Module) -> str:
    """Trainable and total parameters and their share; for each cap, if `net` is fine-tuned."""
    if spec_of(net).network:
        return net._gift_network.report.summary()  # type: ignore[union-attr,operator]
    total, (_, trainable) = size_of(net.parameters()), collect_trainable_parameters(net)
    share = trainable / total if total else 0
    return (
        f"{type(net).__name__}: {trainable:,} of {total:,} parameters are trainable ({share:.3%})"
    )
