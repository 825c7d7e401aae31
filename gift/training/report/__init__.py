"""The report of a run, as text, images and an HTML page."""

from gift.training.report.page import write_report
from gift.training.report.text import summary, summary_html

__all__ = ["summary", "summary_html", "write_report"]
