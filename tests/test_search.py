"""Searches: what is tried, what is found, and that a search which was stopped goes on."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

import gift
from gift.jobs import JobError, read_job, run_job
from gift.many import read_search
from gift.many import search as run_search
from gift.many.study import Study
from tests.many_examples import Net, tiny_job, tiny_search

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning")


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures take longer than runs; those of runs are tested elsewhere, others in one test."""
    monkeypatch.setattr("gift.training.loop.write_report", lambda result, folder: None)
    monkeypatch.setattr("gift.many.searching._EACH", 0.02)
    if "best_trial" not in request.node.name:
        monkeypatch.setattr("gift.many.pages.write_images", lambda *arguments: [])


def trials_of(folder: Path) -> list[Any]:
    """What Optuna itself reads from the file."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "search" / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="gift", storage=storage).trials


def results_of(folder: Path) -> dict[int, dict[str, Any]]:
    return {
        int(file.parent.name): json.loads(file.read_text())
        for file in sorted((folder / "search" / "trials").glob("*/result.json"))
    }


def test_the_best_trial_is_that_with_the_least_loss(tmp_path: Path) -> None:
    """By the files of the runs; its job file gives the same weights, bit for bit."""
    lines: list[str] = []
    found = run_search(tiny_search(tmp_path), network=Net, tell=lines.append)
    results = results_of(tmp_path)
    assert len(results) == len(lines) == 4
    best = min(results, key=lambda number: results[number]["after"]["loss"])
    assert found.runs == [tmp_path / "search" / "trials" / f"{best:04d}"]
    assert found.values == [(results[best]["after"]["loss"],)]
    settings = found.best[0]
    job = read_job(found.jobs[0])
    assert job.training.lr == settings["lr"]
    assert job.strategy.init_paras["rank"] == settings["rank"]
    run_job(job, Net())
    again, before = (
        gift.inspect(folder / "best.safetensors").tensors
        for folder in (Path(job.folder), found.runs[0])
    )
    assert all((again[name] == before[name]).all() for name in before)
    trials = trials_of(tmp_path)
    assert [t.value for t in trials] == [results[n]["after"]["loss"] for n in range(4)]
    assert len({t.params["lr"] for t in trials}) == 4
    rows = list(csv.DictReader((tmp_path / "search" / "trials.csv").open(encoding="utf-8")))
    assert [float(row["lr"]) for row in rows] == [t.params["lr"] for t in trials]
    page = found.report.read_text(encoding="utf-8")
    for title in ("Best value so far", "Importance", "Parallel coordinates", "Curves"):
        assert f"<h2>{title}" in page


class StopError(Exception):
    """Stands for the end of the process."""


def test_a_search_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """Also in the middle of a trial; in the end it is the search that was never stopped."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    run_search(tiny_search(whole), network=Net)

    def stop(text: str) -> None:
        if text.startswith("trial 1"):
            raise StopError

    with pytest.raises(StopError):
        run_search(tiny_search(cut), network=Net, tell=stop)
    assert len(trials_of(cut)) < 4
    lines: list[str] = []
    found = run_search(tiny_search(cut), network=Net, tell=lines.append)
    assert sum(found.trials.values()) == 4
    for one, other in zip(trials_of(whole), trials_of(cut), strict=True):
        assert (one.params, one.state, one.value) == (other.params, other.state, other.value)
    # what is complete is not done again
    again = run_search(tiny_search(cut), network=Net, tell=lines.append)
    assert again.best == found.best


def test_a_trial_whose_process_is_gone_is_taken_over(tmp_path: Path) -> None:
    """A trial that is running but that nobody takes care of keeps its settings."""
    search = read_search(tiny_search(tmp_path, budget={"trials": 2}))
    study = Study(search, ["loss"])
    gone = study.asked()
    assert gone is not None
    gone.lock.release()  # as when the process is killed
    lines: list[str] = []
    run_search(tiny_search(tmp_path, budget={"trials": 2}), network=Net, tell=lines.append)
    assert lines[0].startswith("trial 0 goes on")
    trials = trials_of(tmp_path)
    assert [t.state.name for t in trials] == ["COMPLETE"] * 2
    assert trials[0].params == gone.settings


def test_two_processes_share_one_study(tmp_path: Path) -> None:
    """What one takes care of, the other leaves alone; together they begin no more than allowed."""
    search = read_search(tiny_search(tmp_path, budget={"trials": 2}))
    one, other = Study(search, ["loss"]), Study(search, ["loss"])
    first, second = one.asked(), other.asked()
    assert first is not None
    assert second is not None
    assert {first.number, second.number} == {0, 1}
    assert first.settings != second.settings
    assert one.asked() is None
    assert list(one.adopted()) == list(other.adopted()) == []


def test_poor_trials_end_early(tmp_path: Path) -> None:
    """Hyperband; the trials that it ends have fewer epochs, and the best one has them all."""

    class Slow(Net):  # so that the search sees its epochs while it runs
        def forward(self, x: Any) -> Any:
            time.sleep(0.01)
            return super().forward(x)

    job = tiny_job(tmp_path, epochs=9)
    file = tiny_search(tmp_path, job=job, budget={"trials": 8}, pruner="hyperband")
    found = run_search(file, network=Slow)
    trials = trials_of(tmp_path)
    pruned = [t for t in trials if t.state.name == "PRUNED"]
    assert pruned
    assert all(len(t.intermediate_values) < 9 for t in pruned)
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    assert found.values[0][0] == min(t.value for t in complete)
    for trial in complete:
        rows = (tmp_path / "search" / "trials" / f"{trial.number:04d}" / "history.csv").read_text()
        told = [float(row["valid_loss"]) for row in csv.DictReader(rows.splitlines())]
        assert len(told) == 9
        assert list(trial.intermediate_values.values()) == told


def test_the_number_of_epochs_may_be_that_of_the_recipe(tmp_path: Path) -> None:
    """A job that names none; Hyperband then learns the largest from the trials."""
    job = tiny_job(tmp_path)
    del job["training"]["epochs"]
    file = tiny_search(tmp_path, job=job, budget={"trials": 1}, pruner="hyperband")
    assert run_search(file, network=Net).trials["complete"] == 1


def test_several_objectives_give_a_front(tmp_path: Path) -> None:
    """No trial of the front is worse in both than another trial; all others are."""
    file = tiny_search(tmp_path, objective=["loss", "parameters"], budget={"trials": 5})
    found = run_search(file, network=Net)
    values = {n: (r["after"]["loss"], r["trained"]) for n, r in results_of(tmp_path).items()}

    def beaten(own: Any) -> bool:
        return any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in values.values())

    front = sorted(n for n, own in values.items() if not beaten(own))
    assert [int(run.name) for run in found.runs] == front
    sizes = {(48 + 16) * rank + (16 + 2) * min(rank, 2) for rank in range(1, 5)}
    assert {trained for _, trained in values.values()} <= sizes
    assert "no trial is better in all" in found.report.read_text(encoding="utf-8")


def test_what_is_beyond_the_budget_of_parameters_is_not_run(tmp_path: Path) -> None:
    """Ranks 1 and 2 fit into 164 parameters; the others do not count as trials."""
    file = tiny_search(tmp_path, budget={"trials": 5, "parameters": 164}, sampler="random")
    found = run_search(file, network=Net)
    assert {r["trained"] for r in results_of(tmp_path).values()} <= {82, 164}
    assert found.trials["complete"] + found.trials["failed"] <= 5
    beyond = [t for t in trials_of(tmp_path) if t.params["rank"] > 2]
    assert beyond
    assert all(t.state.name == "PRUNED" for t in beyond)


def test_a_search_whose_trials_all_fail_says_why(tmp_path: Path) -> None:
    vary = {"optimizer_options": [{"momentum": 1}, {"momentum": 2}, {"momentum": 3}]}
    with pytest.raises(JobError) as error:
        run_search(tiny_search(tmp_path, vary=vary, sampler="random"), network=Net)
    assert "the first trials all failed" in str(error.value)
    assert "momentum" in str(error.value)


def test_another_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    run_search(tiny_search(tmp_path, budget={"trials": 1}), network=Net)
    with pytest.raises(JobError, match=r"has another search.*\n.*vary is another one"):
        run_search(tiny_search(tmp_path, vary={"lr": [0.1, 0.2]}), network=Net)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown setting": ({"bugdet": {}}, "bugdet: there is no such setting, closest: 'budget'"),
    "an unknown setting inside": (
        {"budget": {"trails": 3}}, "budget.trails: there is no such setting, closest: 'trials'",
    ),
    "no end": ({"budget": {"parameters": "1k"}}, "budget: give trials, hours or both"),
    "a budget that is none": (
        {"budget": {"trials": 1, "parameters": "many"}}, "the budget is 'many', expected",
    ),
    "a setting that does not exist": ({"vary": {"lrr": [1]}}, "lrr: there is no setting 'lrr'"),
    "an objective": ({"objective": "acuracy"}, "there is no 'acuracy', closest: 'accuracy'"),
    "an objective that is not computed": ({"objective": "auroc"}, "auroc: it is not computed"),
    "forgetting of nothing": ({"objective": "forgetting"}, "the job has no data.old"),
    "an error in its job": ({"job": {"data": {}}}, "data.kind: this is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "expected"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_search_is_said(
    tmp_path: Path, parts: dict[str, Any], expected: str
) -> None:
    with pytest.raises(JobError) as error:
        run_search(tiny_search(tmp_path, **parts), network=Net)
    assert expected in str(error.value)
    assert not (tmp_path / "search").exists()
