"""The report as text."""

from tabulate import tabulate

from gift.training.report.tables import comparisons, facts
from gift.training.result import Result


def summary(result: Result) -> str:
    """Format the facts and the metrics before and after as tables for a terminal.

    Args:
        result: result of `gift.training.finetune`.
    """
    parts = [tabulate(facts(result), tablefmt="plain", disable_numparse=True)]
    for table in comparisons(result):
        aligned = ["left", *["right"] * (len(table.header) - 1)]
        header = [table.title, *table.header[1:]]
        parts.append(tabulate(table.rows, header, disable_numparse=True, colalign=aligned))
    return "\n\n".join(parts)
