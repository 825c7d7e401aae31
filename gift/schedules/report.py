"""The plan of a schedule for a network, as plain data that prints as a table."""

from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class Row:
    """A part of the network.

    Args:
        name: dotted path.
        class_name: class of the module.
        waiting: number of elements of the parameters that are frozen until the part is unfrozen.
        trained: number of elements of the parameters that are trained from the start.
        epoch: epoch in which it is unfrozen; None for never, or if nothing waits.
    """

    name: str
    class_name: str
    waiting: int
    trained: int
    epoch: int | None = None


@dataclass(frozen=True)
class ScheduleReport:
    """The parts of a network, and when each is unfrozen.

    Args:
        schedule: the schedule, with its settings.
        network: class of the network.
        head: modules of the head, which are trained from the start.
        blocks: all other parts, in the order of the network.
        rest: number of elements of parameters outside of head and blocks, if blocks were named;
            they stay frozen.
    """

    schedule: str
    network: str
    head: tuple[Row, ...]
    blocks: tuple[Row, ...]
    rest: int = 0

    def __str__(self) -> str:
        rows = [(*_columns(row), _when(row)) for row in self.blocks]
        rows += [(*_columns(row), "head") for row in self.head]
        if self.rest:
            rows.append(("(what is in none)", "", f"{self.rest:,}", "0", "never"))
        header = ["block", "class", "waits", "trained from the start", "unfrozen"]
        right = ("left", "left", "right", "right", "left")
        table = tabulate(rows, headers=header, disable_numparse=True, colalign=right)
        return f"{self.network} by {self.schedule}\n{table}"


def _columns(row: Row) -> tuple[str, str, str, str]:
    return row.name, row.class_name, f"{row.waiting:,}", f"{row.trained:,}"


def _when(row: Row) -> str:
    if not row.waiting:
        return "-"
    return "never" if row.epoch is None else f"epoch {row.epoch}"
