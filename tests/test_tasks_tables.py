"""Tables of numbers and categories: what scikit-learn makes of them, and what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_diabetes, load_iris
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor, nn

from gift.data import DataError, RowReader, reader_from_config, tabular
from gift.errors import GiftWarning
from gift.jobs import Job, Run, init_text, run_job
from gift.strategies import FullFineTuningStrategy
from gift.training import finetune, predict
from tests.job_examples import CHEAP

QUIET: dict[str, Any] = {"device": "cpu", "progress": False}
ROWS = [
    ("31", "red", "7000", "yes"),
    ("", "blue", "8001", "no"),
    ("45.5", "red", "7000", "yes"),
    ("28", "", "8001", "no"),
    ("1e1", "green", "9000", "yes"),
]


def table(path: Path, rows: Any = ROWS, header: str = "age,colour,zip,label") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_inputs_are_those_of_scikit_learn(tmp_path: Path) -> None:
    """Its own pipeline of columns, on the same cells."""
    found = tabular(table(tmp_path / "t.csv"), categorical=["zip"])
    ages = [[float(row[0] or "nan")] for row in ROWS]
    cells = [[a[0], row[1], row[2]] for a, row in zip(ages, ROWS, strict=True)]
    numbers = make_pipeline(SimpleImputer(strategy="median", add_indicator=False), StandardScaler())
    columns = ColumnTransformer(
        [("n", numbers, [0]), ("c", OneHotEncoder(sparse_output=False), [1, 2])])  # fmt: skip
    expected = columns.fit_transform(np.array(cells, dtype=object))
    missing = np.isnan(np.array(ages)).astype(float)
    expected = np.concatenate([expected[:, :1], missing, expected[:, 1:]], 1).astype(float)
    got = torch.stack([found.dataset[n][0] for n in range(5)])
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert found.reader is not None
    assert found.reader.features == (  # type: ignore[attr-defined]
        "age", "age is missing", "colour=", "colour=blue", "colour=green", "colour=red",
        "zip=7000", "zip=8001", "zip=9000",
    )  # fmt: skip
    assert (found.classes, found.task) == (("no", "yes"), "classification")
    plain: Any = tabular(tmp_path / "t.csv").reader
    assert set(plain.numeric) == {"age", "zip"}


def test_numbers_of_categories_are_for_embeddings(tmp_path: Path) -> None:
    found: Any = tabular(table(tmp_path / "t.csv"), encode="index")
    batch = found.collate([found.dataset[n] for n in range(5)])
    assert batch["categorical"].tolist() == [[4], [2], [4], [1], [3]]
    assert batch["numeric"].shape == (5, 3)
    other = found.reader({"age": 3, "zip": 8001, "colour": "pink"})
    assert other["categorical"].tolist() == [0]

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 2), nn.Linear(5, 2)

        def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
            return self.out(torch.cat([numeric, self.embed(categorical[:, 0])], 1))

    net = Embedding()
    finetune(net, found, strategy=FullFineTuningStrategy(), epochs=1, **QUIET)
    assert predict(net, {"age": 3, "zip": "8001", "colour": "red"})[0].label in ("no", "yes")


def test_diabetes_as_well_as_by_least_squares(tmp_path: Path) -> None:
    data = load_diabetes(scaled=False)
    header = ",".join([*data.feature_names, "label"])
    rows = [[*x, y] for x, y in zip(data.data, data.target, strict=True)]
    path, held_out = table(tmp_path / "a.csv", rows[:300], header), rows[300:]
    train = tabular(path, task="regression", categorical=["sex"])
    valid = tabular(table(tmp_path / "b.csv", held_out, header), task="regression",
                    reader=train.reader)  # fmt: skip
    torch.manual_seed(0)
    net = nn.Linear(len(train.reader.features), 1)  # type: ignore[union-attr]
    result = finetune(net, train, valid, strategy=FullFineTuningStrategy(), epochs=40, lr=0.02,
                      weight_decay=0.0, **QUIET)  # fmt: skip
    least = LinearRegression().fit(data.data[:300], data.target[:300])
    expected = r2_score(data.target[300:], least.predict(data.data[300:]))
    assert result.after["r2"] == pytest.approx(expected, abs=0.02)
    row = dict(zip(data.feature_names, data.data[300], strict=True))
    [found] = predict(net, row)
    assert found.value == pytest.approx(least.predict(data.data[300:301])[0], abs=10)


def test_the_reader_is_plain_data(tmp_path: Path) -> None:
    """No pickle: JSON makes the same reader, and files with it are loaded as numbers and texts."""
    reader: Any = tabular(table(tmp_path / "t.csv")).reader
    config = json.loads(json.dumps(reader.to_config()))
    again = reader_from_config(config)
    assert again == reader
    row = {"age": "50", "colour": "pink", "zip": ""}
    assert torch.equal(again(row), reader(row))
    assert pickle.loads(pickle.dumps(reader)) == reader


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numeric": {"a": {"fill": 0, "mean": 0, "std": 0, "indicator": False}}}, "std > 0"),
        ({"numeric": {"a": {"fill": "x"}}}, "expected numbers"),
        ({"numeric": {"a": 5}}, "expected numbers"),
        ({"numeric": 5}, "numeric is 5, expected columns by their names"),
        ({"categorical": {"c": [1]}}, "expected different texts"),
        ({"categorical": {"c": ["x", "x"]}}, "expected different texts"),
        ({"numeric": {}, "categorical": {}}, "no columns"),
        ({"encode": "pickle"}, "encode is 'pickle'"),
        ({"run": "code"}, "has no"),
    ],
)
def test_readers_that_files_make_up_are_refused(change: Any, message: str) -> None:
    config = {"kind": "row", "numeric": {}, "categorical": {"c": ["x"]}, "encode": "onehot"}
    with pytest.raises(DataError, match=message):
        reader_from_config(config | change)


NAMES = [(n, f"name {n}", n % 2) for n in range(30)]


@pytest.mark.parametrize(
    ("rows", "header", "options", "message"),
    [
        ([*[(n, n % 2) for n in range(20)], ("1o", 1), ("x2", 0)], "age,label", {},
         r"(?s)line 22: '1o' in column 'age'.*categorical=\['age'\].*line 23"),
        (NAMES, "age,name,label", {}, r"'name' has 30 different texts in 30.*ignore=\['name'\]"),
        ([("", "a", 0), ("NA", "b", 1)], "age,c,label", {}, "'age' is empty"),
        (ROWS, "age,colour,zip,label", {"ignore": ["x"]}, "no column 'x', only"),
        (ROWS, "age,colour,zip,label", {"columns": ["x"]}, "there is no column 'x'"),
        (ROWS, "age,colour,zip,label", {"columns": ["label"]}, "no column besides the label"),
        (ROWS, "age,colour,zip,label", {"label": "y"}, "there is no column 'y'"),
        (ROWS, "age,age,zip,label", {}, "2 columns are called 'age'"),
        (ROWS, "age,colour,zip,label", {"encode": "hash"}, "encode is 'hash'"),
        (ROWS, "age,colour,zip,label", {"task": "regression"}, "(?s)line 2: 'yes' is not a number"),
        ([], "age,label", {}, "no rows below it"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used_are_refused_by_line(
    rows: Any, header: str, options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        tabular(table(tmp_path / "t.csv", rows, header), **options)


def test_validation_examples_are_read_as_those_that_were_learnt(tmp_path: Path) -> None:
    train = tabular(table(tmp_path / "a.csv"))
    assert isinstance(train.reader, RowReader)
    other = table(tmp_path / "b.csv", [("x", "red", "1", "yes"), ("1", "red", "y", "no")])
    with pytest.raises(DataError, match=r"(?s)line 2: column 'age' is 'x'.*line 3: column 'zip'"):
        tabular(other, reader=train.reader)
    with pytest.raises(DataError, match=r"(?s)no column 'age'.*no column 'zip'"):
        tabular(table(tmp_path / "c.csv", [("red", "yes")], "colour,label"), reader=train.reader)
    pink = table(tmp_path / "d.csv", [("1", "pink", "1", "yes"), ("1", "red", "1", "no")])
    with pytest.warns(GiftWarning, match="1 categories are unknown.*line 2, colour='pink'"):
        tabular(pink, reader=train.reader)
    with pytest.raises(DataError, match="expected a row"):
        train.reader(["1"])
    with pytest.raises(DataError, match=r"(?s)no column 'zip'.*column 'age' is 'x'"):
        train.reader({"age": "x", "colour": "red"})


def test_a_network_for_another_number_of_inputs_is_told_the_inputs(tmp_path: Path) -> None:
    data = tabular(table(tmp_path / "t.csv"))
    with pytest.raises(RuntimeError) as caught:
        finetune(nn.Linear(3, 2), data, strategy=FullFineTuningStrategy(), epochs=1, **QUIET)
    assert "an example has 7 inputs: age, zip, age is missing, colour=" in caught.value.__notes__[0]


def test_a_job_on_iris(tmp_path: Path) -> None:
    data = load_iris()
    header = "a,b,c,d,label"
    rows = [[*x, data.target_names[y]] for x, y in zip(data.data, data.target, strict=True)]
    table(tmp_path / "t.csv", rows, header)
    job = Job(
        data={"kind": "tabular", "train": str(tmp_path / "t.csv"), "valid_share": 0.2},
        strategy="FullFineTuningStrategy", folder=str(tmp_path / "run"),
        training=CHEAP | {"epochs": 15, "lr": 0.05, "batch_size": 16},
    )  # type: ignore[arg-type]  # fmt: skip
    torch.manual_seed(0)
    result = run_job(job, nn.Linear(4, 3))
    assert result.after["accuracy"] > 0.85
    run = Run(tmp_path / "run", nn.Linear(4, 3))
    assert run.evaluate() == pytest.approx(result.after, abs=1e-6)
    found = run.predict([dict(zip("abcd", x, strict=True)) for x in data.data[::10]])
    said = [one.label for one in found]
    right = np.mean(
        [a == data.target_names[b] for a, b in zip(said, data.target[::10], strict=True)]
    )
    assert right > 0.8


def test_the_first_job_file_leaves_the_network_to_you() -> None:
    text = init_text("tabular")
    assert "network: null" in text
    assert "import:MODULE:FUNCTION" in text.replace("\n# ", " ")
