"""Environments beside that of `make test`: the oldest versions, the newest, the clients.

``make lanes`` runs all three, ``python -m nox -s oldest`` one of them, and
``python -m nox -s newest --force-python 3.13`` one on another Python. They need a network.
"""

import re
import tomllib
from pathlib import Path

import nox
from nox.virtualenv import UV
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["oldest", "newest", "clients"]
nox.options.stop_on_first_error = False

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = Path("constraints.txt")

# What differs between versions of what gift is built on.
DIFFERS = ["matrix", "state", "torch_features", "files*", "fast_*", "prompt*", "exchange_*"]
DIFFERS += ["bottleneck*", "*trainers", "quantised*", "peft_parity", "distributed", "parallel"]
DIFFERS += ["bank*", "foreign_*", "frozen", "ties", "writes_*", "read_*", "saved_by_*", "state_*"]
DIFFERS += ["schedules*", "private", "compiled_first", "merging", "little", "stacking"]
DIFFERS += ["prefix", "activated", "loreft"]

# Packages that torch pins, or caps, differently in each of its versions.
RANGES = ["torch", "torchvision", "setuptools"]
OF_TORCH = {"sympy"}

# Packages whose lower bound is too new for the lowest torch; their tests are left out there.
# torchao 0.18 and LyCORIS 4 do not import on torch 2.6; older ones compute other things.
NOT_ON_LOWEST_TORCH = ["torchao", "lycoris-lora"]


def requirements(extra: str | None = None) -> list[Requirement]:
    """What pyproject.toml claims, with an extra and the extras that it names."""
    own = canonicalize_name(PROJECT["name"])
    found = [] if extra else [Requirement(line) for line in PROJECT["dependencies"]]
    for line in PROJECT["optional-dependencies"][extra] if extra else []:
        needs = Requirement(line)
        if canonicalize_name(needs.name) == own:
            found += [one for other in sorted(needs.extras) for one in requirements(other)]
        else:
            found.append(needs)
    return found


def lowest() -> dict[str, Version]:
    """The lowest version of each package that `dev` claims."""
    versions: dict[str, Version] = {}
    for needs in [*requirements(), *requirements("dev")]:
        for bound in needs.specifier:
            if bound.operator in (">=", "=="):
                name, version = canonicalize_name(needs.name), Version(bound.version)
                versions[name] = max(version, versions.get(name, version))
    return versions


def run_tests(session: nox.Session, *tests: str) -> None:
    """Run tests on two processes, and say which versions they ran on."""
    session.env["OMP_NUM_THREADS"] = "1"
    tests = tuple(session.posargs) or tests
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "worksteal", *tests)
    session.run(UV, "pip", "list", external=True)


def differing() -> list[str]:
    """The files of tests that the lanes run."""
    return sorted({str(file) for name in DIFFERS for file in Path("tests").glob(f"test_{name}.py")})


@nox.session
def oldest(session: nox.Session) -> None:
    """Install the lowest version of every package that pyproject.toml claims."""
    bounds = Path(session.create_tmp()) / "lowest.txt"
    bounds.write_text("".join(f"{name}=={version}\n" for name, version in lowest().items()))
    session.install("--compile-bytecode", "-e", ".[dev]", "-c", str(bounds))
    session.run_install(UV, "pip", "uninstall", *NOT_ON_LOWEST_TORCH, external=True)
    run_tests(session, *differing())


@nox.session
def newest(session: nox.Session) -> None:
    """Install the newest version of everything."""
    session.install("--compile-bytecode", "--upgrade", "-e", ".[dev]")
    run_tests(session, *differing())


@nox.session
def clients(session: nox.Session) -> None:
    """Run gift inside of the libraries of the extra `clients`."""
    session.install("--compile-bytecode", "-e", ".[dev,clients]", "-c", str(CONSTRAINTS))
    run_tests(session, "tests/clients")


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """Run out of memory at every operation, and be interrupted at 500 random moments of each."""
    session.install("--compile-bytecode", "-e", ".[dev]", "-c", str(CONSTRAINTS))
    session.env["GIFT_FAULTS"] = "long"
    run_tests(session, "tests/faults", "tests/test_interrupted.py")


@nox.session(default=False)
def engines(session: nox.Session) -> None:
    """Run jobs on Ray and Slurm, started here; Slurm needs root, slurm-wlm and munge."""
    session.install("--compile-bytecode", "-e", ".[dev]", "-c", str(CONSTRAINTS))
    session.env["GIFT_ENGINES"] = session.env["OMP_NUM_THREADS"] = "1"
    session.run("python", "-m", "pytest", "-p", "no:xdist", "-rs", "tests/engines")


@nox.session(default=False)
def matrix(session: nox.Session) -> None:
    """Run the whole products of which `make test` runs a selection (`tests/cases/selection.py`)."""
    session.install("--compile-bytecode", "-e", ".[dev]", "-c", str(CONSTRAINTS))
    session.env["GIFT_MATRIX"] = "whole"
    files = Path("tests").glob("test_*.py")
    selecting = [file for file in files if "tests.cases.selection import" in file.read_text()]
    run_tests(session, *sorted(map(str, selecting)))


@nox.session(default=False)
def documentation(session: nox.Session) -> None:
    """Run the code of all pages, scripts and notebooks, also of those that take long."""
    session.install("--compile-bytecode", "-e", ".[dev]", "-c", str(CONSTRAINTS))
    session.env["GIFT_DOCUMENTATION"] = "long"
    tests = ["documentation", "example_scripts", "notebooks"]
    run_tests(session, *(f"tests/test_{name}.py" for name in tests))


@nox.session(default=False)
def mutation(session: nox.Session) -> None:
    """Break 120 lines of the mechanism, one at a time, and see which no test notices."""
    session.install("--compile-bytecode", "-e", ".[dev]", "-c", str(CONSTRAINTS))
    session.run("python", "-m", "tests.mutation", *(session.posargs or ["120"]))


@nox.session(venv_backend="none")
def constraints(session: nox.Session) -> None:
    """Write constraints.txt: today's version of everything that `dev`, `clients` and `docs` need.

    On a fresh machine, torch and torchvision may come as a pair that is there already. They are
    ranges, and packages that only they bring are left out.
    """
    extras = [word for extra in ("dev", "clients", "docs") for word in ("--extra", extra)]
    every = "--universal", "--python-version", "3.11", *extras
    quiet = "-q", "--upgrade", "--no-header", "--annotation-style", "line"
    command = UV, "pip", "compile", "pyproject.toml", *every, *quiet
    text = session.run(*command, silent=True, external=True)
    lines = [line.split("  # via ") for line in str(text).splitlines()]
    needs = {re.split("[=;]", pin)[0].strip(): via.split(", ") for pin, via in lines}
    left_out = {*RANGES, *OF_TORCH}
    while more := {name for name, via in needs.items() if left_out.issuperset(via)} - left_out:
        left_out |= more
    bounds = lowest()
    ranges = []
    for name in RANGES:
        (version,) = (
            Version(pin.split("==")[1]) for pin, _ in lines if pin.startswith(f"{name}==")
        )
        ranges.append(f"{name}>={bounds[name]},<{version.major}.{version.minor + 1}")
    pins = [pin.rstrip() for pin, _ in lines if re.split("[=;]", pin)[0].strip() not in left_out]
    head = "# Made by `make constraints`, which also updates it."
    CONSTRAINTS.write_text("\n".join([head, *ranges, *pins, ""]), encoding="utf-8")
