"""The commands: from a first file to a merged network, and errors as people read them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import gift
from gift.cli.app import app
from gift.jobs import KINDS, Run, init_text, read_job
from gift.strategies import LoRALinearFineTuningStrategy
from gift.utils.info import collect_trainable_parameters, table_info, table_methods
from gift.zoo import load_network
from tests.job_examples import CHEAP, image_job, text_job

OWN = """
import torch
from torch import nn

def make():
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 2))
"""


def gift_(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def good(*arguments: str | Path) -> str:
    done = gift_(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def bad(*arguments: str | Path, code: int = 1) -> str:
    """What is told on standard error; nothing else is printed, and there is no traceback."""
    done = gift_(*arguments)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.stderr


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return gift.inspect(folder / "last.safetensors").tensors


@pytest.fixture
def run(tmp_path: Path) -> Path:
    good("finetune", text_job(tmp_path, training=CHEAP | {"lr": 0.1}))
    return tmp_path / "run"


def test_from_a_job_to_a_merged_network(tmp_path: Path) -> None:
    """Each command tells what the same call in code gives."""
    job = text_job(tmp_path, training=CHEAP | {"lr": 0.1})
    output = good("finetune", job, "--set", "training.epochs=2", "--set", "folder=own")
    folder = tmp_path / "own"
    assert f"All files are in {folder}, the job is {folder / 'job.yaml'}" in output
    run = Run(folder)
    assert run.job.training.epochs == 2
    assert (folder / "report.html").is_file()
    assert good("finetune", job, "--set", "training.epochs=2", "--set", "folder=own") == output

    values = run.evaluate()
    assert json.loads(good("evaluate", folder, "--json")) == pytest.approx(values)
    shown = dict(line.split() for line in good("evaluate", folder).splitlines())
    assert {name: float(text) for name, text in shown.items()} == pytest.approx(values, rel=1e-4)
    other = json.loads(good("evaluate", folder, "--json", "--data", tmp_path / "data/train.tsv"))
    assert other == pytest.approx(run.evaluate(tmp_path / "data/train.tsv"))
    assert other["loss"] != values["loss"]
    last = json.loads(good("evaluate", folder, "--json", "--delta", folder / "last.safetensors"))
    assert last == pytest.approx(run.evaluate(which="last"))

    found = run.predict(["good film", "bad plot"], top=2)
    assert good("predict", folder, "good film", "bad plot", "--top", "2").splitlines() == [
        str(prediction) for prediction in found
    ]
    [first, _] = json.loads(good("predict", folder, "good film", "bad plot", "--json"))
    assert (first["input"], first["label"]) == ("good film", found[0].label)
    assert first["probabilities"] == pytest.approx(found[0].probabilities)

    good("merge", folder, tmp_path / "model of mine")
    merged = load_network(f"transformers:{tmp_path / 'model of mine'}")
    assert merged.classes == ("cross", "pleased")
    good("merge", folder / "last.safetensors", tmp_path / "merged.pt", "--network",
         f"transformers:{tmp_path / 'model'}")  # fmt: skip
    assert torch.load(tmp_path / "merged.pt").keys() == merged.net.state_dict().keys()
    assert "LoRALinearFineTuningStrategy(rank=1" in good("show", folder / "best.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_init_gives_a_job_of_each_kind(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "job.yaml"
    assert good("init", "--kind", kind) == init_text(kind)
    assert str(file) in good("init", file, "--kind", kind)
    assert file.read_text(encoding="utf-8") == init_text(kind)
    assert read_job(file).data.kind == kind
    file.write_text("mine")
    assert "is there already" in bad("init", file)
    assert file.read_text() == "mine"
    good("init", file, "--force", "--strategy", "DoRALinearFineTuningStrategy")
    assert read_job(file).strategy.name == "DoRALinearFineTuningStrategy"


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a strategy by name, with settings, or from a file; or of all methods."""
    (tmp_path / "mine_for_tables.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    name = "import:mine_for_tables:make"
    net = load_network(name, allow_import=True).net
    assert good("table", name) == table_methods(net) + "\n"
    strategy = LoRALinearFineTuningStrategy(rank=1)
    strategy.save_init_paras(tmp_path / "strategy.yaml")
    gift.enable_fine_tuning(net, strategy)
    rows, total = collect_trainable_parameters(net)
    by_name = good("table", name, "LoRALinearFineTuningStrategy", "--set", "rank=1")
    assert by_name.startswith(table_info(rows))
    assert f"{total:,} of " in by_name
    assert good("table", name, tmp_path / "strategy.yaml") == by_name
    resnet = good("table", "torchvision:resnet18", "LoRAAllFineTuningStrategy")
    assert "75,063 of 11,764,575 parameters are trainable" in resnet


def test_own_networks_are_named_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_for_runs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    strategy = {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}, "head": "keep"}
    job, own = image_job(tmp_path, network=None, strategy=strategy), "import:mine_for_runs:make"
    changes = ("--set", "data.reader.size=8")
    assert "the job names no network" in bad("finetune", job, *changes)
    good("finetune", job, *changes, "--network", own)
    folder, image = tmp_path / "run", tmp_path / "data/val/warm/0.png"
    assert "is code" in bad("predict", folder, image)
    said = good("predict", folder, image, "--network", own)
    assert said.endswith("%\n")
    assert {"cold", "warm"} & {*said.split()}
    good("merge", folder, tmp_path / "merged.safetensors", "--network", own)
    named = load_network(own, str(tmp_path / "merged.safetensors"), allow_import=True)
    assert not [n for n in named.net.state_dict() if "lora" in n]


WRONG: dict[str, tuple[list[str], str]] = {
    "no such job": (["finetune", "nowhere.yaml"], "there is no file nowhere.yaml"),
    "a wrong setting": (["finetune", "{job}", "--set", "training.epoch=1"], "closest: 'epochs'"),
    "no such folder": (["finetune", "{job}", "--set", "data.train=nowhere"], "nowhere"),
    "no such network": (
        ["finetune", "{job}", "--set", "network.name=torchvision:resnet19"], "closest: ['resnet18'"
    ),
    "no such metric": (["finetune", "{job}", "--set", "training.metrics=[f2]"], "f2"),
    "no such optimizer": (["finetune", "{job}", "--set", "training.optimizer=Adom"], "'Adam'"),
    "no such device": (["finetune", "{job}", "--set", "training.device=tpu"], "tpu"),
    "a rank that no weight has": (
        ["finetune", "{job}", "--set", "strategy=LoRAAllFineTuningStrategy",
         "--set", "strategy.init_paras.rank=100000"], "rank",
    ),
    "nothing is trained": (["finetune", "{job}", "--set", "strategy=FreezeStrategy", "--set",
                            "strategy.head=keep", "--set", "network.options.num_classes=2"],
                           "nothing is trained"),
    "code in a file": (
        ["finetune", "{job}", "--set", "network.name=import:os:getcwd"], "may not name code"
    ),
    "code in options": (
        ["finetune", "{job}", "--set", "network.options.allow_import=true"],
        "network.options: allow_import: this is not an option of a network",
    ),
    "no such code": (["table", "import:no_such_module:make"], "no_such_module"),
    "code that makes no network": (["table", "import:os:getcwd"], "expected a nn.Module"),
    "no run": (["predict", "nowhere", "x.png"], "nowhere is not the folder of a run"),
    "no run to judge": (["evaluate", "nowhere"], "nowhere is not the folder of a run"),
    "no such method": (["table", "timm:x", "LoRAStr"], "there is no 'LoRAStr'"),
    "settings of nothing": (["table", "torchvision:resnet18", "--set", "rank=2"], "name one"),
    "nothing to merge": (["merge", "nowhere", "out.pt"], "nowhere is not the folder of a run"),
    "a delta of nothing": (["merge", "data/val/warm/0.png", "out.pt"], "say which network it is"),
    "no delta": (["merge", "{job}", "out.pt", "--network", "torchvision:resnet18", "--weights",
                  "nowhere.pt"], "nowhere.pt"),
    "no file to show": (["show", "nowhere.safetensors"], "nowhere.safetensors"),
    "no delta to show": (["show", "{job}"], "cannot be read"),
    "no such kind": (["init", "--kind", "pictures"], "there is no kind 'pictures'"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=WRONG)
def test_errors_are_one_message(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard error, with exit code 1; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    job = image_job(tmp_path)
    before = {p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".safetensors")}
    assert expected in bad(*(text.format(job=job) for text in arguments))
    assert {p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".safetensors")} == before


def test_wrong_inputs_of_a_run_are_one_message(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_text("text\tlabel\na film\tangry\n")
    assert "angry" in bad("evaluate", run, "--data", other)
    assert "there is no such file" in bad("evaluate", run, "--data", tmp_path / "none.tsv")
    assert "none.safetensors" in bad("evaluate", run, "--delta", tmp_path / "none.safetensors")
    assert "there is no device 'tpu'" in bad("predict", run, "a film", "--device", "tpu")
    assert "--data" in bad("evaluate", run, "--data", "a", "--data", "b", code=2)
    assert "--top" in bad("predict", run, "a film", "--top", "0", code=2)
    assert "INPUTS" in bad("predict", run, code=2)
    delta = run / "best.safetensors"
    delta.write_bytes(delta.read_bytes()[:-3])
    assert "cannot be read" in bad("predict", run, "a film")
    (tmp_path / "model" / "config.json").unlink()
    assert "/model' cannot be made" in bad("evaluate", run, "--delta", "last")


def test_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    """Whose weights changed since."""
    net: Any = load_network(f"transformers:{tmp_path / 'model'}").net
    with torch.no_grad():
        net.bert.embeddings.word_embeddings.weight.add_(1)
    net.save_pretrained(tmp_path / "model")
    assert "word_embeddings" in bad("predict", run, "a film")


def test_gift_itself() -> None:
    assert good("--version") == f"gift {gift.__version__}\n"
    output = good("--help")
    for command in ("init", "finetune", "find-lr", "predict", "evaluate", "show", "table",
                    "suggest", "merge", "export", "push"):  # fmt: skip
        assert f"\n  {command} " in output
        assert "Usage: " in good(command, "--help")


def test_a_variable_asks_for_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIFT_TRACEBACK", "1")
    done = gift_("show", "nowhere.safetensors")
    assert isinstance(done.exception, FileNotFoundError)


def test_what_is_no_error_of_gift_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("gift.jobs.init_text", broken)
    message = bad("init")
    assert (
        message
        == "ZeroDivisionError: division by zero\n(GIFT_TRACEBACK=1 shows where this comes from)\n"
    )


def test_warnings_are_lines_without_code(tmp_path: Path, recwarn: Any) -> None:
    done = gift_("table", "torchvision:resnet18", "LoRAAllFineTuningStrategy", "--set", "rank=2000",
                 "--set", "clip_rank=true")  # fmt: skip
    assert done.exit_code == 0
    assert done.stderr.startswith("warning: the delta has more parameters than the weight")
    assert ".py" not in done.stderr


def test_control_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gift.jobs.running.finetune", stopped)
    job = image_job(tmp_path)
    assert "the same command resumes from the last checkpoint" in bad("finetune", job, code=130)


def test_two_processes_do_one_job(tmp_path: Path) -> None:
    """The weights of a single process up to rounding; the first one alone prints and writes."""
    job = text_job(tmp_path, training=CHEAP | {"epochs": 2, "lr": 0.01})
    several = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, "-m", *several, "-m", "gift", "finetune", str(job)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("All files are in") == 1
    good("finetune", job, "--set", "folder=single")
    two, one = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "single")
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    names = [{p.name for p in (tmp_path / part).iterdir()} for part in ("run", "single")]
    assert names[0] == names[1]
