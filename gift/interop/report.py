"""The report on a network that was loaded from a file for several networks."""

from dataclasses import dataclass, field

from gift.core.report import Report


@dataclass
class PartReport(Report):
    """The report of `enable_fine_tuning`, and what else was in the file.

    Args:
        left: number of tensors of other networks, by prefix.
    """

    left: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """Return totals, what each cap matched, and what was left in the file."""
        others = [f"{number} tensors of {prefix}..." for prefix, number in self.left.items()]
        return super().summary() + (f"\nleft in the file: {', '.join(others)}" if others else "")
