"""What a run gave, as text, pictures and a page."""

from gift.training.report.page import write_report
from gift.training.report.text import summary

__all__ = ["summary", "write_report"]
