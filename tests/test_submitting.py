"""What is submitted, with an engine that only notes it; real ones are in tests/engines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gift.cli.app import app
from gift.errors import JobError
from gift.jobs import Job, read_job
from gift.many import submissions, submitting
from gift.many.engines.base import Listed, State, task_command
from gift.many.engines.local import Here
from gift.many.engines.ray_cluster import _unmet as lacks_ray
from gift.many.engines.slurm_cluster import Slurm, _minutes, _Nodes, _unmet
from gift.many.parts import run_part
from gift.many.task import run_task
from tests.many_examples import Net, tiny_job, tiny_search

pytestmark = pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning")


class Notes:
    """An engine whose queue is a list."""

    name = "slurm"
    slots = None
    network = "import:tests.many_examples:Net"
    options = {"partition": "short"}

    def __init__(self) -> None:
        self.queue: list[Listed] = []
        self.lacks: list[str] = []

    def problems(self, jobs: Sequence[Job]) -> list[str]:
        return self.lacks

    def start_all(self, folders: Sequence[Path]) -> list[str]:
        made = [Listed(f"{len(self.queue) + n}", "slurm", State.QUEUED, folder)
                for n, folder in enumerate(folders)]  # fmt: skip
        self.queue += made
        return [one.id for one in made]

    def listed(self) -> list[Listed]:
        return self.queue


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIFT_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("gift.training.loop.write_report", lambda result, folder: None)


def files_in(folder: Path, *names: str, **parts: Any) -> list[Path]:
    place = folder / "jobs"
    place.mkdir(exist_ok=True)
    for name in names:
        text = yaml.safe_dump(tiny_job(place) | {"folder": name} | parts)
        (place / f"{name}.yaml").write_text(text, encoding="utf-8")
    return [place / f"{name}.yaml" for name in names]


def test_a_folder_of_jobs_is_queued_but_not_what_is_done(tmp_path: Path) -> None:
    """Its results are fetched without the checkpoint, and its state is that of the engine."""
    files = files_in(tmp_path, "a", "b", resources={"cpus": 2})
    run_task(read_job(files[0]), Net())
    engine = Notes()
    [one] = submitting.submit([tmp_path / "jobs"], engine)
    assert one.folder == str(tmp_path / "jobs" / "b")
    assert read_job(Path(one.folder) / "task.yaml").resources.cpus == 2
    rows, silent = submitting.jobs([engine])
    assert [(r.id, r.state, r.folder) for r in rows] == [("0", State.QUEUED, Path(one.folder))]
    assert silent == []
    assert submissions.find(one.folder) == submissions.find("0") == one
    with pytest.raises(JobError, match="has no results yet"):
        submitting.fetch("0", tmp_path / "here")
    run_task(read_job(files[1]), Net())
    engine.queue.clear()  # as engines forget
    rows, _ = submitting.jobs([engine])
    assert [(r.state, r.note) for r in rows] == [(State.DONE, "by its folder")]
    names = {file.name for file in submitting.fetch("0", tmp_path / "here")}
    assert {"job.yaml", "inputs.json", "best.safetensors", "result.json"} <= names
    assert "checkpoint.pt" not in names
    with pytest.raises(JobError, match="is there already"):
        submitting.fetch("0", tmp_path / "here")
    with pytest.raises(JobError, match="is done"):
        submitting.resume("0")


def test_all_that_is_missing_is_said_and_nothing_is_queued(tmp_path: Path) -> None:
    files = files_in(tmp_path, "a", "b")
    text = files[1].read_text().replace("folder: b", "folder: a").replace("data/val", "data/vall")
    files[1].write_text(text)
    (tmp_path / "empty").mkdir()
    engine = Notes()
    engine.lacks = ["resources: no node has 4 GPUs"]
    with pytest.raises(JobError) as error:
        submitting.submit([*files, tmp_path / "empty"], engine)
    for part in ("there is no", "vall", "several jobs have this folder", "4 GPUs", "no job files"):
        assert part in str(error.value)
    assert engine.queue == []
    assert not (tmp_path / "jobs" / "a").exists()
    engine.lacks, engine.network = [], None  # type: ignore[assignment]
    with pytest.raises(JobError, match="network: name one"):
        submitting.submit(files[:1], engine)
    with pytest.raises(JobError, match="nothing was submitted as 7"):
        submissions.find("7")


def test_a_search_is_queued_as_parts_that_share_its_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is a job; together they run no more trials than the search has."""
    pytest.importorskip("optuna")
    monkeypatch.setattr("gift.many.pages.write_images", lambda *arguments: [])
    monkeypatch.setattr("gift.many.searching._EACH", 0.02)
    monkeypatch.setattr("gift.many.parts.Processes", lambda *arguments: Here(Net))
    file = tiny_search(tmp_path, parallel=2, budget={"trials": 3})
    engine = Notes()
    made = submitting.submit([file], engine)
    folders = [tmp_path / "search" / "parts" / name for name in ("00", "01")]
    assert [Path(one.folder) for one in made] == folders
    assert [row.state for row in submitting.jobs([engine])[0]] == [State.QUEUED] * 2
    for folder in folders:
        assert "torch.distributed.run" not in task_command(folder, processes=2)
        run_part(folder, Notes.network, lambda text: None)
    results = list((tmp_path / "search" / "trials").glob("*/result.json"))
    assert len(results) == 3
    engine.queue.clear()
    assert [row.state for row in submitting.jobs([engine])[0]] == [State.DONE] * 2
    assert submitting.submit([file], engine) == []
    assert {"best.yaml", "report.html"} <= {f.name for f in submitting.fetch("0", tmp_path / "to")}
    more = tiny_search(tmp_path, parallel=2, budget={"trials": 4})
    assert len(submitting.submit([more], engine)) == 2
    wrong = tiny_search(tmp_path, objective="forgetting")
    with pytest.raises(JobError, match="forgetting"):
        submitting.submit([wrong], engine)


@pytest.mark.parametrize(("memory", "megabytes"), [("16GB", 16_000), ("512MiB", 536), (None, None)])
def test_memory_of_a_job(tmp_path: Path, memory: str | None, megabytes: int | None) -> None:
    [file] = files_in(tmp_path, "a", resources={"memory": memory})
    assert read_job(file).resources.megabytes == megabytes
    [file] = files_in(tmp_path, "a", resources={"memory": "much"})
    with pytest.raises(JobError, match=r"resources\.memory: this is 'much', expected a size such"):
        read_job(file)


def test_what_sinfo_says_of_nodes() -> None:
    """Its forms, from the manual of sinfo; a need that only different nodes meet is unmet."""
    limits = {"infinite": float("inf"), "1-02:30:00": 1590, "30:00": 30, "2:00:00": 120}
    assert {text: _minutes(text) for text in limits} == limits
    big = _Nodes("a", "1:00:00", "64", "100000+", "(null)")
    gpu = _Nodes("a", "infinite", "4", "8000", "gpu:a100:2(S:0-1),gpu:t4:1")
    assert (big.gpus, gpu.gpus) == (0, 3)
    job = {"data": {"kind": "class_folders", "train": "x"}, "resources": {"cpus": 8, "gpus": 1}}
    assert "no node has all of" in _unmet(Job.model_validate(job).resources, [big, gpu])
    job["resources"] = {"cpus": 4, "gpus": 3, "hours": 500}
    assert _unmet(Job.model_validate(job).resources, [big, gpu]) == ""


def test_what_nodes_of_ray_lack() -> None:
    """A need that only different nodes meet is unmet; memory is unknown before Ray is started."""
    big, gpu = {"CPU": 64.0, "memory": 64e9}, {"CPU": 4.0, "GPU": 2.0, "memory": 16e9}
    data = {"kind": "class_folders", "train": "x"}

    def lacks(nodes: list[dict[str, float]], **resources: Any) -> str:
        job = Job.model_validate({"data": data, "resources": resources})
        return lacks_ray(job.resources, nodes)

    assert lacks([big, gpu], cpus=4, gpus=2, memory="16GB", hours=500) == ""
    assert lacks([big, gpu], cpus=8, gpus=1) == (
        "resources: no node has all of 8 processors, 1 GPUs"
    )
    assert lacks([big, gpu], cpus=65, gpus=4) == "resources: no node has 65 processors and 4 GPUs"
    assert lacks([big], memory="900GB") == "resources: no node has 900GB of memory"
    assert lacks([{"CPU": 2.0}], memory="900GB") == ""


@pytest.mark.parametrize(
    ("on", "option", "value"),
    [("slurm", "--address", "http://127.0.0.1:8265"), ("ray", "--sbatch", "partition=long")],
)
def test_options_of_the_other_engine_are_refused(
    on: str, option: str, value: str, tmp_path: Path
) -> None:
    [file] = files_in(tmp_path, "a")
    said = CliRunner().invoke(app, ["submit", str(file), "--on", on, option, value])
    assert said.exit_code == 2
    assert option in said.output
    assert not (tmp_path / "jobs" / "a").exists()


def test_without_slurm_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    assert "there is no sbatch or squeue or srun here" in Slurm().problems([])[0]


def test_submissions_are_plain_files(tmp_path: Path) -> None:
    """A file of them that is damaged hides no other."""
    submitting.submit(files_in(tmp_path, "a"), Notes())
    (tmp_path / "state" / "broken.json").write_text("{")
    [one] = submissions.remembered()
    content = json.loads((tmp_path / "state" / "slurm-0.json").read_text())
    assert content == {
        "id": "0", "engine": "slurm", "folder": one.folder,
        "options": {"partition": "short"}, "network": Notes.network,
    }  # fmt: skip
