"""Job files: what is read, and how all that is wrong with one is told."""

import inspect
import random
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from gift.jobs import KINDS, Job, JobError, init_text, read_job, write_job
from gift.jobs.kinds import DataKind
from gift.jobs.models import Strategy
from gift.support.recipes import REGISTRY
from gift.training import Settings

GOOD = """
network: {name: "torchvision:resnet18"}
data:
  kind: class_folders
  train: pictures
"""
JARGON = ("Traceback", "Input should", "validation error", "pydantic", "errors.", "NoneType")


def job_of(folder: Path, text: str, *changes: str) -> Job:
    (folder / "job.yaml").write_text(text, encoding="utf-8")
    return read_job(folder / "job.yaml", changes)


def refused(folder: Path, text: str, *changes: str) -> str:
    with pytest.raises(JobError) as error:
        job_of(folder, text, *changes)
    message = str(error.value)
    assert not any(word in message for word in JARGON), message
    return message


# What is added to the good job, and what the error must say.
WRONG = {
    "an unknown setting": (
        "trainning: {}",
        "line 6, trainning: there is no such setting, closest: 'training'",
    ),
    "an unknown setting inside": (
        "training:\n  epoch: 3",
        "line 7, training.epoch: there is no such setting, closest: 'epochs'",
    ),
    "a word for a number": (
        "training: {epochs: three}",
        "training.epochs: this is 'three', expected a whole number",
    ),
    "half an epoch": (
        "training: {epochs: 2.5}",
        "training.epochs: this is 2.5, expected a whole number",
    ),
    "a rate that is none": (
        "training: {lr: .nan}",
        "training.lr: this is nan, expected a finite number",
    ),
    "a text for a switch": (
        "training: {compile: perhaps}",
        "training.compile: this is 'perhaps', expected true or false",
    ),
    "one metric, no list": (
        "training: {metrics: f1}",
        "training.metrics: this is 'f1', expected a list",
    ),
    "a number for a name": (
        "training: {optimizer: 3}",
        "training.optimizer: this is 3, expected a text",
    ),
    "out of range": (
        "training: {epochs: 0, warmup: 2}",
        "epochs is 0, expected a whole number of at least 1; warmup is 2.0",
    ),
    "no settings": ("training: 3", "training: this is 3, expected settings"),
    "an unknown strategy": (
        "strategy: LoraAllFine",
        "strategy.name: there is no 'LoraAllFine', closest: 'LoRAAllFineTuningStrategy'",
    ),
    "a check for a strategy": ("strategy: mc_any", "strategy.name: there is no 'mc_any'"),
    "an unknown argument": (
        "strategy:\n  name: LoRAAllFineTuningStrategy\n  init_paras: {rnk: 3}",
        "has no setting 'rnk', closest: ['rank']",
    ),
    "a rank of nothing": (
        "strategy: {init_paras: {rank: -1}}",
        "strategy.init_paras: LoRA: rank is -1, expected an integer of at least 1",
    ),
    "an unknown head": (
        "strategy: {head: old}",
        "strategy.head: this is 'old', expected 'auto', 'new' or 'keep'",
    ),
    "an unknown schedule": (
        "schedule: FreezUnfreeze",
        "schedule.name: there is no 'FreezUnfreeze', closest: 'FreezeUnfreeze'",
    ),
    "a number for a folder": ("folder: 3", "folder: this is 3, expected a text"),
    "an empty folder name": ("folder:", "folder: this is empty (null), expected a text"),
    "a number for a name of a setting": ("3: 4", "[3]: the name 3 is not a text"),
}


@pytest.mark.parametrize(("added", "expected"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_reported_in_words(tmp_path: Path, added: str, expected: str) -> None:
    assert expected in refused(tmp_path, GOOD + added)


@pytest.mark.parametrize("name", ["allow_import", "weights", "task", "reader"])
def test_options_of_a_network_are_no_other_arguments(tmp_path: Path, name: str) -> None:
    text = GOOD.replace('resnet18"', f'resnet18", options: {{{name}: true}}')
    assert f"network.options: {name}: this is not an option" in refused(tmp_path, text)


DATA = {
    "an unknown kind": (
        "{kind: class_folder, train: x}",
        "data.kind: there is no kind 'class_folder', closest: 'class_folders'",
    ),
    "no kind": ("{train: x}", "data.kind: this is missing"),
    "no place": ("{kind: class_folders}", "data.train: this is missing"),
    "an unknown option": (
        "{kind: class_folders, options: {agument: true}, train: x}",
        "data.options: there is no 'agument', closest: 'augment'",
    ),
    "an unknown keyword": (
        "{kind: class_folders, train: {pth: x}}",
        "data.train: there is no 'pth', closest: 'path'",
    ),
    "a place that is a number": (
        "{kind: class_folders, train: 3}",
        "data.train: this is 3, expected a text, or several by name",
    ),
    "one place where two are needed": (
        "{kind: coco, train: x}",
        "data.train: expected images and annotations, each on a line of its own",
    ),
    "one of two": (
        "{kind: coco, train: {images: x}}",
        "data.train: annotations must be given, here or in options",
    ),
    "validation twice": (
        "{kind: class_folders, train: x, valid: y, valid_share: 0.2}",
        "data.valid_share: there are validation examples in valid",
    ),
    "an option of another kind": (
        "{kind: class_folders, options: {augment: perhaps, classes: [1]}, train: x}",
        "data.options: augment: this is 'perhaps', expected true or false; "
        "classes: this is 1, expected a text",
    ),
    "an unknown setting of readers": (
        "{kind: text_table, reader: {size: 3}, train: x}",
        "data.reader: there is no 'size', there are: tokenizer, max_length",
    ),
    "a share of all": (
        "{kind: class_folders, train: x, valid_share: 1}",
        "data.valid_share: this is 1",
    ),
}


@pytest.mark.parametrize(("data", "expected"), DATA.values(), ids=DATA)
def test_what_is_wrong_with_examples_is_reported(tmp_path: Path, data: str, expected: str) -> None:
    assert expected in refused(tmp_path, f"data: {data}")


NO_JOB = {
    "an empty file": (b"", "expected lines 'name: value'"),
    "a list": (b"[1, 2]", "expected lines 'name: value'"),
    "no YAML": (b"data: [", "line 1, column 8"),
    "tabs": (b"data:\n\tkind: x", "line 2, column 1"),
    "no text": (b"\xff\xfe\x00", "cannot be read as YAML"),
    "a setting twice": (
        GOOD.encode() + b"data: {kind: coco}",
        "lines 3 and 6: data is given twice",
    ),
    "code": (b"data: !!python/object/apply:os.system [ls]", "python/object/apply:os.system"),
    "a file within itself": (b"&all [*all]", "line 1: this contains itself"),
    "too deep": (b"[" * 5000, "cannot be read as YAML"),
}


@pytest.mark.parametrize(("content", "expected"), NO_JOB.values(), ids=NO_JOB)
def test_a_file_that_is_no_job(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(JobError, match=r"job\.yaml") as error:
        read_job(tmp_path / "job.yaml")
    assert expected in str(error.value)


def test_all_that_is_wrong_is_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    added = [
        "strategy: {init_paras: {rank: -1}, head: old}", "foldr: x", "training: {epoch: 1, lr: x}"
    ]  # fmt: skip
    message = refused(tmp_path, GOOD + "\n".join(added))
    expected = ["strategy.head", "strategy.init_paras", "foldr", "training.epoch", "training.lr"]
    assert [line.split(":")[0].split()[-1] for line in message.splitlines()[1:]] == expected


def test_no_file_names_code_to_import(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD.replace("torchvision:resnet18", "import:os:getcwd"))
    assert "network.name: a file may not name code" in message
    assert "run_job(job, network=...)" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_job(tmp_path / "none.yaml")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_first_file_of_each_kind_is_a_job_of_defaults(kind: DataKind, tmp_path: Path) -> None:
    """Every setting is there, and says what holds without it."""
    text = init_text(kind.name)
    made = job_of(tmp_path, text)
    network = kind.network and {"name": kind.network}
    data = {"kind": kind.name, "train": kind.train}
    bare = Job.model_validate(
        {"network": network, "data": data | {"valid": kind.valid, "options": kind.options}}
    ).anchored(tmp_path)
    assert made.training == Settings()
    assert made.strategy.made().init_paras == bare.strategy.made().init_paras
    assert made.data.options | bare.data.options == made.data.options
    for name in made.data.options.keys() - bare.data.options.keys():
        default = kind.arguments()[name]
        assert made.data.options[name] == (list(default) if default == () else default)
    for part in ("network", "schedule", "folder"):
        assert getattr(made, part) == getattr(bare, part)
    written = yaml.safe_load(text)
    assert set(written) == set(Job.model_fields)
    assert set(written["training"]) == {field.name for field in fields(Settings)}


def _commented(text: str) -> dict[str, bool]:
    """For each line with a setting, whether there is a comment, behind or above."""
    lines = text.splitlines()
    return {
        line.split(":")[0].strip(): "  # " in line or above.strip().startswith("#")
        for above, line in pairwise(lines)
        if line.strip() and not line.strip().startswith("#")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_explained(kind: str) -> None:
    explained = _commented(init_text(kind))
    inside = {"images", "annotations", "masks", "init_paras"}  # told with what they belong to
    assert [name for name, is_so in explained.items() if not is_so and name not in inside] == []


@pytest.mark.parametrize("strategy", Strategy.known())
def test_a_first_file_for_each_strategy(strategy: str, tmp_path: Path) -> None:
    """Those whose arguments have defaults are jobs; the others say what they need."""
    text = init_text(strategy=strategy)
    taken = inspect.signature(REGISTRY[strategy]).parameters.values()
    if all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in taken):
        assert job_of(tmp_path, text).strategy.name == strategy
    else:
        assert "strategy.init_paras: " in refused(tmp_path, text)


def test_files_are_as_seen_from_the_job(tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    text = """
network: {name: "transformers:model", weights: base.safetensors}
data: {kind: text_table, train: a.tsv, valid: {path: ../b.tsv}, old: /c.tsv}
folder: run
"""
    job, own = job_of(tmp_path / "own", text), tmp_path.resolve() / "own"
    assert job.network is not None
    assert job.network.name == f"transformers:{own}/model"
    assert job.network.weights == str(own / "base.safetensors")
    places = [job.data.train, job.data.valid, job.data.old]
    assert places == [{"path": str(p)} for p in (own / "a.tsv", own / "../b.tsv", Path("/c.tsv"))]
    assert job.folder == str(own / "run")
    assert job.anchored("/elsewhere") == job


def test_names_of_the_hub_are_no_files(tmp_path: Path) -> None:
    text = 'network: {name: "transformers:google/bert"}\ndata: {kind: class_folders, train: x}'
    job = job_of(tmp_path, text)
    assert job.network is not None
    assert (job.network.name, job.network.weights) == ("transformers:google/bert", "default")


CHANGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "a number": (["training.epochs=3"], {"training.epochs": 3}),
    "as people write it": (["training.lr=1e-3"], {"training.lr": 1e-3}),
    "null": (["training.clip=null"], {"training.clip": None}),
    "a list": (["training.metrics=[f1, accuracy]"], {"training.metrics": ("f1", "accuracy")}),
    "the last one counts": (["training.lr=1", "training.lr=2"], {"training.lr": 2.0}),
    "a bare strategy gets arguments": (
        ["strategy=DoRAAllFineTuningStrategy", "strategy.init_paras.rank=2"],
        {"strategy.name": "DoRAAllFineTuningStrategy", "strategy.init_paras": {"rank": 2}},
    ),
    "a text with an equals sign": (["network.weights=/a=b"], {"network.weights": "/a=b"}),
}


@pytest.mark.parametrize(("changes", "expected"), CHANGES.values(), ids=CHANGES)
def test_changes(tmp_path: Path, changes: list[str], expected: dict[str, Any]) -> None:
    job: Any = job_of(tmp_path, GOOD, *changes)
    for name, value in expected.items():
        part, field = name.split(".")
        assert getattr(getattr(job, part), field) == value


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("training.epochs", "expected the name of a setting and a value"),
        ("=3", "expected the name of a setting and a value"),
        ("training..lr=3", "expected the name of a setting and a value"),
        ("training.lr=[", "is not a value in YAML"),
        ("training.epoch=3", "\n  training.epoch: there is no such setting, closest: 'epochs'"),
    ],
)
def test_wrong_changes(tmp_path: Path, change: str, expected: str) -> None:
    assert expected in refused(tmp_path, GOOD, change)


def test_a_job_is_written_and_read_again(tmp_path: Path) -> None:
    strategy = 'strategy: {name: ModulesFineTuningStrategy, init_paras: {"*": [fc, "läyer*"]}}'
    job = job_of(tmp_path, GOOD + strategy + "\nschedule: Freeze", "training.seed=null")
    write_job(job, tmp_path / "again.yaml")
    assert read_job(tmp_path / "again.yaml") == job


def test_what_only_code_can_give_is_in_no_job() -> None:
    data = {"kind": "class_folders", "train": "x"}
    with pytest.raises(ValueError, match="optimizer: what only code can give"):
        Job.model_validate({"data": data, "training": Settings(optimizer=print)})


def test_whatever_a_file_holds_the_error_is_one_of_the_job(tmp_path: Path) -> None:
    """250 files, each with a few characters or lines of a good one changed."""
    draw = random.Random(0)
    texts = [init_text(kind) for kind in KINDS]
    outcomes = set()
    for _ in range(250):
        lines = [line.split("  # ")[0] for line in draw.choice(texts).splitlines()]
        lines = [line for line in lines if line.strip() and not line.strip().startswith("#")]
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(lines))
            name = lines[place].split(":")[0]
            lines[place] = draw.choice(
                [
                    "", name, f"{name}:", f"{name}: 3", f"{name}: x", f"{name}: [1]",
                    f"{name}: {{a: 1}}", f"{name}: {{1: 2}}", f"{name}: .inf", f"{name}x: 1",
                    f"{name}: 2001-01-01", f"{name}: !!binary aGk=", f"{name}: 1{'0' * 30}",
                    f"  {lines[place]}", lines[place][::-1], f"{name}: 'x", f"{name}: -1",
                ]
            )  # fmt: skip
        try:
            outcomes.add(type(job_of(tmp_path, "\n".join(lines))))
        except JobError as error:
            assert not any(word in str(error) for word in JARGON), str(error)  # noqa: PT017
            outcomes.add(JobError)
    assert outcomes == {Job, JobError}


def test_a_file_beside_the_job_that_is_called_like_a_network_changes_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "resnet18").mkdir()
    text = """
network: {name: "torchvision:resnet18", weights: IMAGENET1K_V1}
data: {kind: class_folders, train: a}
folder: run
"""
    job = job_of(tmp_path, text)
    assert job.network is not None
    assert (job.network.name, job.network.weights) == ("torchvision:resnet18", "IMAGENET1K_V1")


@pytest.mark.parametrize("number", ["1e-8", "1.0e-8", "1E-8", ".1e-7", "10e-9"])
def test_powers_of_ten_are_numbers(number: str, tmp_path: Path) -> None:
    """PyYAML takes those without a dot for texts, as YAML 1.1 does."""
    text = f"""
network: {{name: "torchvision:resnet18"}}
data: {{kind: class_folders, train: a}}
training: {{optimizer_options: {{eps: {number}}}}}
folder: run
"""
    assert job_of(tmp_path, text).training.optimizer_options == {"eps": 1e-8}
