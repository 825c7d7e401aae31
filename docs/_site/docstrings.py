"""An extension of griffe: docstrings become Markdown, defaults of settings what they are."""

import ast
from typing import Any

import griffe

from docs._site.markdown import as_markdown
from docs._site.public import public_names

SETTINGS = {
    "choice": None,
    "flag": "False",
    "floating_dtype": "None",
    "form_of_computing": "None",
    "number": None,
    "probability": "0.0",
    "whole": None,
}
"""Functions of `gift.methods.settings`, and the default that each has if none is given."""


class Readable(griffe.Extension):
    """Rewrites the docstring of every object that is loaded, and the defaults of settings."""

    def __init__(self) -> None:
        self.known = {one.path for one in public_names()}

    def on_instance(self, *, obj: griffe.Object, **more: Any) -> None:
        """Rewrite one object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, self.known)
        if obj.is_attribute and isinstance(obj.value, griffe.ExprCall):
            call = ast.parse(str(obj.value), mode="eval").body
            assert isinstance(call, ast.Call)
            name = ast.unparse(call.func)
            if name in SETTINGS:
                default = ast.unparse(call.args[0]) if call.args else SETTINGS[name]
                obj.value = default or obj.value
            elif name == "field":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                default = given.get("default", f"{given.get('default_factory', '')}()")
                obj.value = {"dict()": "{}", "list()": "[]", "set()": "set()"}.get(default, default)
