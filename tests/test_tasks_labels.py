"""Numbers, one logit, several labels: losses and metrics beside scikit-learn's and torch's."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sklearn
from torch import nn

import gift
from gift.core.io_spec import io_spec_of, set_io_spec
from gift.data import (
    DataError,
    PictureReader,
    hugging_face,
    labelled,
    picture_table,
    tensors,
    text_table,
)
from gift.data.targets import targets_of
from gift.jobs import Run, init_text, read_job, run_job
from gift.strategies import FullFineTuningStrategy
from gift.training import Labels, Number, TrainingError, evaluate, finetune, predict
from tests.job_examples import CHEAP, bert, written
from tests.small_files import image, saved

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
PRICES = (X[:, 0] * 30_000 + 200_000).tolist()
QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "epochs": 1}


class Vector:
    """Reads a list of numbers, and stands for readers of anything."""

    stands_alone = True

    def __call__(self, raw: Any) -> Any:
        return torch.tensor(raw)

    augmented = __call__
    collate = staticmethod(torch.stack)

    def to_config(self, folder: Any = None) -> dict[str, Any]:
        return {"kind": "picture"}


def prices(**options: Any) -> Any:
    return labelled(X.tolist(), PRICES, Vector(), task="regression", **options)  # type: ignore[arg-type]


def linear(outputs: int = 1) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, outputs)


def test_large_numbers_are_learnt_and_given_in_their_own_units(tmp_path: Path) -> None:
    """200,000 +- 30,000, which a network near zero would not reach in a thousand steps."""
    net, data = linear(), prices()
    assert data.details["scale"]["mean"] == pytest.approx(np.mean(PRICES))
    assert data.details["scale"]["std"] == pytest.approx(np.std(PRICES))
    result = finetune(net, data, data, strategy=FullFineTuningStrategy(), **QUIET | {
        "epochs": 40, "lr": 0.05, "batch_size": 16, "folder": tmp_path / "run"})  # fmt: skip
    with torch.no_grad():
        said = net(X).flatten().double().numpy() * np.std(PRICES) + np.mean(PRICES)
    true, predicted = zip(*result.numbers, strict=True)  # which the report plots
    assert true == pytest.approx(PRICES, rel=1e-6)
    assert predicted == pytest.approx(said, rel=1e-6)
    assert (tmp_path / "run" / "numbers.png").is_file()
    assert result.after["mae"] == pytest.approx(sklearn.mean_absolute_error(PRICES, said), rel=1e-4)
    rmse = sklearn.root_mean_squared_error(PRICES, said)
    assert result.after["rmse"] == pytest.approx(rmse, rel=1e-4)
    assert result.after["r2"] == pytest.approx(sklearn.r2_score(PRICES, said), rel=1e-4)
    assert result.after["loss"] == pytest.approx((rmse / np.std(PRICES)) ** 2, rel=1e-3)
    assert result.after["r2"] > 0.9
    assert evaluate(net, data, device="cpu") == pytest.approx(result.after, rel=1e-5)
    found = predict(net, X.tolist(), reader=Vector())  # type: ignore[arg-type]
    assert [type(one) for one in found] == [Number] * 60
    assert [one.value for one in found] == pytest.approx(said.tolist(), rel=1e-6)
    gift.save(net, tmp_path / "d.safetensors")
    other = nn.Linear(5, 1)
    with torch.no_grad():
        other.weight.copy_(linear().weight)
        other.bias.copy_(linear().bias)
    gift.load(other, tmp_path / "d.safetensors", check_base=False)
    assert predict(other, X[:3])[1].value == pytest.approx(said[1], rel=1e-6)


def test_numbers_as_they_are_need_no_scale() -> None:
    assert not prices(standardise=False).details
    net = linear()
    found = predict(net, X[:2], reader=None)
    assert not isinstance(found[0], Number)  # of a network of which nothing is known
    finetune(net, prices(standardise=False), strategy=FullFineTuningStrategy(), **QUIET)
    with torch.no_grad():
        assert predict(net, X[:2])[1].value == pytest.approx(net(X[:2])[1].item())
    flat = nn.Sequential(linear(), nn.Flatten(0))
    set_io_spec(flat, None, None, "regression")
    assert [one.value for one in predict(flat, X[:2])] == pytest.approx(flat(X[:2]).tolist())


def test_a_second_training_keeps_what_the_head_gives() -> None:
    """The scale of a network that is trained on, not that of the new examples."""
    net = linear()
    finetune(net, prices(), strategy=FullFineTuningStrategy(), **QUIET)
    scale = io_spec_of(net).details["scale"]
    shifted = labelled(X.tolist(), [p / 2 for p in PRICES], Vector(), task="regression")  # type: ignore[arg-type]
    finetune(net, shifted, **QUIET)
    assert io_spec_of(net).details["scale"] == scale


@pytest.mark.parametrize(
    "scale",
    [[], {"mean": 0}, {"mean": "x", "std": 1}, {"mean": 0, "std": 0}, {"mean": math.nan, "std": 1},
     {"mean": 0, "std": math.inf}],
)  # fmt: skip
def test_a_scale_that_a_file_makes_up_is_refused(scale: Any) -> None:
    net = linear()
    set_io_spec(net, None, None, "regression", {"scale": scale})
    with pytest.raises(TrainingError, match="scale of the targets"):
        predict(net, X[:2])


@pytest.mark.parametrize("shape", ["column", "row", "field"])
@pytest.mark.parametrize("kind", ["int", "bool", "float"])
def test_one_logit_distinguishes_two_classes(shape: str, kind: str) -> None:
    """Loss of BCEWithLogitsLoss; metrics of scikit-learn."""
    net: nn.Module = nn.Conv2d(3, 1, 1) if shape == "field" else linear()
    x = torch.randn(9, 3, 4, 4) if shape == "field" else X
    y = (torch.rand(9, 4, 4) if shape == "field" else torch.rand(60)) > 0.4
    if shape == "row":
        net = nn.Sequential(net, nn.Flatten(0))
    targets = {"int": y.long(), "bool": y, "float": y.float()}[kind]
    found = evaluate(
        net, (x, targets), task="classification", device="cpu",
        metrics=["accuracy", "f1", "precision", "recall", "auroc"],
    )  # fmt: skip
    with torch.no_grad():
        logits = net(x).flatten()
    truth, said = y.flatten().numpy(), (logits > 0).numpy()
    expected = F.binary_cross_entropy_with_logits(logits.double(), y.flatten().double()).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, said))
    for name in ("f1", "precision", "recall"):
        scored = getattr(sklearn, f"{name}_score")(truth, said, average="macro")
        assert found[name] == pytest.approx(scored, rel=1e-5)
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(truth, logits), rel=1e-5)


def test_one_logit_is_trained_and_predicted() -> None:
    net = linear()
    data = tensors(X, (X[:, 0] > 0).long(), classes=["no", "yes"])
    result = finetune(net, data, data, strategy=FullFineTuningStrategy(), **QUIET | {
        "epochs": 20, "lr": 0.05, "batch_size": 8})  # fmt: skip
    assert result.after["accuracy"] > 0.95
    assert result.confusion is not None
    assert sum(map(sum, result.confusion)) == 60
    one = predict(net, X[:1], top=2)[0]
    yes = torch.sigmoid(net(X[:1])).item()
    assert one.probabilities == pytest.approx({"no": 1 - yes, "yes": yes}, rel=1e-5)


def test_a_loss_of_ones_own_gets_one_logit_as_torch_takes_it() -> None:
    own = evaluate(linear(), (X, (X[:, 0] > 0).long()), device="cpu")["loss"]
    result = finetune(
        linear(), (X, (X[:, 0] > 0).long()), (X, (X[:, 0] > 0).long()), loss=nn.BCEWithLogitsLoss(),
        strategy=FullFineTuningStrategy(), **QUIET,
    )  # fmt: skip
    assert result.before["loss"] == pytest.approx(own, rel=1e-5)


def test_several_labels_beside_torch_and_scikit_learn() -> None:
    net = linear(3)
    truth = torch.rand(60, 3, generator=torch.Generator().manual_seed(1)) > 0.6
    found = evaluate(
        net, (X, truth.float()), task="multi_label", device="cpu",
        metrics=["accuracy", "exact_match", "f1", "precision", "recall", "auroc"],
    )  # fmt: skip
    with torch.no_grad():
        logits = net(X)
    said, known = (logits > 0).numpy(), truth.numpy()
    expected = nn.BCEWithLogitsLoss()(logits.double(), truth.double()).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] == pytest.approx((said == known).mean(), rel=1e-6)
    assert found["exact_match"] == pytest.approx(sklearn.accuracy_score(known, said))
    for name in ("f1", "precision", "recall"):
        scored = getattr(sklearn, f"{name}_score")(known, said, average="macro", zero_division=0)
        assert found[name] == pytest.approx(scored, rel=1e-5)
    scored = sklearn.roc_auc_score(known, logits, average="macro")
    assert found["auroc"] == pytest.approx(scored, rel=1e-5)


def test_several_labels_are_learnt_and_predicted() -> None:
    names = [[n for n, x in zip("abc", row, strict=False) if x > 0] for row in X.tolist()]
    data = labelled(X.tolist(), names, Vector(), task="multi_label")  # type: ignore[arg-type]
    assert data.classes == ("a", "b", "c")
    net = linear(3)
    result = finetune(net, data, data, strategy=FullFineTuningStrategy(), **QUIET | {
        "epochs": 30, "lr": 0.1})  # fmt: skip
    assert result.after["exact_match"] > 0.8
    found = predict(net, X)
    assert [type(one) for one in found] == [Labels] * 60
    assert sum(set(one.labels) == set(given) for one, given in zip(found, names, strict=True)) > 48
    shares = torch.sigmoid(net(X[:1])).flatten().tolist()
    assert list(found[0].probabilities.values()) == pytest.approx(shares, rel=1e-5)
    [none] = predict(net, X[:1], threshold=1.0)
    assert none.labels == []
    assert str(none).endswith("none")
    assert len(predict(net, X[:1], threshold=0.0, top=2)[0].labels) == 2
    with pytest.raises(ValueError, match="threshold is 2, expected a number from 0 to 1"):
        predict(net, X[:1], threshold=2)


# In files.


def test_numbers_in_a_table_of_pictures(tmp_path: Path) -> None:
    for n in range(4):
        saved(tmp_path / f"{n}.png", seed=n)
    table = tmp_path / "t.csv"
    table.write_text("path,label\n" + "".join(f"{n}.png,{n * 1.5}\n" for n in range(4)))
    found = picture_table(table, PictureReader(size=8), task="regression")
    assert (found.task, found.classes) == ("regression", None)
    _, targets = found.collate([found.dataset[n] for n in range(4)])  # type: ignore[misc]
    assert targets.dtype == torch.float32
    assert targets.tolist() == [0, 1.5, 3, 4.5]
    assert found.split(0.5)[0].details == found.details


@pytest.mark.parametrize(
    ("task", "rows", "options", "message"),
    [
        ("regression", "a,1\nb,x\nc,inf\nd,1_0\n", {}, "(?s)line 3: 'x' is not.*line 4.*line 5"),
        ("regression", "a,1\nb,\n", {}, "line 3: nothing in column 'label'"),
        ("regression", "a,1\n", {"classes": ["x", "y"]}, "numbers have no classes"),
        ("multi_label", "a,x;y\nb,x;z\n", {"classes": ["x", "y"]}, "line 3: 'z' is none of"),
        ("multi_label", "a,x\nb,\n", {}, "no more than one class"),
        ("multi_label", "a,x\n", {"separator": ""}, "separator is ''"),
        ("segmentation", "a,1\n", {}, "the task is 'segmentation', expected one of"),
    ],
)
def test_labels_that_do_not_fit_the_task_are_named_by_line(
    task: str, rows: str, options: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + rows)
    with pytest.raises(DataError, match=message):
        text_table(path, str.split, task=task, **options)  # type: ignore[arg-type]


def test_several_labels_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text,label\na,sad; long\nb,\nc,"long"\n')
    found = text_table(path, str.split, task="multi_label")  # type: ignore[arg-type]
    assert found.classes == ("long", "sad")
    assert [found.dataset[n][1] for n in range(3)] == [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0)]


def test_labels_in_lists_that_do_not_fit_are_named() -> None:
    with pytest.raises(DataError, match=r"example 1: its label is 'x', expected a list"):
        labelled(["a", "b"], [["x"], "x"], str.split, task="multi_label")  # type: ignore[arg-type]
    assert targets_of(["5", "5"], "regression").details == {"scale": {"mean": 5.0, "std": 1.0}}


def test_columns_of_hugging_face_with_numbers_and_lists() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "score": [1.5, 3.5], "tags": [[1], []]})
    tags = datasets.Sequence(datasets.ClassLabel(names=["good", "bad"]))
    data = data.cast_column("tags", tags)
    numbers = hugging_face(data, str.split, task="regression")  # type: ignore[arg-type]
    assert [numbers.dataset[n][1] for n in range(2)] == [1.5, 3.5]
    several = hugging_face(data, str.split, task="multi_label")  # type: ignore[arg-type]
    assert several.classes == ("good", "bad")
    assert [several.dataset[n][1] for n in range(2)] == [(0.0, 1.0), (0.0, 0.0)]
    gone = datasets.Dataset.from_dict({"text": ["a", "b"], "score": [1.5, None]})
    with pytest.raises(DataError, match="row 1: an empty label is not a number"):
        hugging_face(gone, str.split, label="score", task="regression")  # type: ignore[arg-type]


# In jobs.


def job(folder: Path, task: str, labels: list[str], **strategy: Any) -> Path:
    data = folder / "data"
    data.mkdir(parents=True)
    words = ["good film", "bad plot", "a great film", "the awful plot"] * 2
    rows = "".join(f"{words[n]}\t{label}\n" for n, label in enumerate(labels))
    (data / "t.tsv").write_text("text\tlabel\n" + rows)
    bert(folder / "model")
    return written(folder, {
        "network": {"name": "transformers:model"},
        "data": {"kind": "text_table", "options": {"task": task}, "train": "data/t.tsv",
                 "valid": "data/t.tsv"},
        "strategy": {"name": "LoRALinearFineTuningStrategy", **strategy},
        "training": CHEAP,
    })  # fmt: skip


def test_a_job_on_numbers(tmp_path: Path) -> None:
    labels = [str(100 + n) for n in range(8)]
    result = run_job(read_job(job(tmp_path, "regression", labels)))
    assert set(result.after) == {"loss", "mae", "rmse", "r2"}
    run = Run(tmp_path / "run")
    assert (
        json.loads((tmp_path / "run/inputs.json").read_text())["details"]["scale"]["mean"] == 103.5
    )
    assert run.evaluate() == pytest.approx(result.after, rel=1e-4)
    [found] = run.predict(["good film"])
    assert 90 < found.value < 120
    assert run.network().classifier.out_features == 1  # type: ignore[union-attr]


def test_a_job_on_several_labels(tmp_path: Path) -> None:
    result = run_job(read_job(job(tmp_path, "multi_label", ["x;y", "", "y", "z"] * 2)))
    assert set(result.after) == {"loss", "accuracy", "exact_match", "f1"}
    [found] = Run(tmp_path / "run").predict(["good film"])
    assert set(found.probabilities) == {"x", "y", "z"}


def test_the_first_job_file_names_the_task() -> None:
    text = init_text("picture_table")
    assert "task: classification" in text
    assert "standardise: true" in text


def test_a_head_that_is_kept_gives_the_numbers_themselves(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    path = job(tmp_path, "regression", [str(n) for n in range(8)], head="keep",
               name="FullFineTuningStrategy")  # fmt: skip
    config = BertForSequenceClassification.from_pretrained(tmp_path / "model").config
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    run_job(read_job(path))
    assert "details" not in json.loads((tmp_path / "run/inputs.json").read_text())


def test_pictures_with_numbers_by_image_networks() -> None:
    from gift.zoo import load_network

    data = labelled([image(seed=n) for n in range(4)], [1.0, 2.0, 3.0, 4.0],
                    PictureReader(size=32), task="regression")  # fmt: skip
    net = load_network("torchvision:shufflenet_v2_x0_5", None, task="regression", num_classes=1).net
    found = finetune(net, data, data, strategy=FullFineTuningStrategy(), **QUIET)
    assert set(found.after) == {"loss", "mae", "rmse", "r2"}
