"""The strategies of the registered methods, as a stub for editors and type checkers.

They are made when gift is imported, so nothing but this file shows their names and settings to
tools that read code. ``make stubs`` writes it.
"""

import inspect
import types
import typing
from pathlib import Path
from typing import Any

import torch

import gift.strategies
from gift.strategies.adapting import STRATEGIES

PATH = Path(gift.strategies.__file__).with_name("of_methods.pyi")

_HEAD = '''\
"""Made by `make stubs` from the methods."""

from typing import Literal

import torch

from gift.strategies.adapting import _AdaptingStrategy

'''


def _annotation(parameter: inspect.Parameter, hints: dict[str, Any]) -> str:
    hint = hints.get(parameter.name, parameter.annotation)
    if hint is parameter.empty:
        default = parameter.default
        return "str | None" if default is None else type(default).__name__
    return _shown(hint)


def _shown(hint: Any) -> str:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " | ".join(_shown(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is typing.Literal:
        return "Literal[" + ", ".join(f'"{one}"' for one in typing.get_args(hint)) + "]"
    return "torch.dtype" if hint is torch.dtype else hint.__name__


def _default(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def text() -> str:
    """The whole stub."""
    lines = [_HEAD]
    for name, strategy in STRATEGIES.items():
        if strategy.method.__module__.startswith("gift."):
            hints = typing.get_type_hints(strategy.method.__init__)
            lines.append(f"class {name}(_AdaptingStrategy):\n    def __init__(\n        self,\n")
            only_by_name = False
            for parameter in inspect.signature(strategy).parameters.values():
                if parameter.kind is parameter.KEYWORD_ONLY and not only_by_name:
                    lines.append("        *,\n")
                    only_by_name = True
                kind = _annotation(parameter, hints)
                lines.append(f"        {parameter.name}: {kind} = {_default(parameter.default)},\n")
            lines.append("    ) -> None: ...\n\n")
    return "".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
