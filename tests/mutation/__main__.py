"""Break a sample of the mechanism, one place at a time, and run the tests of the part.

``python -m tests.mutation 120 --seed 0`` takes an hour of one core. Each mutant is a process that
is forked once torch is there; it compiles the one module from a changed tree, so that no file is
written, and nothing that imports gift was loaded before.
"""

import argparse
import importlib.abc
import importlib.machinery
import os
import random
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from tests.mutation.mutants import Mutant, mutants, mutated

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PARTS: dict[str, list[str]] = tomllib.loads((HERE / "parts.toml").read_text())
EQUIVALENT: dict[str, str] = tomllib.loads((HERE / "equivalent.toml").read_text())
LONGEST = 600  # seconds for the tests of one mutant, which may never end


def tests_of(module: str) -> list[str]:
    """The files of tests for a module: those of the longest path that it is below."""
    return PARTS[max((part for part in PARTS if module.startswith(part)), key=len)]


def all_mutants() -> list[Mutant]:
    files = sorted({path for part in PARTS for path in _files(ROOT / part)})
    return [one for path in files
            for one in mutants(str(path.relative_to(ROOT)), path.read_text())]  # fmt: skip


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


class Loader(importlib.machinery.SourceFileLoader):
    """Loads the module of a mutant."""

    mutant: Mutant

    def get_code(self, fullname: str) -> Any:
        tree = mutated(Path(self.path).read_text(), self.mutant.number)
        return compile(tree, self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module of a mutant before others do."""

    def __init__(self, mutant: Mutant) -> None:
        self.path = str(ROOT / mutant.module)
        self.name = mutant.module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        loader = Loader(fullname, self.path)
        loader.mutant = self.mutant
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


def run(mutant: Mutant | None, tests: list[str]) -> str:
    """Run tests in a process of their own, and say how it ends: "killed", "survived", "timeout"."""
    child = os.fork()
    if child == 0:
        _run_here(mutant, tests)
    began, status = time.monotonic(), None
    while status is None:
        done, ended = os.waitpid(child, os.WNOHANG)
        if done:
            status = ended
        elif time.monotonic() - began > LONGEST:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        else:
            time.sleep(0.2)
    return "survived" if status == 0 else "killed"


def _run_here(mutant: Mutant | None, tests: list[str]) -> None:
    if mutant is not None:
        sys.meta_path.insert(0, Finder(mutant))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--no-header",
        "-W",
        "ignore",
    ]
    try:
        import pytest

        os._exit(int(pytest.main([*options, *tests])))
    except BaseException:
        os._exit(70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "GIFT_EXAMPLES": "20", "HF_HUB_OFFLINE": "1"}
    import hypothesis.stateful  # noqa: F401 - forked processes have what is loaded here
    import safetensors.torch  # noqa: F401
    import torch

    torch.set_num_threads(1)
    every = all_mutants()
    sample = random.Random(given.seed).sample(every, min(given.count, len(every)))
    for tests in {tuple(tests_of(one.module)) for one in sample}:
        if (how := run(None, list(tests))) != "survived":
            sys.exit(f"{tests} fail without any change ({how})")
    print(f"{len(sample)} of {len(every)} mutants", flush=True)
    counts = {"killed": 0, "survived": 0, "timeout": 0, "equivalent": 0}
    for one in sample:
        how = run(one, tests_of(one.module))
        if how == "survived" and equivalent(one):
            how = "equivalent"
        counts[how] += 1
        print(f"{how}: {one}", flush=True)
    found = counts["killed"] + counts["timeout"]
    score = found / max(1, found + counts["survived"])
    print(f"{counts}: {score:.0%} of those that change something are noticed")
    sys.exit(score < 0.9)


def equivalent(mutant: Mutant) -> str | None:
    """Why a mutant changes nothing that can be seen; lines are known by their text."""
    return EQUIVALENT.get(f"{mutant.module}: {mutant.what}: {mutant.text}")


if __name__ == "__main__":
    main()
