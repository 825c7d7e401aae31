"""Processes that a test starts are broken as that of the test is, and what they call is known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.__main__ import all_mutants
from tests.mutation.broken import NAME
from tests.mutation.started import CALLS, reach

SCRIPT = """
import torch, gift.files.digests as file
print(file.digest(torch.ones(1)))
"""


def test_a_process_is_broken_and_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (broken,) = [
        one
        for one in all_mutants()
        if (one.module, one.text) == ("gift/files/digests.py", "return hashed.hexdigest()")
    ]
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv(CALLS, str(tmp_path / "calls"))
    reach()
    found = []
    for of in (None, broken):
        if of is not None:
            monkeypatch.setenv(NAME, f"{of.module}: {of.number}")
        made = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
        found.append(made.stdout.decode().strip())
    assert len(found[0]) == 64
    assert found[1] == "None"
    assert broken.function in (tmp_path / "calls").read_text().splitlines()
