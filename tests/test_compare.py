"""Methods that are compared: the figures are those of single runs, and nothing is done twice."""

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import gift
from gift.jobs import Job, JobError, Run, run_job
from gift.many import compare
from tests.many_examples import Net, tiny_job

pytestmark = pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning")


@pytest.fixture(autouse=True)
def _no_report_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gift.training.loop.write_report", lambda result, folder: None)


def job_in(folder: Path) -> Job:
    return Job.model_validate(tiny_job(folder)).anchored(folder)


def test_the_table_has_mean_and_spread_of_single_runs(tmp_path: Path) -> None:
    """Each run is that of the same job alone, bit for bit; what is done is not done again."""
    job, lines = job_in(tmp_path), list[str]()
    methods = ["lora:rank=2", "full", "head"]
    arguments: dict[str, Any] = {"folder": tmp_path / "all", "network": Net, "tell": lines.append}
    made = compare(job, methods, 2, **arguments)
    assert {row.name for row in made.rows} == {*methods}
    row = next(row for row in made.rows if row.name == "lora:rank=2")
    single = []
    for seed in (0, 1):
        config = job.to_config()
        config["training"]["seed"] = seed
        config["strategy"]["init_paras"] |= {"rank": 2}
        own = Job.model_validate(config | {"folder": str(tmp_path / f"alone-{seed}")})
        single.append(run_job(own, Net()).after)
        alone, compared = (
            gift.inspect(folder / "best.safetensors").tensors
            for folder in (Path(own.folder), row.folders[seed])
        )
        assert alone.keys() == compared.keys()
        assert all(torch.equal(alone[name], compared[name]) for name in alone)
    for metric in ("loss", "accuracy"):
        values = [after[metric] for after in single]
        assert row.values[metric].mean == pytest.approx(statistics.fmean(values))
        assert row.values[metric].deviation == pytest.approx(statistics.stdev(values))
    trained = {row.name: row.values["trained"].mean for row in made.rows}
    expected = {"lora:rank=2": 2 * (48 + 16) + 2 * (16 + 2), "full": 48 * 16 + 16 + 34, "head": 34}
    assert trained == expected
    means = [row.values["accuracy"].mean for row in made.rows]
    assert means == sorted(means, reverse=True)
    size = (row.folders[0] / "best.safetensors").stat().st_size / 1e6
    assert row.values["megabytes"].values[0] == size
    assert Run(row.folders[0], Net()).evaluate() == pytest.approx(single[0], abs=1e-6)
    table = list(csv.DictReader((tmp_path / "all/comparison.csv").open(encoding="utf-8")))
    by_name = {line["method"]: line for line in table}
    assert float(by_name["lora:rank=2"]["loss_mean"]) == row.values["loss"].mean
    assert len(list(csv.DictReader((tmp_path / "all/runs.csv").open(encoding="utf-8")))) == 6
    page = (tmp_path / "all/report.html").read_text(encoding="utf-8")
    assert all(name in page for name in methods)
    assert page.count("data:image/png") == 2  # for light pages and dark ones

    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "all").rglob("best.safetensors")}
    (row.folders[1] / "result.json").unlink()  # as if it had been killed before its end
    lines.clear()
    again = compare(job, methods, 3, **arguments)
    assert sum("was done" in line for line in lines) == 5
    assert {f: f.stat().st_mtime_ns for f in times} == times
    assert next(r for r in again.rows if r.name == row.name).values["loss"].values[:2] == (
        row.values["loss"].values
    )


def test_forgetting_is_what_the_old_task_lost(tmp_path: Path) -> None:
    """By accuracy on the old examples, from the files of the run."""
    config = tiny_job(tmp_path, lr=0.3)
    config["data"]["old"] = "data/val"
    job = Job.model_validate(config).anchored(tmp_path)
    made = compare(job, ["full"], 1, folder=tmp_path / "all", network=Net)
    result = json.loads((made.rows[0].folders[0] / "result.json").read_text())
    lost = result["old_before"]["accuracy"] - result["old_after"]["accuracy"]
    assert made.rows[0].values["forgetting"].values == (lost,)
    assert "forgetting" in str(made)


def test_all_methods_get_one_budget(tmp_path: Path) -> None:
    made = compare(
        job_in(tmp_path), ["lora,dora"], 1, folder=tmp_path / "all", network=Net, budget=300
    )
    assert all(200 < row.values["trained"].mean <= 300 for row in made.rows)


def test_a_method_that_fails_leaves_the_others(tmp_path: Path) -> None:
    methods = ["lora", "lora:optimizer_options={momentum: 1}"]
    made = compare(job_in(tmp_path), methods, 1, folder=tmp_path / "all", network=Net)
    assert [row.name for row in made.rows] == methods
    assert "momentum" in made.rows[1].failures[0]
    assert "failed: lora:optimizer_options" in str(made)


def test_what_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(JobError) as error:
        compare(job_in(tmp_path), ["lorra", "lora:epoch=3", "ia3", "ia3"], network=Net)
    for text in ("there is no method 'lorra'", "closest: 'epochs'", "ia3 is named twice"):
        assert text in str(error.value)
    assert not Path("comparison").exists()
