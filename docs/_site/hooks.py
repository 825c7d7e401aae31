"""Hooks of MkDocs: formulas become MathML, which browsers show without a script."""

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def on_startup(**more: Any) -> None:
    """Let `gift.strategies` have names that are made from the methods, which griffe cannot read."""

    def is_news(record: logging.LogRecord) -> bool:
        return "gift.strategies.__all__: STRATEGIES" not in record.getMessage()

    logging.getLogger("mkdocs.plugins.griffe").addFilter(is_news)


def on_page_markdown(markdown: str, **more: Any) -> str:
    """Leave out comments, which say how the tests run a page."""
    return _COMMENT.sub("", markdown)


def on_page_content(content: str, **more: Any) -> str:
    """Show formulas, and let tables scroll where the page is narrower than they are."""

    def formula(found: re.Match[str]) -> str:
        block = found[2] == "["
        made = convert(html.unescape(found[3]).strip(), display="block" if block else "inline")
        return f'<div class="formula">{made}</div>' if block else made

    return _FORMULA.sub(formula, content)
