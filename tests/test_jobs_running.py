"""Jobs that are run: what comes of them is what the same calls give in code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import gift
from gift.data import Examples, PictureReader, class_folders, text_table
from gift.jobs import Job, JobError, Run, read_job, run_job, write_merged
from gift.jobs.examples import job_examples
from gift.jobs.heads import with_head
from gift.jobs.models import Strategy
from gift.strategies import (
    BottleneckFineTuningStrategy,
    DetectionHeadStrategy,
    HeadReplacementStrategy,
    LoRALinearFineTuningStrategy,
    NormFineTuningStrategy,
    merge_strategies,
)
from gift.training import TrainingError, evaluate, finetune
from gift.training.predicting import predict
from gift.zoo import LoadedNetwork, load_network
from tests.job_examples import CHEAP, bert, image_job, images, text_job, texts, written


def tensors_of(file: Path) -> dict[str, Tensor]:
    return gift.inspect(file).tensors


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def by_hand_with_images(folder: Path) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    net = load_network("torchvision:shufflenet_v2_x0_5", weights=None).net
    reader = PictureReader(size=32)
    train = class_folders(folder / "data" / "train", reader)
    valid = class_folders(folder / "data" / "val", reader, classes=train.classes)
    return net, train, valid, NormFineTuningStrategy()


def by_hand_with_texts(folder: Path) -> tuple[Any, Any, Any, Any]:
    loaded = load_network(f"transformers:{folder / 'model'}")
    assert loaded.reader is not None
    train = text_table(folder / "data" / "train.tsv", loaded.reader)
    valid = text_table(folder / "data" / "val.tsv", loaded.reader, classes=train.classes)
    return loaded.net, train, valid, LoRALinearFineTuningStrategy(rank=1)


@pytest.mark.parametrize(
    ("job", "by_hand"), [(image_job, by_hand_with_images), (text_job, by_hand_with_texts)]
)
def test_a_job_is_what_the_same_calls_do(
    job: Callable[..., Path], by_hand: Callable[..., Any], tmp_path: Path
) -> None:
    """The same weights, bit for bit, the same result; and the folder gives both again."""
    result = run_job(read_job(job(tmp_path, strategy=_new_head(job))))
    net, train, valid, strategy = by_hand(tmp_path)
    own = tmp_path / "by hand"
    merged = merge_strategies([HeadReplacementStrategy(2), strategy])
    expected = finetune(net, train, valid, strategy=merged, folder=own, **CHEAP)
    assert_same(tensors_of(tmp_path / "run/last.safetensors"), tensors_of(own / "last.safetensors"))
    assert (result.before, result.after) == (expected.before, expected.after)
    run = Run(tmp_path / "run")
    assert (run.classes, run.task) == (train.classes, "classification")
    assert run.evaluate() == pytest.approx(expected.after, abs=1e-6)
    batch = train.collate or torch.utils.data.default_collate
    inputs, _ = _parts(batch([train.dataset[i] for i in range(4)]))
    with torch.no_grad():
        assert torch.equal(run.network()(**inputs)[0], net.eval()(**inputs)[0])


def _new_head(job: Callable[..., Path]) -> dict[str, Any]:
    if job is image_job:
        return {"name": "NormFineTuningStrategy", "head": "new"}
    return {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}, "head": "new"}


def _parts(batch: Any) -> tuple[dict[str, Tensor], Any]:
    if isinstance(batch, dict):
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    return {"x": batch[0]}, batch[1]


class Stops(nn.Module):
    """A network that is stopped by Control-C in its n-th step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.Dropout(), nn.ReLU())
        self.fc = nn.Linear(16, 2)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        self.steps -= self.training
        if self.training and self.steps == 0:
            raise KeyboardInterrupt
        return self.fc(self.body(x))


def own_network(folder: Path, **parts: Any) -> Job:
    """A job for a network from code."""
    data = {"kind": "class_folders", "reader": {"size": 8}, "train": "data/train"}
    training = CHEAP | {"epochs": 3, "lr": 0.01}
    strategy = {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}, "head": "keep"}
    job = {"network": None, "data": data | {"valid": "data/val"}, "training": training}
    images(folder / "data")
    return read_job(written(folder, job | {"strategy": strategy} | parts))


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """In the second epoch; in the end it is the run that was never stopped, bit for bit."""
    job = own_network(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Stops(5))
    stopped = run_job(job, Stops(0))
    whole = run_job(job.model_copy(update={"folder": str(tmp_path / "whole")}), Stops(0))
    for name in ("best.safetensors", "last.safetensors"):
        assert_same(tensors_of(tmp_path / "run" / name), tensors_of(tmp_path / "whole" / name))
    assert stopped.after == whole.after
    timeless = [[{**row, "seconds": 0} for row in r.history] for r in (stopped, whole)]
    assert timeless[0] == timeless[1]


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_job_in_the_folder_is_refused(tmp_path: Path) -> None:
    """The differences are reported, the folder stays as it is; to start over must be asked for."""
    job = own_network(tmp_path)
    run_job(job, Stops(0))
    before = _content(tmp_path / "run")
    paras = {"rank": 1, "train_bias": True}
    settings = {"name": "LoRALinearFineTuningStrategy", "init_paras": paras, "head": "keep"}
    other = job.model_copy(update={"strategy": Strategy.model_validate(settings)})
    with pytest.raises(JobError) as error:
        run_job(other, Stops(0))
    assert error.value.problems == ["strategy.init_paras.train_bias was not given and is true"]
    shorter = own_network(tmp_path / "again", training=CHEAP | {"epochs": 2, "lr": 0.01})
    with pytest.raises((JobError, RuntimeError), match="epochs was 3 and is 2"):
        run_job(shorter.model_copy(update={"folder": job.folder, "data": job.data}), Stops(0))
    assert _content(tmp_path / "run") == before
    run_job(other, Stops(0), restart=True)
    assert Run(tmp_path / "run", Stops(0)).job.strategy.init_paras == paras


@pytest.mark.parametrize("part", ["network", "data", "strategy", "schedule"])
def test_a_change_in_any_part_of_a_job_is_reported(part: str, tmp_path: Path) -> None:
    schedule = {"name": "FreezeUnfreeze", "init_paras": {"unfreeze_epoch": 1}}
    job = own_network(tmp_path, schedule=schedule)
    run_job(job, Stops(0))
    before, config = _content(tmp_path / "run"), job.to_config()
    other = {
        "network": {"name": "torchvision:resnet18"},
        "data": config["data"] | {"valid": "data/train"},
        "strategy": config["strategy"] | {"init_paras": {"rank": 2}},
        "schedule": schedule | {"init_paras": {"unfreeze_epoch": 2}},
    }[part]
    changed = Job.model_validate(config | {part: other})
    with pytest.raises(JobError) as error:
        run_job(changed.model_copy(update={"folder": job.folder}), Stops(0))
    assert error.value.problems
    assert all(problem.startswith(part) for problem in error.value.problems)
    assert _content(tmp_path / "run") == before


def test_a_job_that_never_began_may_be_corrected(tmp_path: Path) -> None:
    job = own_network(tmp_path)
    wrong = job.model_copy(
        update={"strategy": Strategy(name="NormFineTuningStrategy", head="keep")}
    )
    with pytest.raises(ValueError, match="NormFineTuningStrategy"):
        run_job(wrong, Stops(0))
    assert run_job(job, Stops(0)).stopped == "done"


def test_a_network_from_code_is_opened_with_it(tmp_path: Path) -> None:
    net = Stops(0)
    job = own_network(tmp_path)
    run_job(job, net)
    x = torch.randn(5, 3, 8, 8)
    opened = Run(tmp_path / "run", Stops(0)).network()
    assert torch.equal(opened(x), net.eval()(x))
    with pytest.raises(JobError, match="names no network"):
        Run(tmp_path / "run").network()
    image = tmp_path / "data" / "val" / "warm" / "0.png"
    found, again = (
        Run(tmp_path / "run", Stops(0)).predict([image], top=2),
        predict(net, [image]),
    )
    assert [p.probabilities for p in found] == [p.probabilities for p in again]  # noted by finetune
    assert set(found[0].probabilities) == {"cold", "warm"}


@pytest.mark.parametrize("augment", [False, True])
def test_what_is_held_out_is_not_augmented(tmp_path: Path, augment: bool) -> None:
    """Both parts together are all examples, each once, and the same ones each time."""
    images(tmp_path)
    data = {"kind": "class_folders", "train": str(tmp_path / "train"), "valid_share": 0.25}
    job = Job.model_validate({"data": data | {"options": {"augment": augment}}})
    reader = PictureReader(size=8, scale=(0.1, 0.2))
    plain = [x for x, _ in class_folders(tmp_path / "train", reader).dataset]  # type: ignore[attr-defined]

    def places(examples: Examples | None) -> list[int]:
        assert examples is not None
        inputs = [examples.dataset[i][0] for i in range(len(examples))]
        return [n for x in inputs for n, y in enumerate(plain) if torch.equal(x, y)]

    train, valid, old = job_examples(job.data, reader)
    assert old is None
    assert len(places(valid)) == 3
    if not augment:
        assert sorted(places(train) + places(valid)) == [*range(12)]
    assert places(job_examples(job.data, reader)[1]) == places(valid)
    assert places(job_examples(job.data, reader, seed=1)[1]) != places(valid)


HEADS: dict[str, tuple[str, tuple[str, ...] | None, bool, str | None, bool]] = {
    # setting, classes of the network, random, saved as; whether there is a new head for (a, b)
    "unknown classes, as many": ("auto", None, False, None, False),
    "the same classes": ("auto", ("a", "b"), False, None, False),
    "other classes, as many": ("auto", ("a", "c"), False, None, True),
    "more classes": ("auto", ("a", "b", "c"), False, None, True),
    "a network that learnt nothing": ("auto", None, True, None, True),
    "a body without a head": ("auto", None, False, "BertModel", True),
    "saved with its head": ("auto", None, False, "Sequential", False),
    "a new one is wanted": ("new", ("a", "b"), False, None, True),
    "the old one is wanted": ("keep", ("a", "c"), True, "BertModel", False),
}


@pytest.mark.parametrize(("head", "known", "is_random", "saved", "new"), HEADS.values(), ids=HEADS)
def test_the_head_fits_the_classes(
    head: str, known: tuple[str, ...] | None, is_random: bool, saved: str | None, new: bool
) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    if saved is not None:
        vars(net)["config"] = type("Config", (), {"architectures": [saved]})()
    settings = {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}, "head": head}
    train = Examples([], classes=("a", "b"))  # type: ignore[arg-type]
    loaded = LoadedNetwork(net, None, "classification", known)
    before = net[1]
    gift.enable_fine_tuning(
        net, with_head(Strategy.model_validate(settings), loaded, train, is_random)
    )
    assert (net[1] is not before) == new
    assert net[1].out_features == 2
    assert {"0.lora_A", "1.weight" if new else "1.lora_A"} <= {*net.state_dict()}


@pytest.mark.parametrize("own", [HeadReplacementStrategy(2), DetectionHeadStrategy(2)])
@pytest.mark.parametrize("merged", [False, True])
def test_a_strategy_with_a_head_of_its_own_gets_no_other(own: Any, merged: bool) -> None:
    own = merge_strategies([own, NormFineTuningStrategy()]) if merged else own
    loaded = LoadedNetwork(nn.Sequential(nn.Linear(16, 3)), None, "classification")
    train = Examples([], classes=("a", "b"))  # type: ignore[arg-type]
    made = with_head(Strategy.model_validate(own.to_config()), loaded, train)
    assert made.to_config() == own.to_config()


def test_a_detector_gets_new_predictors() -> None:
    train = Examples([], task="detection", classes=("__background__", "cat", "dog"))  # type: ignore[arg-type]
    loaded = LoadedNetwork(nn.Linear(2, 2), None, "detection")
    first, *_ = with_head(Strategy(name="NormFineTuningStrategy"), loaded, train).module_caps
    assert first.action.recipe == ("ma_replace_detection_head", {"num_classes": 3})  # type: ignore[union-attr]


def test_a_new_head_without_classes_is_refused() -> None:
    train = Examples([], task="language")  # type: ignore[arg-type]
    loaded = LoadedNetwork(nn.Linear(2, 2), None, "language")
    with pytest.raises(JobError, match="language examples have no classes"):
        with_head(Strategy(head="new"), loaded, train)


def test_what_is_forgotten_of_the_old_task(tmp_path: Path) -> None:
    """By the old head: right after a new one came it is what the base had."""
    texts(tmp_path / "old")
    data = {"kind": "text_table", "train": "data/train.tsv", "valid": "data/val.tsv"}
    old = {"path": "old/train.tsv", "classes": ["pleased", "cross"]}
    head = {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}, "head": "new"}
    training = CHEAP | {"lr": 0.1, "epochs": 3}
    job = text_job(tmp_path, data=data | {"old": old}, strategy=head, training=training)
    result = run_job(read_job(job))
    loaded = load_network(f"transformers:{tmp_path / 'model'}")
    assert loaded.reader is not None
    known = text_table(tmp_path / "old/train.tsv", loaded.reader, classes=["pleased", "cross"])
    assert result.old_before == pytest.approx(evaluate(loaded.net, known), abs=1e-6)
    assert result.old_after["loss"] != pytest.approx(result.old_before["loss"], abs=1e-4)


@pytest.fixture
def text_run(tmp_path: Path) -> Run:
    run_job(read_job(text_job(tmp_path, training=CHEAP | {"lr": 0.1})))
    return Run(tmp_path / "run")


def logits(net: nn.Module, run: Run, *sentences: str) -> Tensor:
    batch = run.reader.collate([run.reader(text) for text in sentences])
    with torch.no_grad():
        return net(**batch).logits


@pytest.mark.parametrize("name", ["merged.safetensors", "merged.pt", "model"])
def test_a_merged_network_needs_no_gift(text_run: Run, name: str, tmp_path: Path) -> None:
    """It is loaded by others, from a file or as a model of transformers, and says the same."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    expected = logits(text_run.network(), text_run, "good film", "a bad plot")
    out = tmp_path / "out" / name
    write_merged(text_run.network(), out, text_run.classes, text_run.reader)
    if out.is_dir():
        net = AutoModelForSequenceClassification.from_pretrained(out)
        assert net.config.id2label == {0: "cross", 1: "pleased"}
        assert AutoTokenizer.from_pretrained(out)("good film")["input_ids"][1:-1] == [5, 11]
    else:
        net = load_network(f"transformers:{tmp_path / 'model'}", weights=str(out)).net
    assert type(net).__module__.startswith("transformers.")
    torch.testing.assert_close(logits(net.eval(), text_run, "good film", "a bad plot"), expected)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]


def test_what_cannot_be_merged_is_not_written(text_run: Run, tmp_path: Path) -> None:
    out, net = tmp_path / "out", text_run.network()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    before = _content(tmp_path)
    with pytest.raises(JobError, match="expected an empty folder"):
        write_merged(net, out)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    gift.enable_fine_tuning(plain, BottleneckFineTuningStrategy(size=2))
    with pytest.raises(JobError, match=r"expected a file: \.safetensors"):
        write_merged(plain, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="merge"):
        write_merged(plain, tmp_path / "merged.pt")
    assert _content(tmp_path) == before


def test_tied_weights_are_in_the_file_under_both_names(tmp_path: Path) -> None:
    net, fresh, x = _gpt2(), _gpt2(), torch.tensor([[1, 2, 3]])
    gift.enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
        expected = net.eval()(x).logits
        write_merged(net, tmp_path / "merged.safetensors")
        fresh.load_state_dict(load_file(tmp_path / "merged.safetensors"))
        torch.testing.assert_close(fresh.eval()(x).logits, expected)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=15, n_embd=8, n_layer=1, n_head=2, n_positions=16))


def test_a_language_model_learns_from_text(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a good film\nthe plot\n" * 30, encoding="utf-8")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).unlink()
    _gpt2().save_pretrained(tmp_path / "model")
    places = {"train": "data", "valid": {"path": ["data/a.txt"]}}
    job = {
        "network": {"name": "transformers:model"},
        "data": {"kind": "language_text", "options": {"length": 8}, **places},
        "strategy": {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}},
        "training": CHEAP | {"epochs": 2, "lr": 0.1},
    }
    result = run_job(read_job(written(tmp_path, job)))
    assert result.task == "language"
    assert result.after["loss"] < result.before["loss"]
    assert Run(tmp_path / "run").evaluate() == pytest.approx(result.after, rel=1e-5)


DAMAGED = {
    "no JSON": "{",
    "a list": "[]",
    "without classes": '{"task": "classification"}',
    "without a reader": '{"task": "classification", "classes": null}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_run_is_an_error_in_words(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"not the folder of a run, it has no job\.yaml"):
        Run(folder)
    folder.mkdir()
    job = Job.model_validate({"data": {"kind": "class_folders", "train": "x"}})
    (folder / "job.yaml").write_text(json.dumps(job.to_config()))
    with pytest.raises(FileNotFoundError, match=r"it has no inputs\.json"):
        Run(folder)
    (folder / "inputs.json").write_text(content)
    with pytest.raises(JobError, match=r"inputs\.json cannot be read"):
        Run(folder)


def test_a_place_that_is_none_is_reported(text_run: Run) -> None:
    with pytest.raises(JobError, match="there is no 'pth', closest: 'path'"):
        text_run.examples({"pth": "x"})
    with pytest.raises(JobError, match="path must be given"):
        text_run.examples({"text": "words"})


def test_the_job_of_a_run_may_name_no_code_either(text_run: Run) -> None:
    file = text_run.folder / "job.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("name: transformers:", "name: import:"), encoding="utf-8")
    with pytest.raises(JobError, match="a file may not name code"):
        Run(text_run.folder)


def test_a_run_without_a_delta_says_so(tmp_path: Path) -> None:
    job = own_network(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, Stops(1))
    with pytest.raises(FileNotFoundError, match=r"has no best\.safetensors yet"):
        Run(tmp_path / "run", Stops(0)).network()


def test_what_was_held_out_is_judged_again(tmp_path: Path) -> None:
    place = {"kind": "text_table", "train": "data/train.tsv", "valid_share": 0.25}
    result = run_job(read_job(text_job(tmp_path, data=place)))
    assert Run(tmp_path / "run").evaluate() == pytest.approx(result.after, abs=1e-6)


def test_a_refused_restart_leaves_the_run_that_was_there(tmp_path: Path) -> None:
    path = text_job(tmp_path)
    run_job(read_job(path))
    folder = tmp_path / "run"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    wrong = read_job(path, ["training.metrics=[map]", "training.lr=0.5"])
    with pytest.raises(TrainingError, match="not a metric of classification"):
        run_job(wrong, restart=True)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
