"""The command line without a job file, and after a run: tables, exports, cards, the hub."""

import base64
import csv
import io
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

import gift
from gift.jobs import Run, guess_job
from gift.jobs.exporting import example_batch
from gift.jobs.inputs import as_csv
from gift.training import Detected
from gift.training.lr_finder import find_lr
from tests.job_examples import CHEAP, bert, image_job, images, text_job, texts
from tests.test_cli_commands import OWN, bad, good

QUICK = [part for name, value in CHEAP.items() for part in ("--set", f"training.{name}={value}")]
QUICK += ["--set", "strategy.init_paras.rank=1"]


@pytest.fixture(scope="module")
def texts_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table, started without a job file."""
    folder = tmp_path_factory.mktemp("texts")
    texts(folder / "data")
    bert(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = good("finetune", "data/train.tsv", "--network", "transformers:model", *QUICK)
    assert "train-run" in said
    return folder / "train-run"


def test_a_table_needs_no_job_file(texts_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds columns and the table beside it; the job that it writes runs as it is."""
    run = Run(texts_run)
    assert (run.job.data.kind, run.classes) == ("text_table", ("cross", "pleased"))
    assert run.job.data.valid == {"path": str(texts_run.parent / "data" / "val.tsv")}
    assert run.job.network is not None
    assert run.job.network.name == f"transformers:{texts_run.parent / 'model'}"
    before = gift.inspect(texts_run / "last.safetensors").tensors
    good("finetune", texts_run / "job.yaml")
    after = gift.inspect(texts_run / "last.safetensors").tensors
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("has_parts", [True, False])
def test_a_folder_needs_no_job_file(
    has_parts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = images(tmp_path / "pictures")
    job = guess_job(place if has_parts else place / "train")
    assert (job.data.kind, job.data.options) == ("class_folders", {"augment": True})
    assert job.network is not None
    assert job.network.name == "torchvision:resnet18"
    valid = {"path": str(place / "val")} if has_parts else None
    assert (job.data.valid, job.data.valid_share) == (valid, None if has_parts else 0.2)
    assert job.data.train == {"path": str(place / "train")}
    assert job.folder == str(tmp_path / ("pictures-run" if has_parts else "train-run"))


TABLES = {
    "with names": ("id,review,stars\n" + "1,a long and good film,up\n2,a dull one it is,down\n" * 3,
                   "text_table", {"text": "review", "label": "stars"}),
    "without a header": ("a long and good film,up\na dull one it is,down\n" * 3,
                         "text_table", {"text": 0, "label": 1}),
    "of images": ("file,kind\n" + "a.png,warm\nb.png,cold\n" * 3,
                  "picture_table", {"path": "file", "label": "kind"}),
}  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "options"), TABLES.values(), ids=TABLES)
def test_columns_are_found(text: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(text)
    job = guess_job(tmp_path / "table.csv")
    assert (job.data.kind, job.data.options) == (kind, options)
    assert job.data.valid_share == 0.2


WRONG = {
    "numbers": ("a,b,label\n" + "1,2.5,0\n3,4.5,1\n" * 4, "numbers only"),
    "no classes": ("text,label\n" + "".join(f"word {n},{n}.5\n" for n in range(9)), "not classes"),
    "one column": ("text\na\nb\n", "expected rows with an input and a label"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_not_clear_is_said(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(text)
    assert message in bad("finetune", tmp_path / "table.csv")
    assert "expected a folder of images for each class" in bad("finetune", tmp_path / "..")


def test_predictions_of_tables_and_as_tables(texts_run: Path, tmp_path: Path) -> None:
    table, out = texts_run.parent / "data" / "val.tsv", tmp_path / "found.csv"
    rows = list(csv.DictReader(table.open(newline=""), delimiter="\t"))
    expected = Run(texts_run).predict([row["text"] for row in rows])
    assert f"{out} has 6 predictions" in good("predict", texts_run, table, "--out", out)
    found = list(csv.DictReader(out.open(newline="")))
    assert [row["input"] for row in found] == [row["text"] for row in rows]
    assert [row["label"] for row in found] == [one.label for one in expected]
    for row, one in zip(found, expected, strict=True):
        assert float(row["pleased"]) == pytest.approx(one.probabilities["pleased"])
    printed = csv.DictReader(io.StringIO(good("predict", texts_run, "a film", table, "--csv")))
    assert len(list(printed)) == 7
    good("predict", texts_run, table, "--out", tmp_path / "found.json")
    assert len(json.loads((tmp_path / "found.json").read_text())) == 6
    assert "expected a .csv or a .json" in bad("predict", texts_run, "a", "--out", "found.txt")
    assert "there is no column 'text'" in bad("predict", texts_run, _other_columns(tmp_path))


def _other_columns(folder: Path) -> Path:
    (folder / "other.csv").write_text("words,label\na film,1\n")
    return folder / "other.csv"


def test_detected_objects_are_rows_of_their_own() -> None:
    two = Detected("a.png", [[0, 1, 2, 3], [4, 5, 6, 7]], ["cat", "dog"], [0.9, 0.5])
    none = Detected("b.png", [], [], [])
    rows = list(csv.DictReader(io.StringIO(as_csv([two, none]))))
    assert [(row["input"], row["label"], row["bottom"]) for row in rows] == [
        ("a.png", "cat", "3"), ("a.png", "dog", "7"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def images_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an own network, which was named once."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "mine_to_export.py").write_text(OWN)
    strategy = {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}, "head": "keep"}
    reader = {"reader": {"size": 8}}
    job = image_job(folder, network=None, strategy=strategy)
    config = yaml.safe_load(job.read_text())
    config["data"] |= reader
    job.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        good("finetune", job, "--network", "import:mine_to_export:make")
    return folder / "run"


def test_an_own_network_is_named_once(
    images_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its code runs only where that is allowed."""
    monkeypatch.syspath_prepend(images_run.parent)
    image = images_run.parent / "data/val/warm/0.png"
    refused = bad("predict", images_run, image)
    assert "'import:mine_to_export:make' is code" in refused
    assert "--allow-import" in refused
    named = good("predict", images_run, image, "--network", "import:mine_to_export:make")
    assert good("predict", images_run, image, "--allow-import") == named
    folder = images_run.parent / "data/val"
    assert len(good("predict", images_run, folder, "--allow-import").splitlines()) == 8
    pattern = f"{folder}/*/[01].png"
    found = good("predict", images_run, pattern, "--allow-import").splitlines()
    assert len(found) == 4
    assert "there are no inputs" in bad("predict", images_run, f"{folder}/*.gif", "--allow-import")
    assert "is code" in bad("finetune", images_run.parent / "job.yaml")
    good("finetune", images_run.parent / "job.yaml", "--allow-import")
    other = shutil.copytree(images_run, tmp_path / "strange")
    (other / "network.txt").write_text("os:getcwd\n")
    assert "expected import:module:function" in bad("predict", other, image, "--allow-import")


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_exports_compute_what_the_network_does(
    kind: str, suffix: str, texts_run: Path, images_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also for other numbers of examples and lengths of texts than those of the export."""
    monkeypatch.syspath_prepend(images_run.parent)
    folder, out = texts_run if kind == "texts" else images_run, tmp_path / f"model{suffix}"
    said = good("export", folder, out, "--allow-import")
    assert "batch" in said
    assert ("length" in said) == (kind == "texts")
    run = Run(folder, allow_import=True)
    if kind == "texts":
        words = ["good film", "bad plot a the film", "fine"]
        batch = dict(run.reader.collate([run.reader(text) for text in words]))
        known = example_batch(run)
        inputs = {name: batch[name] for name in known}
        expected = run.network()(**inputs).logits
    else:
        inputs = {"inputs": torch.rand(3, 3, 8, 8)}
        expected = run.network()(inputs["inputs"])
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(out))
        arrays = {name: value.numpy() for name, value in inputs.items()}
        assert {one.name for one in session.get_inputs()} == {*inputs}
        found = torch.from_numpy(numpy.array(session.run(None, arrays)[0]))
    else:
        found = torch.export.load(str(out)).module()(*inputs.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "model.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "gift"
    assert front["pipeline_tag"] == f"{'text' if kind == 'texts' else 'image'}-classification"
    assert f"accuracy | {run.result.before['accuracy']:.4g}"[:14] in card
    assert "expected one of .onnx, .pt2" in bad("export", folder, "x.txt", "--allow-import")


def test_a_run_is_shown(texts_run: Path, tmp_path: Path) -> None:
    shown = good("show", texts_run)
    strategy = Run(texts_run).job.strategy.name
    for text in ("text_table", strategy, "cross, pleased", "log.txt"):
        assert text in shown
    result = Run(texts_run).result
    assert f"{result.after['loss']:.4g}"[:5] in shown
    stopped = shutil.copytree(texts_run, tmp_path / "stopped")
    (stopped / "result.json").unlink()
    assert "the run has not ended" in good("show", stopped)
    assert "is not the folder of a run" in bad("show", tmp_path)


def test_learning_rates_and_ranks_are_suggested(tmp_path: Path) -> None:
    """By the same functions as in Python."""
    job = text_job(tmp_path)
    said = good("find-lr", job, "--steps", "5", "--plot", tmp_path / "rates.png")
    assert said.startswith("5 rates from 1e-07 to 10")
    assert Image.open(tmp_path / "rates.png").format == "PNG"
    assert not (tmp_path / "run").exists()
    assert callable(find_lr)
    net = gift.zoo.load_network("torchvision:squeezenet1_1", weights=None).net
    expected = gift.suggest(net, 50_000)
    assert good("suggest", "torchvision:squeezenet1_1", "--budget", "50000") == f"{expected}\n"
    assert "too small" in bad("suggest", "torchvision:squeezenet1_1", "--budget", "3")


def test_messages_use_the_words_of_the_command_line(texts_run: Path, tmp_path: Path) -> None:
    table = tmp_path / "other.tsv"
    table.write_text("text\tlabel\na film\tbad\na plot\tfine\n")
    refused = bad("evaluate", texts_run, "--data", table)
    assert "bad" in refused
    values = json.loads(
        good("evaluate", texts_run, "--data", table, "--classes", "bad,fine", "--json")
    )
    same = tmp_path / "same.tsv"
    same.write_text("text\tlabel\na film\tcross\na plot\tpleased\n")
    assert values == pytest.approx(Run(texts_run).evaluate(same))
    assert "there are 1 names of classes" in bad(
        "evaluate", texts_run, "--data", table, "--classes", "bad"
    )
    one = tmp_path / "one.tsv"
    one.write_text("text\tlabel\na film\tcross\nthe plot\tcross\na a\tcross\n")
    refused = bad("finetune", texts_run / "job.yaml", "--set", f"data.train={one}",
                  "--set", f"folder={tmp_path / 'x'}")  # fmt: skip
    assert "--classes A,B,..." in refused
    assert "classes=" not in refused
    changed = bad("finetune", texts_run / "job.yaml", "--set", "training.lr=0.5")
    assert "--restart" in changed
    assert "restart=True" not in changed


class Hub(BaseHTTPRequestHandler):
    """The documented endpoints of the hub that an upload needs."""

    seen: list[tuple[str, Any]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        base = f"http://{self.headers['Host']}"
        answer: Any = {}
        if self.path == "/api/repos/create":
            given = json.loads(body)
            if given["name"] == "forbidden":
                self._answer(403, {"error": "not yours"})
                return
            Hub.seen.append(("create", given))
            answer = {"url": f"{base}/me/{given['name']}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            known = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": file["path"], **known} for file in files]}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            Hub.seen.append(("commit", lines))
            answer = {"commitUrl": f"{base}/me/tuned/commit/{'a' * 40}", "commitOid": "a" * 40}
        self._answer(200, answer)

    def do_GET(self) -> None:
        if "forbidden" in self.path:
            self._answer(404, {"error": "not found"})
            return
        self._answer(200, {"id": "me/tuned", "sha": "a" * 40, "siblings": []})

    def _answer(self, code: int, answer: Any) -> None:
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real HfApi talks to a server on this machine."""
    from huggingface_hub import constants, hf_api

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(hf_api, "ENDPOINT", address, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    Hub.seen.clear()
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_delta_is_uploaded_with_its_card(hub: None, texts_run: Path, tmp_path: Path) -> None:
    """What arrives is what is in the folder, without the paths of this machine."""
    assert "/me/tuned/commit/" in good("push", texts_run, "me/tuned", "--private")
    created = dict(Hub.seen)["create"]
    assert (created["name"], created.get("organization")) == ("tuned", "me")
    lines = dict(Hub.seen)["commit"]
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
             for line in lines if line["key"] == "file"}  # fmt: skip
    assert files["best.safetensors"] == (texts_run / "best.safetensors").read_bytes()
    assert {"README.md", "inputs.json", "job.yaml"} <= {*files}
    assert any(name.startswith("tokenizer/") for name in files)
    for name in ("README.md", "job.yaml"):
        assert str(texts_run.parent) not in files[name].decode()
    assert 'gift.load(net, hf_hub_download("me/tuned", "best.safetensors"))' in (
        files["README.md"].decode()
    )
    net = Run(texts_run).base
    assert net is None
    (tmp_path / "fetched.safetensors").write_bytes(files["best.safetensors"])
    assert gift.inspect(tmp_path / "fetched.safetensors").tensors
    assert "was not uploaded" in bad("push", texts_run, "me/forbidden")
