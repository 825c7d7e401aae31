"""What networks say of images, texts and tensors."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from gift import disabled, merge, merged
from gift.data import DataError, Examples, PictureReader, TextReader, class_folders, tensors
from gift.training import TrainingError
from gift.training.predicting import predict, remember
from gift.training.predictions import Detected, Prediction
from gift.zoo import load_network
from tests.common import enabled
from tests.small_files import class_images, image, saved, word_tokenizer
from tests.test_zoo import model_folder

READER = PictureReader(size=8)
NAMES = ("ant", "bee", "cat")


class Convolutions(nn.Sequential):
    """With all that a prediction could change: statistics, random numbers, modes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip


def remembering(folder: Path) -> tuple[Any, Examples]:
    """A network in training, which knows of examples."""
    net = enabled(Convolutions())
    examples = class_folders(class_images(folder, ant=2, bee=1, cat=2), READER, augment=True)
    remember(net, examples)
    return net, examples


def formula(net: nn.Module, inputs: Tensor) -> list[list[float]]:
    """Probabilities, in evaluation mode."""
    with torch.no_grad():
        logits = copy.deepcopy(net).eval()(inputs).double()
    exponentials = (logits - logits.amax(1, keepdim=True)).exp()
    return (exponentials / exponentials.sum(1, keepdim=True)).tolist()


def check(found: Any, given: list[Any], probabilities: list[list[float]]) -> None:
    assert [p.input for p in found] == given
    for one, row in zip(found, probabilities, strict=True):
        assert list(one.probabilities) == list(NAMES)
        assert list(one.probabilities.values()) == pytest.approx(row, rel=1e-6)
        assert one.label == NAMES[row.index(max(row))]
        assert one.probability == one.probabilities[one.label]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_files_get_the_probabilities_of_the_network(batch_size: int, tmp_path: Path) -> None:
    net, _ = remembering(tmp_path)
    files = sorted(tmp_path.rglob("*.png"))
    expected = formula(net, torch.stack([READER(file) for file in files]))
    check(predict(net, files, batch_size=batch_size), files, expected)
    texts = [str(file) for file in files]
    check(predict(net, texts), texts, expected)
    check(predict(net, texts[1]), texts[1:2], expected[1:2])
    images = [image(seed=3)]
    check(predict(net, images), images, formula(net, READER(images[0])[None]))


def test_tensors_need_no_reader() -> None:
    net, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    found = predict(net, inputs, classes=NAMES)
    assert [list(p.probabilities.values()) for p in found] == [
        pytest.approx(row) for row in formula(net, inputs)
    ]
    assert [p.label for p in predict(net, list(inputs))] == net(inputs).argmax(1).tolist()


def test_nothing_is_changed_by_predicting(tmp_path: Path) -> None:
    net, _ = remembering(tmp_path)
    net[3].eval()
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    predict(net, [image()])
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(DataError, match=r"absent\.png cannot be read"):
        predict(net, ["absent.png"])
    assert [m.training for m in net.modules()] == modes


def test_a_network_that_draws_in_evaluation_leaves_the_random_numbers() -> None:
    class Noisy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + torch.rand(())

    random = torch.get_rng_state()
    net = Noisy(4, 2)
    random = torch.get_rng_state()
    predict(net, torch.zeros(1, 4))
    assert torch.equal(torch.get_rng_state(), random)


def through_a_file(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": through_a_file,
    "merge": lambda net: merge(copy.deepcopy(net)) or net,
    "compile": lambda net: torch.compile(net, backend="eager"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_remember(kind: str, tmp_path: Path) -> None:
    net, _ = remembering(tmp_path)
    other = COPIES[kind](net)
    given = [image(seed=1), image(seed=2)]
    for own, its in zip(predict(net, given), predict(other, given), strict=True):
        assert its.label == own.label
        assert its.probabilities == pytest.approx(own.probabilities, rel=1e-4)


def test_the_base_and_the_merged_network_predict_too(tmp_path: Path) -> None:
    net, _ = remembering(tmp_path)
    given = [image(seed=1)]
    before = predict(net, given)[0]
    with merged(net):
        assert predict(net, given)[0].probabilities == pytest.approx(before.probabilities, rel=1e-4)
    with disabled(net):
        expected = formula(net, READER(given[0])[None])[0]
        with pytest.raises(TrainingError, match="give reader="):  # which was noted in training
            predict(net, given)
        found = predict(net, given, reader=READER)[0].probabilities
    assert list(found.values()) == pytest.approx(expected)
    assert found != before.probabilities


def test_a_prediction_shows_its_best_classes() -> None:
    shares = {"ant": 0.25, "bee": 0.7, "cat": 0.05}
    shown = Prediction(Path("a.jpg"), "bee", 0.7, shares, top=2)
    assert str(shown) == "a.jpg: bee 70.0%, ant 25.0%"
    assert shown.best(1) == [("bee", 0.7)]
    assert [name for name, _ in shown.best(9)] == ["bee", "ant", "cat"]
    assert str(Detected("b.jpg", [], [], [])) == "b.jpg:\n  nothing"
    assert str(Detected("b.jpg", [[1.0, 2.0, 30.6, 4.0]], ["dog"], [0.5])) == (
        "b.jpg:\n  dog 50.0% at 1, 2, 31, 4"
    )


@pytest.mark.parametrize(("kind", "task"), [("bert", None), ("gpt2", "classification")])
def test_texts(kind: str, task: str | None, tmp_path: Path) -> None:
    model_folder(tmp_path, kind, task)
    loaded = load_network(f"transformers:{tmp_path}")
    net: Any = loaded.net.eval()
    names = [f"class {i}" for i in range(net.config.num_labels)]
    texts = ["a very good film , a", "bad", "a bad film"]
    ids = [torch.tensor([word_tokenizer()(text)["input_ids"]]) for text in texts]
    with torch.no_grad():  # one at a time: without padding
        alone = [F.softmax(net(input_ids=one).logits.double(), 1)[0].tolist() for one in ids]
    for batch_size in (1, 3):
        found = predict(net, texts, classes=names, batch_size=batch_size)
        for one, text, row in zip(found, texts, alone, strict=True):
            assert one.input == text
            assert list(one.probabilities.values()) == pytest.approx(row, abs=1e-6)
    pairs = [("a film", "very bad"), ("bad", "good")]
    assert [p.input for p in predict(net, pairs)] == pairs


def test_images_of_a_network_by_name(tmp_path: Path) -> None:
    model_folder(tmp_path, "vit")
    net = load_network(f"transformers:{tmp_path}").net
    [found] = predict(net, saved(tmp_path / "a.png"))
    assert set(found.probabilities) == {"ant", "bee"}  # type: ignore[union-attr]


def test_objects(tmp_path: Path) -> None:
    net = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, score_thresh=0.0, detections_per_img=4
    )
    loaded = load_network(
        "torchvision:ssdlite320_mobilenet_v3_large", None, num_classes=3, score_thresh=0.0,
        detections_per_img=4,
    )  # fmt: skip
    loaded.net.load_state_dict(net.state_dict())
    paths = [saved(tmp_path / f"{i}.png", width=40 + i, seed=i) for i in range(2)]
    found: Any = predict(loaded.net, paths, classes=["__background__", "dog", "car"])
    with torch.no_grad():
        assert loaded.reader is not None
        expected = net.eval()([loaded.reader(path) for path in paths])
    for one, path, its in zip(found, paths, expected, strict=True):
        assert one.input == path
        assert one.boxes == its["boxes"].tolist()
        assert one.scores == its["scores"].tolist()
        assert one.labels == [["", "dog", "car"][number] for number in its["labels"]]
        assert one.labels
    with pytest.raises(TrainingError, match="finds class"):
        predict(loaded.net, paths, classes=["__background__"])


class Segmenting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("net", "given", "options", "message"),
    [
        (nn.Linear(2, 2), ["a.jpg"], {}, "reads a.jpg is not known: give reader=PictureReader"),
        (
            nn.Linear(2, 2),
            torch.zeros(1, 2),
            {"classes": NAMES},
            "distinguishes 2 classes, but 3 are named",
        ),
        (Segmenting(), torch.zeros(1, 2, 3, 3), {}, r"gives \[1, 2, 3, 3\], expected logits"),
        (nn.Linear(2, 2), torch.zeros(1, 2), {"device": "no such"}, "no device"),
    ],
)
def test_what_cannot_be_predicted_is_reported(
    net: Any, given: Any, options: Any, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        predict(net, given, **options)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"top": 0}, {"top": 1.5}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a whole number of at least 1"):
        predict(nn.Linear(2, 2), torch.zeros(1, 2), **options)


@pytest.mark.parametrize("task", ["language", "painting"])
def test_what_has_no_answer_is_not_predicted(task: str) -> None:
    net = nn.Linear(2, 2)
    remember(net, tensors(torch.zeros(2, 2), torch.zeros(2), task=task))
    with pytest.raises(TrainingError, match=task):
        predict(net, torch.zeros(1, 2))


def test_no_inputs_give_no_predictions() -> None:
    assert predict(nn.Linear(2, 2), []) == []


def test_what_is_given_counts_more_than_what_is_noted(tmp_path: Path) -> None:
    net, _ = remembering(tmp_path)
    other = PictureReader(size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    [found] = predict(net, image(), reader=other, classes="xyz")
    expected = formula(net, other(image())[None])[0]
    assert found.probabilities == pytest.approx(dict(zip("xyz", expected, strict=True)))  # type: ignore[union-attr]


def test_texts_need_a_reader_that_fits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a text"):
        predict(nn.Linear(2, 2), [3.5], reader=TextReader(word_tokenizer()))
