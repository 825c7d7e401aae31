"""What cannot be trained is told before anything changes: the network, the folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import gift
from gift.data import DataError
from gift.data.examples import Examples
from gift.schedules import FreezeUnfreeze
from gift.strategies import FreezeStrategy, HeadReplacementStrategy, IA3AllFineTuningStrategy
from gift.strategies.lora import LoRAAllFineTuningStrategy
from gift.training import Settings, TrainingError, evaluate, finetune, loop
from tests.common import full_state

QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "tensorboard": False, "epochs": 1}
DATA = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
LABELS = DATA[:, :3].argmax(1)


class Damaged(Dataset[Any]):
    """An example cannot be read."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        if place == self.place:
            raise DataError("pictures/bee.jpg is damaged")
        return DATA[place], LABELS[place]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(DATA, LABELS, strict=True))


@pytest.fixture(autouse=True)
def _without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the runs; tests/test_training_report.py is about them."""
    monkeypatch.setattr(loop, "write_report", lambda *_: None)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def with_(labels: Any, **more: Any) -> dict[str, Any]:
    return {"train": (DATA, labels), **more}


# The example that comes last in the first epoch with this seed.
SEED = 2
LATE = int(torch.randperm(20, generator=torch.Generator().manual_seed(SEED))[-1])


def one(place: int, value: int) -> Tensor:
    return LABELS.index_fill(0, torch.tensor([place]), value)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no examples": (
        {"train": (DATA[:0], LABELS[:0])}, TrainingError,
        "no examples: the data set or loader is empty"),
    "an empty loader": (
        {"train": DataLoader(TensorDataset(DATA[:0], LABELS[:0]))}, TrainingError, "is empty"),
    "no examples to validate on": (with_(LABELS, valid=(DATA[:0], LABELS[:0])), TrainingError,
        "empty"),
    "unequal numbers": (with_(LABELS[:5]), TrainingError, "20 inputs and 5 targets"),
    "a stream": ({"train": Stream()}, TrainingError, "no length"),
    "no data at all": ({"train": 3}, TypeError, "gift.data.Examples.*got a int"),
    "labels above": (with_(one(0, 3)), TrainingError, r"labels \[3\].*3 classes.*from 0 to 2"),
    "labels below": (with_(one(0, -1)), TrainingError, r"labels \[-1\] are out of range"),
    "other classes than the head": (
        {"train": Examples(TensorDataset(DATA, LABELS), classes=("ant", "bee"))}, TrainingError,
        r"3 classes.*the examples have 2 \(ant, bee\).*HeadReplacementStrategy\(num_classes=2"),
    "other classes to validate on": (
        {"train": Examples(TensorDataset(DATA, LABELS), classes=("a", "b", "c")),
         "valid": Examples(TensorDataset(DATA, LABELS), classes=("a", "c", "b"))},
        TrainingError, "classes=train.classes"),
    "numbers that are no classes": (with_(DATA[:, 0]), TrainingError, "task='regression'"),
    "too few numbers": (with_(DATA[:, 0], task="regression"), TrainingError, "expected as many"),
    "no such task": (with_(LABELS, task="guessing"), TrainingError, "expected one of.*regression"),
    "no language model": (with_(LABELS, task="language"), TrainingError, "with its head"),
    "no such metric": (with_(LABELS, metrics=("acuracy",)), TrainingError, "closest: .'accuracy'"),
    "a metric of another task": (with_(LABELS, metrics=("map",)), TrainingError, "not a metric of"),
    "nothing to watch": (with_(LABELS, patience=2), TrainingError, "give valid"),
    "watching what is not measured": (
        with_(LABELS, valid=(DATA, LABELS), watch="auroc"), TrainingError,
        "one of .'loss', 'accuracy'"),
    "no such optimizer": (with_(LABELS, optimizer="AdamV"), TrainingError, "closest: .'Adam'"),
    "no such schedule of rates": (with_(LABELS, lr_schedule="cosin"), TrainingError, "'onecycle'"),
    "no such device": (with_(LABELS, device="cuda:77"), TrainingError, "no device 'cuda:77'"),
    "nothing trained": (with_(LABELS, strategy=FreezeStrategy()), TrainingError, "nothing is"),
    "no outer factors": (
        with_(LABELS, strategy=IA3AllFineTuningStrategy(), loraplus_ratio=4.0), TrainingError,
        "lora_B"),
    "a strategy that does not fit": (
        with_(LABELS, strategy=HeadReplacementStrategy(3, head_name="fc")), ValueError, "fc"),
    "a damaged example": ({"train": Damaged(0)}, DataError, "bee.jpg is damaged"),
    "a damaged example to validate on": (with_(LABELS, valid=Damaged(3)), DataError, "bee.jpg"),
    "a label to validate on, late": (
        with_(LABELS, valid=(DATA, one(19, 7)), batch_size=4), TrainingError, r"labels \[7\] are"),
    "an old label, late": (with_(LABELS, old=(DATA, one(19, 7)), batch_size=4), TrainingError,
        r"labels \[7\] are"),
    "texts for numbers": (
        with_(LABELS, lr="1e-3", seed="a", metrics="accuracy", batch_size=None), ValueError,
        "batch_size is None.*lr is '1e-3'.*seed is 'a'.*metrics is 'accuracy'"),
    "no schedule": (with_(LABELS, schedule="Freeze"), TypeError, "gift.schedules, got 'Freeze'"),
    "out of range": (
        with_(LABELS, epochs=0, lr=-1.0, precision="float8", warmup=2), ValueError,
        r"epochs is 0.*lr is -1.0.*warmup is 2.*precision is 'float8'"),
    "no such setting": (with_(LABELS, epoch=3), TypeError, "'epoch' is not a setting.*'epochs'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_leaves_network_and_folder_alone(name: str, tmp_path: Path) -> None:
    options, error, message = REFUSED[name]
    network = net()
    before = full_state(network)
    given = {"strategy": LoRAAllFineTuningStrategy(rank=2), **QUIET, **options}
    with pytest.raises(error, match=f"(?s){message}"):
        finetune(network, given.pop("train"), folder=tmp_path / "run", **given)
    assert full_state(network) == before
    assert not (tmp_path / "run").exists()


def test_a_refused_restart_leaves_the_run_that_was_there(tmp_path: Path) -> None:
    """Also where the folder is not a folder."""
    strategy = LoRAAllFineTuningStrategy(rank=2)
    finetune(net(), (DATA, LABELS), strategy=strategy, folder=tmp_path / "run", **QUIET)
    (tmp_path / "file").write_text("")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    late = (DATA, one(19, 7))
    for folder, valid in (("run", late), ("file", None), ("file/run", None)):
        network = net()
        untouched = full_state(network)
        with pytest.raises(TrainingError):
            finetune(
                network, (DATA, LABELS), valid, strategy=strategy, folder=tmp_path / folder,
                restart=True, batch_size=4, **QUIET,
            )  # fmt: skip
        assert full_state(network) == untouched
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_schedule_is_free_again_after_a_refusal() -> None:
    schedule = FreezeUnfreeze(unfreeze_epoch=0)
    with pytest.raises(TrainingError, match="out of range"):
        finetune(net(), (DATA, one(0, 9)), schedule=schedule, **QUIET)
    assert not schedule.is_attached


def test_a_milestone_after_the_last_epoch_is_reported() -> None:
    with pytest.warns(gift.GiftWarning, match=r"in epochs \[5\].*there are only 1"):
        finetune(net(), (DATA, LABELS), schedule=FreezeUnfreeze(unfreeze_epoch=5), **QUIET)


LATER: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "labels out of range": (lambda: (DATA, one(LATE, 7)), TrainingError, r"labels \[7\] are"),
    "a damaged example": (lambda: Damaged(LATE), DataError, "bee.jpg is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", LATER)
def test_what_is_found_while_training_keeps_the_last_checkpoint(
    name: str, workers: int, tmp_path: Path
) -> None:
    """The example is the last of an epoch, so what was written before is whole."""
    make, error, message = LATER[name]
    settings = QUIET | {
        "epochs": 3,
        "batch_size": 4,
        "checkpoint_steps": 1,
        "workers": workers,
        "seed": SEED,
    }
    strategy = LoRAAllFineTuningStrategy(rank=2)
    network = net()
    with pytest.raises(error, match=message):
        finetune(network, make(), strategy=strategy, folder=tmp_path, **settings)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < kept["counters"]["steps_done"] < 5
    whole = net()  # with the example mended, the run goes on
    with pytest.raises(TrainingError, match="some of the 20 training examples are other ones"):
        finetune(whole, (DATA, LABELS), strategy=strategy, folder=tmp_path, **settings)
    result = finetune(
        whole, (DATA, LABELS), strategy=strategy, folder=tmp_path, accept_changed_data=True,
        **settings,
    )  # fmt: skip
    assert len(result.steps) == 15


def test_evaluating_leaves_modes_as_they_are() -> None:
    network = net()
    network[1].eval()
    modes = [module.training for module in network.modules()]
    before = full_state(network)
    found = evaluate(network, (DATA, LABELS), device="cpu")
    assert set(found) == {"loss", "accuracy", "f1", "precision", "recall"}
    assert [module.training for module in network.modules()] == modes
    assert full_state(network) == before
    with pytest.raises(TrainingError, match="out of range"):
        evaluate(network, (DATA, one(19, 5)), device="cpu", batch_size=4)
    assert full_state(network) == before


def test_every_setting_is_reported_in_its_docstring() -> None:
    text = (Settings.__doc__ or "").split("Args:")[1].split("Raises:")[0]
    named = [line.split(":")[0].strip() for line in text.splitlines() if line.startswith(" " * 8)
             and not line.startswith(" " * 9)]  # fmt: skip
    assert named == list(Settings.__dataclass_fields__)
