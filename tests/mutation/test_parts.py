"""The parts of the mechanism and their tests are what the folders have."""

from pathlib import Path

from tests.mutation.__main__ import ALSO, EQUIVALENT, PARTS, ROOT, all_mutants, files_for, modules

MECHANISM = ("gift/core", "gift/engine", "gift/files", "gift/bank", "gift/schedules")


def test_every_path_exists() -> None:
    """One that was moved or split would leave its mutants to tests of something else."""
    named = [*PARTS, *ALSO, *(test for tests in PARTS.values() for test in tests)]
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_module_of_the_mechanism_has_tests() -> None:
    found = {str(path.relative_to(ROOT)) for part in MECHANISM
             for path in Path(ROOT / part).rglob("*.py")}  # fmt: skip
    assert found == {*modules()}
    assert all(files_for(module) for module in found)


def test_what_is_said_to_change_nothing_is_still_there() -> None:
    every = {f"{one.module}: {one.what}: {one.text}" for one in all_mutants()}
    assert [text for text in EQUIVALENT if text not in every] == []
