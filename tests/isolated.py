"""Environments that have some of the installed packages: what a user has who installs an extra.

Nothing is downloaded or copied: a new virtual environment gets links to what is here, for the
closure of what it is asked for, so that everything else is really absent.
"""

import functools
import os
import shutil
import subprocess
import sys
import venv
from collections import defaultdict
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """The names of all distributions that requirements bring along, which must be installed."""
    found: set[str] = set()
    done: set[tuple[str, str]] = set()
    todo = [
        (canonicalize_name(one.name), extra) for one in requirements for extra in ["", *one.extras]
    ]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        found.add(name)
        for line in metadata.requires(name) or []:
            needs = Requirement(line)
            if needs.marker is None or needs.marker.evaluate({"extra": extra}):
                other = canonicalize_name(needs.name)
                todo += [(other, one) for one in ["", *needs.extras]]
    return found


@functools.cache
def _owners() -> tuple[dict[tuple[str, ...], set[str]], dict[tuple[str, ...], Path]]:
    """For each path of up to three parts under site-packages: who installed it, and where it is."""
    owners: dict[tuple[str, ...], set[str]] = defaultdict(set)
    places: dict[tuple[str, ...], Path] = {}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        site = Path(str(distribution.locate_file("")))
        for file in distribution.files or []:
            if file.parts[0] in ("..", "__pycache__") or file.is_absolute():
                continue  # scripts and shared data
            for depth in range(1, min(len(file.parts), 3) + 1):
                owners[file.parts[:depth]].add(name)
                places[file.parts[:depth]] = site.joinpath(*file.parts[:depth])
    return owners, places


def environment(folder: Path, distributions: Iterable[str]) -> Path:
    """Make a virtual environment with links to some of the installed distributions.

    Args:
        folder: gets it.
        distributions: their names, as `closure` gives them.

    Returns:
        Its folder ``site-packages``.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    (site,) = folder.glob("**/site-packages")
    allowed = set(distributions)
    owners, places = _owners()
    linked: set[tuple[str, ...]] = set()
    for parts in sorted(owners, key=len):
        if not owners[parts] & allowed or any(parts[:depth] in linked for depth in (1, 2)):
            continue
        target = site.joinpath(*parts)
        # A folder that others share, as namespaces are, is made here, with what is asked for.
        if owners[parts] <= allowed or len(parts) == 3 or not places[parts].is_dir():
            target.symlink_to(places[parts])
            linked.add(parts)
        else:
            target.mkdir()
    return site


def python(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts" if os.name == "nt" else "bin") / Path(sys.executable).name


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, through the sdist, without a network."""
    sources = folder / "sources"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gift", sources / "gift", ignore=skip)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    made = subprocess.run([*command, str(sources)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel
