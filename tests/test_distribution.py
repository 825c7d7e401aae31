"""What is installed under which name: messages, documents, bounds and constraints agree."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from gift.support.optional import install, require
from gift.version import DISTRIBUTION

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORDS = {".py", ".md", ".ipynb", ".toml", ".cfg", ".txt", ".html", ""}


def texts() -> dict[Path, str]:
    """Every tracked file that is read by people or programs."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so nothing says which files belong to gift")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    here = [file for file in files if file.suffix in WORDS and file.is_file()]
    return {file: file.read_text(encoding="utf-8") for file in here}


def test_the_one_constant_is_the_name_in_the_metadata() -> None:
    assert PROJECT["name"] == DISTRIBUTION == "gift-torch"


def test_nothing_says_to_install_the_other_gift() -> None:
    """`gift` on PyPI is somebody else's."""
    command, other = "pip install", r"""[^\n]{0,40}?[ "'\\]gift(\[|["'\s\\`]|$)"""
    pattern = re.compile(command + other, re.MULTILINE)
    assert pattern.search(f'{command} "gift[cli]"')
    assert pattern.search(f"{command} -U gift\n")
    assert not pattern.search(f'{command} "gift-torch[cli]"')
    assert [file for file, text in texts().items() if pattern.search(text)] == []


def test_every_extra_that_is_named_exists() -> None:
    """In documents, notebooks, messages, and calls of `needed`."""
    listed = re.compile(re.escape(DISTRIBUTION) + r"\[([a-z,]+)\]")
    asked = re.compile(r'needed\([^()]*?, "(\w+)"\)')
    for file, text in texts().items():
        if file == Path(__file__):
            continue
        named = [name for names in listed.findall(text) for name in names.split(",")]
        assert {*named, *asked.findall(text)} <= {*EXTRAS, "extra"}, file


def test_what_is_missing_is_named_with_the_command_that_installs_it() -> None:
    expected = re.escape(f"this needs absent_package: {install('cli')}")
    with pytest.raises(ImportError, match=expected):
        require("absent_package.part", "cli")


def lines(file: str) -> list[Requirement]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def claimed() -> list[Requirement]:
    every = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return [one for one in map(Requirement, every) if one.name != DISTRIBUTION]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_constraints_have_one_version_of_everything_that_is_claimed(python: str) -> None:
    """All but torch, torchvision and setuptools are pinned, within what pyproject.toml claims."""
    where = {"python_version": python, "python_full_version": f"{python}.7"}
    bounds = [
        one for one in lines("constraints.txt") if not one.marker or one.marker.evaluate(where)
    ]
    pins = {canonicalize_name(one.name): one.specifier for one in bounds}
    assert len(pins) == len(bounds)
    for needs in claimed():
        allowed = pins[canonicalize_name(needs.name)]
        (kind, version), *more = sorted((one.operator, one.version) for one in allowed)
        if needs.name in {"torch", "torchvision", "setuptools"}:
            assert kind == "<"
            assert [operator for operator, _ in more] == [">="]
        else:
            assert (kind, more) == ("==", [])
            assert needs.specifier.contains(version), needs


def test_the_constraints_name_no_place_and_nothing_that_torch_pins() -> None:
    assert all(one.url is None for one in lines("constraints.txt"))
    names = {one.name for one in lines("constraints.txt")}
    assert not [
        name for name in names if re.match(r"nvidia-.*-cu\d|nvidia-cu|cuda|triton|sympy", name)
    ]
    assert "-i" not in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()


def test_every_claim_has_a_lower_bound_that_can_be_installed() -> None:
    """The oldest lane pins it, so it must be a whole version, and the same wherever it stands."""
    bounds: dict[str, Version] = {}
    for extra in [PROJECT["dependencies"], *(EXTRAS[name] for name in EXTRAS if name != "clients")]:
        for needs in map(Requirement, extra):
            if needs.name == DISTRIBUTION:
                continue
            (bound,) = [one for one in needs.specifier if one.operator in (">=", "==")]
            assert "." in bound.version, needs
            version = Version(bound.version)
            assert bounds.setdefault(canonicalize_name(needs.name), version) == version, needs


def test_the_table_of_versions_is_what_the_lanes_install() -> None:
    """Its first column are the lower bounds, its second one the constraints."""
    text = (ROOT / "docs" / "start" / "versions.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([\w-]+) \| ([\d.]+|\(.*?\)) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE
    )
    table = {name: versions for name, *versions in rows}
    assert {*table} >= {"Python", "torch", "torchvision", "transformers", "peft", "torchao"}
    bounds = {"Python": PROJECT["requires-python"].removeprefix(">=")}
    for needs in claimed():
        for bound in needs.specifier:
            bounds.setdefault(needs.name, bound.version)
    pins = {one.name: one.specifier for one in lines("constraints.txt")}
    for name, (oldest, usual, newest) in table.items():
        assert oldest.startswith("(") or oldest == bounds[name], name
        assert name == "Python" or pins[name].contains(usual), name
        assert Version(newest) >= Version(usual), name
