"""Files that gift wrote before its own files moved to rooms mean what they meant then."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import gift
from gift.strategies import LoRALinearFineTuningStrategy, load_strategy_from_config

FILES = Path(__file__).parent / "older_files"
OUTPUTS = load_file(FILES / "outputs.safetensors")
IMAGES = torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6)
ROWS = torch.linspace(-1, 1, 12).reshape(2, 6)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def same(found: Tensor, name: str) -> None:
    torch.testing.assert_close(found, OUTPUTS[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "lokr", "bottleneck", "bitfit"])
def test_deltas(name: str) -> None:
    net = network()
    gift.load(net, FILES / f"{name}.safetensors")
    same(net.eval()(IMAGES), name)


@pytest.mark.parametrize("name", ["lora", "dora", "lokr", "bitfit"])
def test_strategies(name: str) -> None:
    net, same_net = network(), network()
    report = gift.enable_fine_tuning(net, load_strategy_from_config(FILES / f"{name}.yaml"))
    other = gift.load(same_net, FILES / f"{name}.safetensors")
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in same_net.named_parameters()]
    assert report.trainable_after == other.trainable_after


def test_a_folder_of_peft() -> None:
    net = linear()
    gift.load_peft(net, FILES / "peft")
    same(net(ROWS), "linear")


def test_a_file_of_kohya() -> None:
    net = linear()
    gift.load_kohya(net, FILES / "kohya.safetensors")
    same(net(ROWS), "linear")


def test_a_state() -> None:
    net = linear()
    gift.enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=2))
    net.load_state_dict(torch.load(FILES / "state.pt"))
    same(net(ROWS), "linear")


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """The job of a finished run, in a copy of its folders."""
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("transformers")
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "run" / "job.yaml"
    file.write_text(file.read_text().replace("/somewhere", str(tmp_path)))
    return yaml.safe_load(file.read_text())


def test_a_run(job: dict[str, Any]) -> None:
    from gift.jobs import Run
    from gift.training import predict

    net = Run(job["folder"]).network()
    found = predict(net, ["awful the film a", "good the film a"])
    assert [one.label for one in found] == ["cross", "cross"]
    probabilities = [one.probability for one in found]
    assert probabilities == pytest.approx([0.6905140665537636, 0.7284774613016204], abs=1e-5)


@pytest.mark.filterwarnings("ignore::gift.GiftWarning")
def test_a_checkpoint_is_resumed(job: dict[str, Any]) -> None:
    from gift.jobs import read_job, run_job

    history = (Path(job["folder"]) / "history.csv").read_text()
    run_job(read_job(Path(job["folder"]) / "job.yaml"))
    assert (Path(job["folder"]) / "history.csv").read_text() == history, "nothing is done again"
