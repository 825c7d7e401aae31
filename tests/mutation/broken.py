"""A module of which one place is broken, in this process and in those that it starts."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from tests.mutation.mutants import mutated

ROOT = Path(__file__).parents[2]
NAME = "GIFT_MUTANT"  # "path: number" of the mutant, for the processes that a test starts


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module with the change of that number."""

    number: int

    def get_code(self, fullname: str) -> Any:
        return compile(mutated(Path(self.path).read_text(), self.number), self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module before others do."""

    def __init__(self, module: str, number: int) -> None:
        self.path = str(ROOT / module)
        self.name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.number = number

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        loader = Loader(fullname, self.path)
        loader.number = self.number
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


def break_module(module: str, number: int) -> None:
    """Break a module that is not loaded yet, here and in all processes that this one starts."""
    os.environ[NAME] = f"{module}: {number}"
    sys.meta_path.insert(0, Finder(module, number))
