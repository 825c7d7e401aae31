"""What targets say: numbers or classes, and what is neither, each right or refused in words."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gift.core.io_spec import io_spec_of
from gift.data import Examples, labelled, language_text, tensors, text_table
from gift.errors import DataError, GiftWarning, NotFiniteError
from gift.strategies import FullFineTuningStrategy
from gift.training import TrainingError, evaluate, finetune

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
Y = X[:, :1] * 3 + 1
CLASSES = (X[:, 0] > 0).long()
QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "epochs": 1}


class Row(nn.Linear):
    """Gives (batch,) instead of (batch, 1)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).squeeze(1)


def full(net: nn.Module, train: Any, valid: Any = None, **options: Any) -> Any:
    return finetune(net, train, valid, strategy=FullFineTuningStrategy(), **QUIET | options)


def net(outputs: int = 1, kind: type[nn.Module] = nn.Linear) -> nn.Module:
    torch.manual_seed(0)
    return kind(5, outputs)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "pair": lambda y: (X, y),
    "dataset": lambda y: TensorDataset(X, y),
    "loader": lambda y: DataLoader(TensorDataset(X, y), batch_size=8),
    "tensors": lambda y: tensors(X, y),
    "arrays": lambda y: tensors(X.numpy(), y.numpy().astype(np.float64)),
    "examples": lambda y: Examples(TensorDataset(X, y)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flat", [False, True], ids=["column", "row"])
@pytest.mark.parametrize("kind", [nn.Linear, Row])
def test_one_number_for_each_example_is_a_regression(
    form: str, flat: bool, kind: type[nn.Module]
) -> None:
    """The mean squared error by hand, whichever of target and output has an axis of one."""
    tuned, data = net(kind=kind), FORMS[form](Y.flatten() if flat else Y)
    before = evaluate(tuned, data, device="cpu")
    left = (tuned(X).detach().flatten() - Y.flatten()).double()
    assert before["loss"] == pytest.approx(left.square().mean().item(), rel=1e-5)
    assert before["mae"] == pytest.approx(left.abs().mean().item(), rel=1e-5)
    assert before["rmse"] == pytest.approx(left.square().mean().sqrt().item(), rel=1e-5)
    spread = (Y - Y.mean()).double().square().mean().item()
    assert before["r2"] == pytest.approx(1 - left.square().mean().item() / spread, rel=1e-4)
    result = full(tuned, data, data, epochs=30, lr=0.1, batch_size=8)
    assert result.task == "regression"
    if form != "loader":  # of which nothing is noted
        assert io_spec_of(tuned).task == "regression"
    assert result.after["loss"] < 0.1 * before["loss"]
    assert result.after["r2"] > 0.9


def test_a_loss_of_ones_own_gets_targets_as_the_network_gives_them() -> None:
    """Else torch would compare each of them with each."""
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((outputs.shape, targets.shape))
        return (outputs - targets).abs().mean()

    full(net(), (X, Y.flatten()), loss=loss)
    assert seen
    assert all(one == other for one, other in seen)


def test_fields_of_one_channel_are_a_regression_too() -> None:
    images = torch.randn(6, 1, 4, 4)
    found = evaluate(nn.Conv2d(1, 1, 1), (images, images * 2), device="cpu")
    assert set(found) == {"loss", "mae", "rmse", "r2"}


def test_a_single_example_has_no_explained_variance() -> None:
    assert math.isnan(evaluate(net(), (X[:1], Y[:1]), device="cpu")["r2"])


REFUSED: dict[str, tuple[int, Tensor, dict[str, Any], str]] = {
    "three classes, one output": (
        1, (X[:, 0] * 9).long() % 3, {}, "one number, .*as many outputs.*task='regression'"),
    "numbers asked for as classes": (1, Y, {"task": "classification"}, "task='regression'"),
    "probabilities of one output": (
        1, CLASSES * 0.5, {"task": "classification"}, "targets 0 and 1"),
    "numbers asked for as labels": (3, torch.randn(40, 3), {"task": "multi_label"}, "0 and 1"),
    "class numbers asked for as labels": (
        3, CLASSES, {"task": "multi_label"}, "a logit and a 0 or 1 for each class"),
    "classes written as floats": (2, CLASSES.float(), {}, r"targets.long\(\)"),
    "numbers for two outputs": (2, Y.flatten(), {}, "choose task='regression'$"),
    "several classes at once": (
        3, torch.ones(40, 3), {}, "sums from 3 to 3.*task='multi_label'"),
    "several numbers": (3, torch.randn(40, 3), {}, "task='regression'"),
    "negative shares": (2, torch.tensor([[1.5, -0.5]] * 40), {}, "add up to 1"),
    "labels of -1": (2, CLASSES * 2 - 1, {}, r"labels \[-1\]"),
    "labels beyond the classes": (2, CLASSES * 2, {}, r"labels \[2\].*2 classes"),
    "complex numbers": (1, Y.to(torch.complex64), {"task": "regression"}, "expected real numbers"),
    "transposed": (40, torch.randn(40, 40)[:, :20], {"task": "regression"}, "in the same order"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_are_neither_are_refused(name: str) -> None:
    outputs, targets, options, message = REFUSED[name]
    for tune in (full, evaluate):
        settings: dict[str, Any] = {"device": "cpu"} if tune is evaluate else {}
        with pytest.raises(TrainingError, match=message):
            tune(net(outputs), (X, targets), **options, **settings)


def test_targets_with_classes_in_the_place_of_examples_are_refused() -> None:
    """As many numbers, in another order."""
    with pytest.raises(TrainingError, match="in the same order"):
        evaluate(net(8), (X, torch.randn(40, 4, 2)), task="regression", device="cpu")


def test_probabilities_and_bools_are_classes() -> None:
    soft = torch.nn.functional.one_hot(CLASSES, 2).float() * 0.8 + 0.1
    expected = evaluate(net(2), (X, CLASSES), device="cpu")
    for targets in (soft, CLASSES.bool(), CLASSES.to(torch.int8)):
        found = evaluate(net(2), (X, targets), device="cpu")
        assert found["accuracy"] == expected["accuracy"]


def test_zeros_and_ones_as_floats_are_reported() -> None:
    with pytest.warns(GiftWarning, match="all 0 or 1.*task='classification'"):
        assert "rmse" in evaluate(net(), (X, CLASSES[:, None].float()), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(net(), (X, CLASSES[:, None].float()), task="regression", device="cpu")


def test_a_single_class_is_reported() -> None:
    with pytest.warns(GiftWarning, match="all 40 examples to learn from are of class 1"):
        full(net(2), (X, torch.ones(40, dtype=torch.long)))


# Numbers that are not finite.


def spoilt(tensor: Tensor, value: float, row: int = 33) -> Tensor:
    copy = tensor.clone()
    copy[row] = value
    return copy


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["inputs", "targets"])
@pytest.mark.parametrize("which", ["training", "validation"])
@pytest.mark.parametrize("form", ["pair", "loader", "list"])
def test_numbers_that_are_not_finite_are_named(
    form: str, which: str, part: str, value: float
) -> None:
    x, y = (spoilt(X, value), Y) if part == "inputs" else (X, spoilt(Y, value))
    bad: Any = {
        "pair": (x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=8),
        "list": Examples(list(zip(x, y, strict=True))),  # type: ignore[arg-type]
    }[form]
    where = "example 1 of batch 4" if form == "loader" else "example 33"
    train, valid = (bad, None) if which == "training" else ((X, Y), bad)
    tuned = net()
    before = tuned.weight.detach().clone()  # type: ignore[operator]
    late = form != "pair" and which == "training"
    error = NotFiniteError if late else TrainingError
    message = rf"the {which} examples.*not finite \(nan, inf\) in {part} of {where}"
    with pytest.raises(error, match=message):
        full(tuned, train, valid, batch_size=8)
    if not late:  # nothing was trained
        assert torch.equal(tuned.weight, before)  # type: ignore[arg-type]


def test_a_network_that_takes_missing_numbers_may_have_them() -> None:
    class Imputing(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.nan_to_num())

    data = (spoilt(X, math.nan), Y)
    assert math.isfinite(full(net(kind=Imputing), data, data).after["loss"])


def test_a_loss_that_leaves_missing_targets_out_may_have_them() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        known = targets.isfinite()
        return (outputs[known] - targets[known]).square().mean()

    data = (X, spoilt(Y, math.nan))
    assert math.isfinite(evaluate(net(), (X, Y), device="cpu")["loss"])
    full(net(), data, loss=loss)


def test_a_network_with_infinite_outputs_is_reported() -> None:
    tuned = net()
    with torch.no_grad():
        tuned.weight.fill_(1e30)  # type: ignore[operator]
    with pytest.warns(GiftWarning, match="loss on the examples is not finite, though"):
        assert math.isinf(evaluate(tuned, (X, Y), device="cpu")["loss"])


# Labels in tables and lists.


def table(path: Path, labels: list[str]) -> Path:
    rows = [f"words,{label}" for label in labels]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [f"{n / 7:.3f}" for n in range(40)],
            "measured numbers, 40 different ones.*task='regression'",
        ),
        (["1.0", "2.5", "1.0"], "2.5 are measured.*classes=\\["),
        (["1e-3", "2"], "1e-3 are measured"),
        (["1", "1.0", "2"], "one number written in several ways"),
        (["1", "nan", "0"], "numbers and nan: is one missing"),
        (["0", "1", "None"], "numbers and None"),
    ],
)
def test_labels_that_are_measured_are_no_classes(
    tmp_path: Path, labels: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        text_table(table(tmp_path / "t.csv", labels), str.split)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        labelled(["a"] * len(labels), labels, str.split)  # type: ignore[arg-type]
    named = sorted(set(labels))
    found = text_table(tmp_path / "t.csv", str.split, classes=named)  # type: ignore[arg-type]
    assert found.classes == tuple(named)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["1.0", "0.0", "10.0", "2.0"], ("0.0", "1.0", "2.0", "10.0")),
        (["1", "2.5", "cat"], ("1", "2.5", "cat")),
        (["1.2.3", "1.10.0"], ("1.10.0", "1.2.3")),
        (["nan", "inf", "good"], ("good", "inf", "nan")),
        (["True", "False"], ("False", "True")),
        (["007", "8"], ("007", "8")),
    ],
)
def test_labels_that_are_names_are_classes(
    tmp_path: Path, labels: list[str], classes: tuple[str, ...]
) -> None:
    found = text_table(table(tmp_path / "t.csv", labels), str.split)  # type: ignore[arg-type]
    assert found.classes == classes


def test_labels_in_lists_may_be_tensors_and_none_may_be_missing() -> None:
    read: Any = str.split
    expected = labelled(["a", "b"], [0, 1], read)
    for labels in (torch.tensor([0, 1]), np.array([0, 1])):
        assert labelled(["a", "b"], labels, read).classes == expected.classes == ("0", "1")
    with pytest.raises(DataError, match=r"(?s)example 1: it has no label.*example 2: it has no"):
        labelled(["a", "b", "c"], ["x", None, math.nan], read)


# Texts that are none.

CHATS = [{"messages": [{"role": "user", "content": "hello"}]}] * 3
PAIRS = [{"prompt": "2 + 2", "completion": "4"}] * 3


class Reader:
    """Would read anything."""

    class tokenizer:
        eos_token_id = None

        def __new__(cls, text: str, **options: Any) -> Any:
            return {"input_ids": list(text.encode())}


@pytest.mark.parametrize("rows", [CHATS, PAIRS], ids=["chats", "pairs"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.ndjson"])
@pytest.mark.parametrize("lines", [True, False], ids=["lines", "list"])
def test_records_are_not_learnt_as_text(tmp_path: Path, rows: Any, name: str, lines: bool) -> None:
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    with pytest.raises(DataError, match=rf"{name}: these are records with .*apply_chat_template"):
        language_text(path, Reader(), length=4)  # type: ignore[arg-type]


def test_tables_are_not_learnt_as_text_but_words_in_braces_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nwords,1\n")
    with pytest.raises(DataError, match=r"\.csv files hold records"):
        language_text(tmp_path / "a.csv", Reader(), length=4)  # type: ignore[arg-type]
    for text in ('{"braces": in a text}', "[a list, so to speak]", '{"width": 3} is code'):
        (tmp_path / "a.txt").write_text(text)
        assert len(language_text(tmp_path / "a.txt", Reader(), length=4)) > 1  # type: ignore[arg-type]


# Tables that are damaged.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('text,label\nfine,0\n"not closed,1\nmore,0\n', "line 3: .*a quote is not closed"),
        ('text,label\n\n"a" b,1\n', "line 3: .*a quote is not closed, or stands within"),
        ('text,label\n"two\nlines",1\n"open,0\n', "line 4: "),
        ("text,label,text\na,0,b\n", "line 1: 2 columns are called 'text', 0, 2 from 0"),
    ],
)
def test_damaged_tables_are_named_with_their_lines(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "damaged.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=f"(?s)damaged.csv.*{message}"):
        text_table(path, str.split)  # type: ignore[arg-type]
