"""Docstrings, which are written for people, as Markdown."""

import re
from collections.abc import Collection

_MATH_BLOCK = re.compile(r"^\.\. math:: (.+(?:\n(?: +\S.*))*)", re.MULTILINE)
_MATH = re.compile(r":math:`([^`]+)`")
_NAME = re.compile(r"(?<![`\w\[])`(gift(?:\.\w+)+)`(?!`)")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_LITERAL = re.compile(r"::$", re.MULTILINE)


def as_markdown(text: str, known: Collection[str] = ()) -> str:
    """Return a docstring with its formulas, references and examples as Markdown has them.

    Args:
        text: the docstring.
        known: dotted paths that the reference has, which become links.

    Example:
        >>> as_markdown("Scale by :math:`s`, see `gift.merge`.", ["gift.merge"])
        'Scale by \\\\(s\\\\), see [`gift.merge`][gift.merge].'
    """
    text = _MATH_BLOCK.sub(lambda found: "\\[ " + " ".join(found[1].split()) + " \\]\n", text)
    text = _MATH.sub(lambda found: "\\(" + " ".join(found[1].split()) + "\\)", text)
    text = _NAME.sub(
        lambda found: f"[{found[0]}][{found[1]}]" if found[1] in known else found[0], text
    )
    text = _EXAMPLE.sub("Examples:", text)
    return _LITERAL.sub(":", text)
