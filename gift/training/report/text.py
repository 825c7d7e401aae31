"""The report as text."""

from html import escape

from tabulate import tabulate

from gift.support.trees import table_html
from gift.training.report.tables import comparisons, epochs, facts
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


def summary_html(result: Result) -> str:
    """Format the same, and the epochs, as HTML for a notebook.

    Args:
        result: result of `gift.training.finetune`.
    """
    parts = [table_html(facts(result))]
    for table in [*comparisons(result), *filter(None, [epochs(result)])]:
        parts.append(f"<b>{escape(table.title)}</b>{table_html(table.rows, table.header)}")
    return "".join(f"<div>{part}</div>" for part in parts)
