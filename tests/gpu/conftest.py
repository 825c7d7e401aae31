"""Tests that need a GPU; with ``--gpu-device cpu`` they run on the CPU, which proves their code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = config.getoption("--gpu-device") == "cuda" and not torch.cuda.is_available()
    kept: dict[Path, pytest.Item] = {}
    left_out = []
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if absent and kept.setdefault(item.path, item) is not item:
                left_out.append(item)
    # One test of each file says why; thousands of skipped ones would take a minute.
    for item in kept.values():
        item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = {id(item) for item in left_out}
        items[:] = [item for item in items if id(item) not in gone]


@pytest.fixture
def device(pytestconfig: pytest.Config) -> Iterator[torch.device]:
    """Where gift computes; products of float32 are not rounded to fewer bits there."""
    switches: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield torch.device(pytestconfig.getoption("--gpu-device"))
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed
