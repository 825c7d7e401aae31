"""Which test calls which functions of gift, and how long it takes: a plugin of pytest."""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.mutation.started import CALLS, name_of

FEW = 3  # variants of a parametrised test that run whatever they take
ENOUGH = 15  # seconds of one test, after which no more of its variants run


class Called(NamedTuple):
    """What a test does.

    Args:
        seconds: how long it takes.
        functions: those that it calls, as "path: qualified name".
    """

    seconds: float
    functions: frozenset[str]


class Recorder:
    """Notes the functions of gift that each test calls, and writes all of it at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []
        self.first: set[str] = set()
        self.took: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        first = few(items)
        self.first = {item.nodeid for item in first}
        items[:] = first + [item for item in items if item.nodeid not in self.first]

    def is_enough(self, item: pytest.Item) -> bool:
        """Whether variants of a test took so long that this one is left out."""
        return item.nodeid not in self.first and self.took[test_of(item.nodeid)] > ENOUGH

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.is_enough(item):
            pytest.skip("other variants took long enough")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.is_enough(item):
            return (yield)
        seen: set[Any] = set()

        def call(frame: Any, event: str, argument: Any) -> None:
            seen.add(frame.f_code)

        started = self.path.with_suffix(".started")  # by the processes that the test starts
        started.write_text("")
        os.environ[CALLS] = str(started)
        began = time.monotonic()
        threading.settrace(call)
        sys.settrace(call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]  # as in its documentation
            del os.environ[CALLS]
            own = {name for code in seen if (name := name_of(code)) is not None}
            own |= {*started.read_text().splitlines()}
            started.unlink()
            seconds = time.monotonic() - began
            self.took[test_of(item.nodeid)] += seconds
            self.found[item.nodeid] = seconds, sorted(own)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        for name in self.failed:
            self.found.pop(name, None)
        modules = [name for name in sys.modules if name.split(".")[0] not in _OWN]
        whole = {"failed": self.failed, "calls": self.found, "modules": modules}
        self.path.write_text(json.dumps(whole), encoding="utf-8")


def test_of(nodeid: str) -> str:
    """The name of a test without its parameters."""
    return nodeid.partition("[")[0]


def few(items: list[pytest.Item]) -> list[pytest.Item]:
    """At most `FEW` variants of each test, evenly spaced."""
    of_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_test.setdefault(test_of(item.nodeid), []).append(item)
    return [item for same in of_test.values() for item in same[:: -(-len(same) // FEW)]]


_OWN = {"gift", "tests", "conftest", "__main__", "__mp_main__"}


def read(path: Path) -> tuple[dict[str, Called], list[str], list[str]]:
    """The calls of each test, the tests that fail, and the modules that they import."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    calls = {name: Called(s, frozenset(of)) for name, (s, of) in whole["calls"].items()}
    return calls, whole["failed"], whole["modules"]


class Chosen:
    """Runs chosen tests alone, in their order.

    Args:
        names: of the tests.
        every: whether all variants of these tests run, not only those that are named.
    """

    def __init__(self, names: list[str], every: bool = False) -> None:
        self.every = every
        self.order = {self._name(name): number for number, name in enumerate(reversed(names))}

    def _name(self, nodeid: str) -> str:
        return test_of(nodeid) if self.every else nodeid

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self._name(item.nodeid) in self.order]
        items[:] = sorted(kept, key=lambda item: -self.order[self._name(item.nodeid)])
