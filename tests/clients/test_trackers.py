"""Trackers of experiments: a resumed run goes on in the run that the tracker has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gift.training import Callback, finetune, loop

DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
LABELS = DATA[:, :3].argmax(1)


class Stops(Callback):
    def on_step_end(self, run: Any, row: Any) -> None:
        if row["step"] == 14:
            raise ZeroDivisionError


def run(folder: Path, tracker: str, *callbacks: Callback) -> Any:
    torch.manual_seed(0)
    return finetune(
        nn.Linear(6, 3), (DATA, LABELS), (DATA, LABELS), epochs=5, batch_size=10, folder=folder,
        track=[tracker], callbacks=callbacks, device="cpu", progress=False, tensorboard=False,
    )  # fmt: skip


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_resumed_run_is_one_run_of_the_tracker(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", tracker, Stops())
    first = json.loads((tmp_path / "run" / "trackers.json").read_text())[tracker]
    result = run(tmp_path / "run", tracker)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())[tracker] == first
    if tracker == "wandb":
        assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{first}"))) == 2
        return
    import mlflow

    assert [found.info.run_id for found in mlflow.MlflowClient().search_runs(["1"])] == [first]
    values = mlflow.MlflowClient().get_metric_history(first, "epoch/valid_loss")
    assert {(one.step, one.value) for one in values} >= {
        (row["step"], row["valid_loss"]) for row in result.history
    }
