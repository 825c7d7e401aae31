"""Break a sample of the mechanism, one place at a time, and run the tests that reach it.

``python -m tests.mutation 120 --seed 0`` takes an hour of one core. The tests of a part
run once first, to see which functions each calls. Each mutant is a process that is forked once the
libraries are there; it compiles the one module from a changed tree, so that no file is written,
and nothing that imports gift was loaded before. The processes that a test starts do so, too. It
runs the tests of its part that call its function, the quickest first, up to the first that fails.
Where none does, the variants of these tests follow that were not looked at, as others took long,
then the other files of tests.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from tests.mutation.broken import ROOT, break_module
from tests.mutation.calls import Called, Chosen, Recorder, read
from tests.mutation.mutants import Mutant, mutants
from tests.mutation.started import reach

HERE = Path(__file__).parent
PARTS: dict[str, list[str]] = tomllib.loads((HERE / "parts.toml").read_text())
EQUIVALENT: dict[str, str] = tomllib.loads((HERE / "equivalent.toml").read_text())
# Tests that are of no part alone.
ALSO = [
    f"tests/test_{name}.py"
    for name in ("adalora", "bad_input", "bank_methods", "bank_padding", "biases", "every_method",
                 "foreign_methods", "leftover", "mistakes", "numbers", "older_files", "parts",
                 "quantised", "shared_parameters", "stacking", "torch_features",
                 "trainable_tokens", "updates", "wrapping")
]  # fmt: skip
SPARE = 60  # seconds that tests of a mutant may take beyond five times their own
WHOLE = 90  # seconds for all variants of the tests of a part
SOME = 60  # seconds that tests of a part, or of the others, take without any change


def files_for(module: str) -> list[str]:
    """The files of tests for a module: those of the longest path that it is below."""
    return PARTS[max((part for part in PARTS if is_below(module, part)), key=len)]


def is_below(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}/")


def modules() -> list[str]:
    """The paths of all modules of the mechanism."""
    found = {path for part in PARTS for path in _files(ROOT / part)}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def all_mutants() -> list[Mutant]:
    return [one for path in modules() for one in mutants(path, (ROOT / path).read_text())]


def drawn(every: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """Draw a sample, in which a mutant stays as long as its line does, whatever changes elsewhere.

    So the same sample is run again after a change, and what was noticed before stays noticed.
    """
    lots = {one: sha256(f"{seed} {one.lasting}".encode()).digest() for one in every}
    return sorted(every, key=lots.__getitem__)[:count]


def chosen(mutant: Mutant, calls: "Calls", files: Sequence[str]) -> list[str]:
    """The tests of these files that call its function, the quickest first, for some time."""
    for file in files:
        calls.add(file)
    own = [name for name in calls if name.partition("::")[0] in files]
    reached = [name for name in own if mutant.function in calls[name].functions]
    reached = sorted(reached, key=lambda name: calls[name].seconds)
    ends = accumulate(calls[name].seconds for name in reached)
    return [name for name, end in zip(reached, ends, strict=True) if end < SOME]


def others(mutant: Mutant, calls: "Calls") -> list[str]:
    """Tests of other parts that call its function, as `chosen` gives them."""
    files = {file for part in (*PARTS.values(), ALSO) for file in part}
    return chosen(mutant, calls, sorted(files - {*files_for(mutant.module)}))


def run(mutant: Mutant | None, files: Sequence[str], plugin: Any, longest: float) -> str:
    """Run tests in a process of their own, and say how it ends: "killed", "survived", "timeout"."""
    child = os.fork()
    if child == 0:
        _run_here(mutant, files, plugin)
    began, status = time.monotonic(), None
    while status is None:
        done, ended = os.waitpid(child, os.WNOHANG)
        if done:
            status = ended
        elif time.monotonic() - began > longest:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        else:
            time.sleep(0.1)
    return "survived" if status == 0 else "killed"


def _run_here(mutant: Mutant | None, files: Sequence[str], plugin: Any) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
    if mutant is not None:
        break_module(mutant.module, mutant.number)
        options.append("-x")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        import pytest

        os._exit(int(pytest.main([*options, *files], plugins=[plugin])))
    except BaseException:
        os._exit(70)


class Calls(dict[str, Called]):
    """What each test calls: its file runs once, when it is first asked for.

    Args:
        folder: where this is kept, a file for each file of tests.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.known = folder, set[str]()

    def add(self, file: str) -> None:
        """Find the calls, and load in this process all libraries that the tests import."""
        if file in self.known:
            return
        self.known.add(file)
        path = self.folder / file.replace("/", "_").replace(".py", ".json")
        if not path.is_file():
            run(None, [file], Recorder(path), longest=7200)
        calls, failed, libraries = read(path)
        for name in failed:
            print(f"left out, as it fails without any change: {name}", flush=True)
        for name in libraries:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        self.update(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="text of the mutants to choose from")
    parser.add_argument("--calls", type=Path, help="folder that keeps which test calls what")
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "GIFT_EXAMPLES": "20", "HF_HUB_OFFLINE": "1"}
    reach()
    import torch

    torch.set_num_threads(1)
    every = [one for one in all_mutants() if given.only in str(one)]
    sample = drawn(every, given.count, given.seed)
    print(f"{len(sample)} of {len(every)} mutants", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(tried(sample, Calls(given.calls or Path(folder))) < 0.9)


def tried(sample: Sequence[Mutant], calls: Calls) -> float:
    """Try mutants, say what becomes of each, and return the part that is noticed."""
    counts = {"killed": 0, "survived": 0, "timeout": 0, "equivalent": 0}
    for one in sample:
        how = "equivalent" if equivalent(one) else fate(one, calls)
        counts[how] += 1
        print(f"{how}: {one}", flush=True)
    found = counts["killed"] + counts["timeout"]
    score = found / max(1, found + counts["survived"])
    print(f"{counts}: {score:.0%} of those that change something are noticed")
    return score


def fate(mutant: Mutant, calls: Calls) -> str:
    """Say how a mutant ends: "killed", "survived", "timeout"."""
    names = chosen(mutant, calls, files_for(mutant.module))
    longest = SPARE + 5 * sum(calls[name].seconds for name in names)
    how = run(mutant, _files_of(names), Chosen(names), longest) if names else "survived"
    if how == "survived" and names:
        how = run(mutant, _files_of(names), Chosen(names, every=True), WHOLE)
        how = "survived" if how == "timeout" else how
    if how == "survived" and (names := others(mutant, calls)):
        longest = SPARE + 5 * sum(calls[name].seconds for name in names)
        how = run(mutant, _files_of(names), Chosen(names), longest)
    return how


def _files_of(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition("::")[0] for name in names))


def equivalent(mutant: Mutant) -> str | None:
    """Why a mutant changes nothing that can be seen; lines are known by their text."""
    return EQUIVALENT.get(mutant.lasting)


if __name__ == "__main__":
    main()
