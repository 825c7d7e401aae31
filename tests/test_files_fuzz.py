"""A few thousand files that nobody should trust; `benchmarks/fuzz.py` tries hundreds of thousands.

They are tried in a process of its own, in which a file that takes too long ends everything.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECONDS, GIGABYTES = 20, 16  # for one file; of address space, of which torch alone takes some


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30,) * 2)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_file_does_harm(seed: int, tmp_path: Path) -> None:
    """No error but the right one, no crash, no hang, no memory, no changed network."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.hostile_files", str(tmp_path)]
    command += [str(number) for number in (seed, 800, 0.5, SECONDS)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit_memory
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["wrong"] == []
    assert sum(result["outcomes"].values()) == 800
    assert all(result["outcomes"][f"signed nonsense: {what}"] for what in ("refused", "loaded"))
    assert result["memory_mb"] < 1000
