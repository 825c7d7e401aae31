"""Teachers, contrasts, curricula and balance: losses by formulas, orders of examples, refusals."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as metric_losses
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from gift.data import Examples, TextReader, class_folders, labelled, tensors, text_pairs
from gift.data.readers import PictureReader
from gift.errors import DataError
from gift.jobs import Job, JobError, Run, read_job, run_job
from gift.strategies import FullFineTuningStrategy
from gift.training import Embedded, TrainingError, evaluate, finetune, predict
from gift.training.balance import class_weights, easiest, example_weights
from gift.training.distributed import Processes
from gift.training.loading import Batches
from gift.training.settings import Settings
from gift.training.tasks.distillation import similarity_loss
from gift.zoo import load_network
from tests.job_examples import CHEAP, bert, images, texts, written
from tests.small_files import class_images, word_tokenizer

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
CLASSES = (X[:, 0] > 0).long() + (X[:, 0] > 1).long()
QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "epochs": 1, "batch_size": 24,
                         "lr": 1e-9}  # fmt: skip


def net(outputs: int = 3, seed: int = 0, width: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, outputs))


def first_loss(student: nn.Module, data: Any, **options: Any) -> float:
    result = finetune(student, data, strategy=FullFineTuningStrategy(), **QUIET | options)
    return result.steps[0]["loss"]


# Distillation.


def kullback_leibler(p: Tensor, q: Tensor, temperature: float) -> Tensor:
    p, q = (logits.double().div(temperature).softmax(1) for logits in (p, q))
    return temperature**2 * (p * (p / q).log()).sum(1)


TARGETS: dict[str, tuple[int, Tensor, dict[str, Any]]] = {
    "classification": (3, CLASSES, {}),
    "binary": (1, (X[:, 0] > 0).long(), {"task": "classification"}),
    "multi_label": (3, (X[:, :3] > 0).float(), {"task": "multi_label"}),
    "regression": (1, X[:, :1] * 2, {"task": "regression"}),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_soft_targets_by_their_formula(name: str, weight: float) -> None:
    outputs, targets, options = TARGETS[name]
    student, teacher = net(outputs), net(outputs, seed=1, width=9)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        z, t = student(X), teacher(X)
    if name == "classification":
        hard = F.cross_entropy(z, targets)
        soft = kullback_leibler(t, z, 3.0).mean()
    elif name == "binary":
        hard = F.binary_cross_entropy_with_logits(z.flatten(), targets.float())
        two = [torch.cat([torch.zeros_like(v), v], 1) for v in (t, z)]
        soft = kullback_leibler(two[0], two[1], 3.0).mean()
    elif name == "multi_label":
        hard = F.binary_cross_entropy_with_logits(z, targets)
        each = [kullback_leibler(torch.stack([torch.zeros(24), t[:, c]], 1),
                                 torch.stack([torch.zeros(24), z[:, c]], 1), 3.0)
                for c in range(3)]  # fmt: skip
        soft = torch.stack(each).mean()
    else:
        hard, soft = F.mse_loss(z, targets), F.mse_loss(z, t)
    found = first_loss(student, (X, targets), teacher=teacher, distill_weight=weight,
                       distill_temperature=3.0, **options)  # fmt: skip
    assert found == pytest.approx(((1 - weight) * hard + weight * soft).item(), rel=1e-4, abs=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training


def test_a_student_learns_what_its_teacher_says_not_the_labels() -> None:
    teacher, student = net(seed=1), net()
    x = torch.randn(200, 5)
    wrong = torch.randint(3, (200,))
    result = finetune(
        student, (x, wrong), (x, teacher(x).argmax(1)), teacher=teacher,
        strategy=FullFineTuningStrategy(),
        **QUIET | {"epochs": 60, "lr": 0.02, "distill_weight": 1.0},
    )  # fmt: skip
    assert result.after["accuracy"] > 0.9
    assert sum(map(sum, result.confusion or [])) == 200
    agree = (student(x).argmax(1) == teacher(x).argmax(1)).float().mean()
    assert agree > 0.9


def test_hidden_states_of_any_width_by_their_formula() -> None:
    """Tung and Mori 2019, equations 1 to 4, row by row."""
    student, teacher = net(), net(seed=1, width=9)
    with torch.no_grad():
        a, b = student[0](X).double(), teacher[0](X).double()
    expected = 0.0
    for i in range(24):
        rows = [[float(s[i] @ s[j]) for j in range(24)] for s in (a, b)]
        norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
        expected += sum((p / norms[0] - q / norms[1]) ** 2 for p, q in zip(*rows, strict=True))
    expected /= 24**2
    assert similarity_loss(a, b).item() == pytest.approx(expected, rel=1e-6)
    plain = first_loss(net(), (X, CLASSES), teacher=teacher)
    found = first_loss(net(), (X, CLASSES), teacher=teacher, distill_layers={"0": "0"},
                       distill_hidden_weight=5.0)  # fmt: skip
    assert found - plain == pytest.approx(5 * expected, rel=1e-3)


def test_teachers_that_do_not_fit_are_refused() -> None:
    student = net()
    for teacher, options, message in (
        (net(4), {}, r"the teacher gives float32 \[24, 4\], the network float32 \[24, 3\]"),
        (net(), {"distill_layers": {"9": "0"}}, "the network has no layer '9'"),
        (net(), {"distill_layers": {"0": "first"}}, "the teacher has no layer 'first'"),
        ("bert", {}, "the teacher is a str"),
    ):
        with pytest.raises(TrainingError, match=message):
            first_loss(student, (X, CLASSES), teacher=teacher, **options)
    with pytest.raises(ValueError, match="distill_weight is 2"):
        first_loss(student, (X, CLASSES), teacher=net(), distill_weight=2)


class Language(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(7, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def test_tokens_are_taught_where_they_are_learnt() -> None:
    ids = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    rows = [{"input_ids": i, "labels": own} for i, own in zip(ids, labels, strict=True)]
    student, teacher = Language(0), Language(1)
    with torch.no_grad():
        z, t = student(ids)[:, :-1], teacher(ids)[:, :-1]
    kept = labels[:, 1:] != -100
    hard = F.cross_entropy(z[kept], labels[:, 1:][kept])
    soft = kullback_leibler(t[kept], z[kept], 2.0).mean()
    data = Examples(rows, "language")  # type: ignore[arg-type]
    found = first_loss(student, data, teacher=teacher)
    assert found == pytest.approx((0.5 * hard + 0.5 * soft).item(), rel=1e-4)


def test_a_job_with_a_run_as_teacher(tmp_path: Path) -> None:
    texts(tmp_path / "data")
    bert(tmp_path / "model")
    job = {
        "network": {"name": "transformers:model"},
        "data": {"kind": "text_table", "train": "data/train.tsv"},
        "strategy": {"name": "FullFineTuningStrategy"},
        "training": CHEAP | {"epochs": 2, "lr": 0.01},
        "folder": "big",
    }
    run_job(read_job(written(tmp_path, job)))
    job |= {"teacher": "big", "folder": "small"}
    job["training"] = CHEAP | {
        "distill_weight": 1.0, "distill_layers": {"bert.encoder.layer.0": "bert.encoder.layer.1"}
    }  # fmt: skip
    result = run_job(read_job(written(tmp_path, job)))
    assert math.isfinite(result.history[0]["train_loss"])
    assert Run(tmp_path / "small").job.teacher == str(tmp_path / "big")
    words = (tmp_path / "data/train.tsv").read_text()
    (tmp_path / "data/train.tsv").write_text(words.replace("pleased", "glad"))
    job["folder"] = "other"
    with pytest.raises(JobError, match=r"(?s)the teacher does not fit.*it knows the classes"):
        run_job(read_job(written(tmp_path, job)))


# Contrasts.


def test_vectors_by_losses_of_pytorch_metric_learning() -> None:
    body = net(4)
    for name in ("NTXentLoss", "TripletMarginLoss", "MultiSimilarityLoss"):
        expected = getattr(metric_losses, name)()(body(X), CLASSES).item()
        found = first_loss(copy.deepcopy(body), (X, CLASSES), task="contrastive",
                           contrastive_loss=name)  # fmt: skip
        assert found == pytest.approx(expected, rel=1e-4)
    own = metric_losses.ContrastiveLoss(pos_margin=0.1)
    found = first_loss(copy.deepcopy(body), (X, CLASSES), task="contrastive", loss=own)
    assert found == pytest.approx(own(body(X), CLASSES).item(), rel=1e-4)


def test_the_nearest_other_vector_beside_scikit_learn() -> None:
    body = net(4)
    found = evaluate(body, (X, CLASSES), task="contrastive", device="cpu", batch_size=7)
    with torch.no_grad():
        vectors = body(X).numpy()
    near = NearestNeighbors(n_neighbors=2, metric="cosine").fit(vectors)
    nearest = near.kneighbors(vectors, return_distance=False)[:, 1]
    assert found["recall_at_1"] == pytest.approx(
        float((CLASSES[nearest] == CLASSES).float().mean())
    )


def test_vectors_of_a_class_come_together() -> None:
    body, data = net(4), tensors(X, CLASSES, task="contrastive")
    before = evaluate(body, data, device="cpu")["recall_at_1"]
    result = finetune(body, data, data, strategy=FullFineTuningStrategy(),
                      **QUIET | {"epochs": 60, "lr": 0.02})  # fmt: skip
    assert result.after["recall_at_1"] > max(before + 0.3, 0.75)
    found = predict(body, X[:2])
    assert [type(one) for one in found] == [Embedded] * 2
    assert torch.allclose(found[0].vector, F.normalize(body(X[:1])[0], dim=0), atol=1e-6)


def sentences(folder: Path, rows: str = "") -> Path:
    path = folder / "pairs.csv"
    path.write_text(
        "first,second\n" + (rows or "a good film,good\na bad film,bad\nvery,very very\n")
    )
    return path


class Body(nn.Module):
    """States of tokens, as an encoder gives them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return {"last_hidden_state": self.table(input_ids)}


def test_pairs_of_texts_are_pulled_together(tmp_path: Path) -> None:
    reader = TextReader(word_tokenizer())
    data = text_pairs(sentences(tmp_path), reader)
    batch = data.collate([data.dataset[n] for n in range(3)])  # type: ignore[misc]
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    body = Body()
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        states = body.table(batch["input_ids"]) * mask
        expected = metric_losses.NTXentLoss()(states.sum(1) / mask.sum(1), batch["labels"]).item()
    found = first_loss(body, data, lr=0.01)
    assert found == pytest.approx(expected, rel=1e-4)
    one, two = predict(body, ["very", "very very"])
    assert torch.allclose(one.vector, two.vector, atol=1e-6)  # a mean, without padding


def test_pairs_with_the_same_text_belong_together(tmp_path: Path) -> None:
    rows = "a,b\na,c\nd,b\ne,f\n"
    data = text_pairs(sentences(tmp_path, rows), TextReader(word_tokenizer()))
    assert [data.dataset[n]["labels"] for n in range(4)] == [0, 0, 0, 3]
    with pytest.raises(DataError, match="there is one pair"):
        text_pairs(sentences(tmp_path, "a,b\na,b\n"), TextReader(word_tokenizer()))
    with pytest.raises(DataError, match="line 2: nothing in column 'second'"):
        text_pairs(sentences(tmp_path, "a,\nc,d\n"), TextReader(word_tokenizer()))


def test_contrasts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no contrastive loss .NTXent., closest: ..NTXentLoss"):
        first_loss(net(), (X, CLASSES), task="contrastive", contrastive_loss="NTXent")
    with pytest.raises(TrainingError, match="expected a class number for each example"):
        first_loss(net(), (X, X[:, 0]), task="contrastive")
    with pytest.raises(TrainingError, match="expected vectors"):
        evaluate(nn.Unflatten(1, (5, 1)), (X, CLASSES), task="contrastive", device="cpu")
    class_images(tmp_path, a=1, b=1)
    with pytest.raises(DataError, match="the task is 'regression', expected"):
        class_folders(tmp_path, PictureReader(), task="regression")


def test_jobs_on_pairs_and_on_classes_of_images(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    sentences(tmp_path)
    job = {
        "network": {"name": "transformers:model"},
        "data": {"kind": "text_pairs", "train": "pairs.csv", "valid": "pairs.csv"},
        "strategy": {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}},
        "training": CHEAP,
    }
    result = run_job(read_job(written(tmp_path, job)))
    assert set(result.after) == {"loss", "recall_at_1"}
    [found] = Run(tmp_path / "run").predict(["good"])
    assert found.vector.norm() == pytest.approx(1)
    images(tmp_path / "data")
    job |= {"network": {"name": "timm:test_resnet", "weights": None}, "folder": "images",
            "data": {"kind": "class_folders", "options": {"task": "contrastive"},
                     "reader": {"size": 32}, "train": "data/train", "valid": "data/val"},
            "strategy": "NormFineTuningStrategy"}  # fmt: skip
    result = run_job(read_job(written(tmp_path, job)))
    assert set(result.after) == {"loss", "recall_at_1"}


def test_classifiers_of_torchvision_give_what_their_head_would_get() -> None:
    loaded = load_network("torchvision:shufflenet_v2_x0_5", None, task="contrastive")
    assert (loaded.task, loaded.classes) == ("contrastive", None)
    assert loaded.net.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1024)
    dense = load_network("torchvision:squeezenet1_1", None, task="contrastive").net
    assert dense.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 512)


# Curricula.


def orders(data: Any, epochs: int, **settings: Any) -> list[list[int]]:
    """The examples of each epoch, by their first number."""
    seen: list[list[int]] = []

    class Watching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(x[:, 0].long().tolist())
            return super().forward(x)

    torch.manual_seed(0)
    finetune(Watching(1, 2), data, strategy=FullFineTuningStrategy(),
             **QUIET | {"epochs": epochs, "batch_size": len(data[0])} | settings)  # fmt: skip
    return seen


def test_easy_examples_come_first() -> None:
    """The shares are those of the competence by Platanios et al., equation 3, with c0 = 0.2."""
    data = torch.arange(50.0)[:, None], torch.arange(50) % 2
    seen = orders(data, 8, curriculum=lambda item: -item[0].item())
    for epoch, order in enumerate(seen):
        assert len(order) == 50
        share = min(1.0, math.sqrt(min(epoch / 4, 1) * (1 - 0.04) + 0.04))
        assert set(order) == set(range(50 - math.ceil(share * 50 - 1e-9), 50))
        counts = np.bincount(order, minlength=50)
        assert counts.max() - counts[counts > 0].min() <= 1
    assert orders(data, 8) != seen
    assert orders(data, 8, curriculum=lambda item: -item[0].item()) == seen


def test_difficulty_by_length_and_by_loss() -> None:
    reader = TextReader(word_tokenizer())
    words = ["a " * n for n in (5, 1, 4, 2, 3)]
    data = labelled(words, ["x", "y", "x", "y", "x"], reader)
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if self.training:
                seen.append(attention_mask.sum(1).tolist())
            return self.table(input_ids).sum(1)

    finetune(Watching(), data, strategy=FullFineTuningStrategy(), curriculum="length",
             **QUIET | {"epochs": 4, "batch_size": 5})  # fmt: skip
    assert [sorted(set(order)) for order in seen[:2]] == [[1], [1, 2, 3, 4]]
    student, x = net(2), X[:10]
    labels = student(x).argmax(1)
    labels[3] = 1 - labels[3]
    each = F.cross_entropy(student(x), labels, reduction="none")
    found = finetune(student, (x, labels), strategy=FullFineTuningStrategy(), curriculum="loss",
                     **QUIET | {"epochs": 4, "batch_size": 10})  # fmt: skip
    two = each.sort().values[:2]
    assert found.steps[0]["loss"] == pytest.approx(two.mean().item(), rel=1e-4)


def test_curricula_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="curriculum is 'size'"):
        first_loss(net(), (X, CLASSES), curriculum="size")
    with pytest.raises(TrainingError, match="difficulty of example 0 is nan"):
        first_loss(net(), (X, CLASSES), curriculum=lambda item: math.nan)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, CLASSES), 5)
    for options in ({"curriculum": "length"}, {"balance": "weights"}, {"balance": "sampler"}):
        with pytest.raises(TrainingError, match="need examples one by one"):
            first_loss(net(), loader, **options)
    assert easiest(torch.arange(10.0), 5.0).tolist() == list(range(10))


# Balance.

RARE = torch.tensor([0] * 18 + [1] * 5 + [2])


def test_weights_of_classes_are_those_of_scikit_learn() -> None:
    data = tensors(X, RARE, classes=["a", "b", "c"])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=RARE.numpy())
    weights = class_weights(data, "classification", 3)
    assert weights.tolist() == pytest.approx(expected)
    student = net()
    loss = F.cross_entropy(student(X), RARE, torch.tensor(expected).float(), reduction="sum") / 24
    plain = F.cross_entropy(student(X), RARE)
    assert first_loss(copy.deepcopy(student), data, balance="weights") == pytest.approx(
        loss.item(), rel=1e-4)  # fmt: skip
    result = finetune(copy.deepcopy(student), data, data, strategy=FullFineTuningStrategy(),
                      balance="weights", **QUIET)  # fmt: skip
    assert result.before["loss"] == pytest.approx(plain.item(), rel=1e-5)  # judged without weights


def test_weights_of_several_labels_and_of_pixels() -> None:
    truth = (X[:, :3] > torch.tensor([0.0, 0.7, 1.0])).float()
    student = net()
    positive = (24 - truth.sum(0)) / truth.sum(0)
    expected = nn.BCEWithLogitsLoss(pos_weight=positive)(student(X), truth).item()
    found = first_loss(student, (X, truth), task="multi_label", balance="weights")
    assert found == pytest.approx(expected, rel=1e-4)
    masks = torch.randint(2, (6, 4, 4)) * torch.randint(2, (6, 4, 4))
    masks[0, 0] = -100
    fields = torch.randn(6, 3, 4, 4)
    dense = nn.Conv2d(3, 2, 1)
    known = masks[masks != -100]
    weights = compute_class_weight("balanced", classes=np.arange(2), y=known.numpy())
    expected = F.cross_entropy(dense(fields), masks, torch.tensor(weights).float(), reduction="sum")
    data = Examples(torch.utils.data.TensorDataset(fields, masks), "segmentation")
    found = first_loss(dense, data, balance="weights")
    assert found == pytest.approx(expected.item() / len(known), rel=1e-4)


def test_examples_are_drawn_so_that_classes_are_equally_frequent() -> None:
    data = tensors(torch.arange(24.0)[:, None], RARE, classes=["a", "b", "c"])
    weights = example_weights(data, "classification", 3)
    batches = Batches(data, 8, Processes(Settings(device="cpu")), shuffle=True)
    batches.weights = weights
    drawn = [n for epoch in range(100) for batch, _ in batches.of(epoch)
             for n in batch[0].flatten().long().tolist()]  # fmt: skip
    shares = torch.bincount(RARE[drawn]) / len(drawn)
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)
    again = [batch[0].tolist() for batch, _ in batches.of(3)]
    assert again == [batch[0].tolist() for batch, _ in batches.of(3)]
    several = labelled(["x"] * 3, [["a"], ["a", "b"], []], str.split, task="multi_label")  # type: ignore[arg-type]
    assert example_weights(several, "multi_label", 2).tolist() == [1.5, 3.0, 1.5]


def test_balance_that_cannot_be_is_refused() -> None:
    absent = tensors(X, CLASSES * 0, classes=["a", "b", "c"])
    with pytest.raises(TrainingError, match="no weight for b, c, of which there is no"):
        class_weights(absent, "classification", 3)
    with pytest.raises(TrainingError, match="for tasks with classes, not for regression"):
        first_loss(net(1), (X, X[:, :1]), task="regression", balance="weights")
    with pytest.raises(TrainingError, match="for classes of examples, not for regression"):
        first_loss(net(1), (X, X[:, :1]), task="regression", balance="sampler")
    with pytest.raises(TrainingError, match="not your own loss"):
        first_loss(net(), (X, CLASSES), loss=nn.CrossEntropyLoss(), balance="weights")
    with pytest.raises(ValueError, match="balance is 'both'"):
        first_loss(net(), (X, CLASSES), balance="both")


def test_a_job_names_them(tmp_path: Path) -> None:
    training = CHEAP | {"balance": "sampler", "curriculum": "length"}
    job = Job(data={"kind": "class_folders", "train": "x"}, training=training)  # type: ignore[arg-type]
    assert (job.training.balance, job.training.curriculum) == ("sampler", "length")
    with pytest.raises(ValueError, match="curriculum"):
        Job(data={"kind": "class_folders", "train": "x"},
            training=CHEAP | {"curriculum": lambda item: 1.0})  # type: ignore[arg-type]  # fmt: skip
