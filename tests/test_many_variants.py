"""What may vary between runs of one job: names, spaces, and the jobs that come of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gift.jobs import Job, JobError
from gift.many.costs import Costs
from gift.many.space import chosen, space_of
from gift.many.variants import method_names, parsed, split_list, varied
from gift.strategies import load_strategy_from_config
from tests.job_examples import images

DATA = {"kind": "class_folders", "train": "data"}
JOB = Job.model_validate(
    {"data": DATA, "strategy": {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 3}}}
)

VARIED: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "the method of the job keeps its settings": (
        {"method": "lora"}, "LoRALinearFineTuningStrategy", {"rank": 3},
    ),
    "another method has its defaults, on the same layers": (
        {"method": "dora"}, "DoRALinearFineTuningStrategy", {},
    ),
    "other layers": ({"targets": "conv"}, "LoRAConvFineTuningStrategy", {"rank": 3}),
    "a rank": ({"method": "dora", "rank": 5}, "DoRALinearFineTuningStrategy", {"rank": 5}),
    "no rank where there is none": (
        {"method": "ia3", "targets": "all", "rank": 5}, "IA3AllFineTuningStrategy", {},
    ),
    "the size of a method that calls it otherwise": (
        {"method": "fourierft", "rank": 5}, "FourierFTLinearFineTuningStrategy",
        {"n_frequency": 5},
    ),
    "a strategy by its name": (
        {"method": "NormFineTuningStrategy"}, "NormFineTuningStrategy", {},
    ),
    "everything": ({"method": "full"}, "FullFineTuningStrategy", {}),
    "an argument": (
        {"strategy.init_paras.lora_alpha": 7},
        "LoRALinearFineTuningStrategy", {"rank": 3, "lora_alpha": 7},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "name", "paras"), VARIED.values(), ids=VARIED)
def test_a_job_with_other_settings(
    settings: dict[str, Any], name: str, paras: dict[str, Any]
) -> None:
    before = JOB.to_config()
    made = varied(JOB, settings)
    assert (made.strategy.name, made.strategy.init_paras) == (name, paras)
    assert JOB.to_config() == before
    rest = {k: v for k, v in made.to_config().items() if k != "strategy"}
    assert rest == {k: v for k, v in before.items() if k != "strategy"}


def test_settings_of_the_training_need_no_path() -> None:
    schedule = {"name": "FreezeUnfreeze", "init_paras": {"unfreeze_epoch": 1}}
    made = varied(JOB, {"lr": 0.5, "training.epochs": 3, "schedule": schedule, "data.valid": "x"})
    assert (made.training.lr, made.training.epochs, made.data.valid) == (0.5, 3, {"path": "x"})
    assert made.schedule is not None
    assert made.schedule.init_paras == {"unfreeze_epoch": 1}


def test_every_method_makes_a_strategy() -> None:
    for name in method_names():
        section = varied(JOB, {"method": name}).strategy
        load_strategy_from_config({"name": section.name, "init_paras": section.init_paras})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a setting": ({"lerning_rate": 1, "epoch": 1}, "there is no setting 'lerning_rate'"),
    "two settings": ({"lerning_rate": 1, "epoch": 1}, "closest: 'epochs'"),
    "a method": ({"method": "lorra"}, "there is no method 'lorra', closest: 'lora'"),
    "layers": ({"targets": "some"}, "targets: this is 'some', expected one of"),
    "a value": ({"lr": "fast"}, "training.lr: this is 'fast', expected a number"),
    "layers of what has none": (
        {"targets": "all", "strategy": "FullFineTuningStrategy"}, "has none, name a method too",
    ),
    "the folder, which is not a setting": ({"folder": "x"}, "there is no setting 'folder'"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), WRONG.values(), ids=WRONG)
def test_what_cannot_vary_is_said(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(JobError) as error:
        varied(JOB, settings)
    assert expected in str(error.value)


def test_a_variant_as_a_text() -> None:
    settings = {"method": "lora", "rank": 8, "lr": 0.001}
    assert parsed("lora:rank=8:lr=1e-3") == ("lora:rank=8:lr=1e-3", settings)
    _, with_mapping = parsed("lora:optimizer_options={betas: [0.9, 0.99]}:rank=1")
    options = {"betas": [0.9, 0.99]}
    assert with_mapping == {"method": "lora", "optimizer_options": options, "rank": 1}
    assert split_list(["lora:a={b: 1, c: 2},ia3", " full "]) == [
        "lora:a={b: 1, c: 2}",
        "ia3",
        "full",
    ]
    with pytest.raises(JobError, match="'rank' is not NAME=VALUE"):
        parsed("lora:rank")


SPACES: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"lrr": [1]}, "lrr: there is no setting 'lrr', closest: 'lr'"),
    "a single value": ({"lr": 1}, "lr: this is 1, expected a list of values, or low and high"),
    "a range that ends before it begins": ({"lr": {"low": 2, "high": 1}}, "low is 2, which is"),
    "a logarithm of zero": ({"lr": {"low": 0, "high": 1, "log": True}}, "log needs a low above 0"),
    "a word": ({"lr": {"low": "small", "high": 1}}, "low: this is 'small', expected a number"),
    "a half range": ({"lr": {"low": 1}}, "high: this is empty (null), expected a number"),
    "an unknown key": ({"lr": {"low": 1, "hihg": 2}}, "there is no 'hihg' here, closest: 'high'"),
    "no values": ({"lr": []}, "choices: this is [], expected a list of values"),
    "a value twice": ({"lr": [1, 1]}, "choices: a value is listed twice"),
    "a condition on what stands below": (
        {"lr": {"choices": [1], "when": {"epochs": 1}}, "epochs": [1, 2]},
        "when: 'epochs' must stand above",
    ),
    "a condition on what does not vary": (
        {"lr": {"choices": [1], "when": {"epochs": 1}}}, "when: 'epochs' does not vary",
    ),
    "one setting under two names": (
        {"lr": [1], "training.lr": [2]}, "training.lr: this is the same setting as lr",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("vary", "expected"), SPACES.values(), ids=SPACES)
def test_what_is_wrong_with_a_space_is_said(vary: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        space_of(vary)


class Draws:
    """Stands for a trial of Optuna: always the first choice or the lower end."""

    def __init__(self, method: str) -> None:
        self.method = method

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.method if name == "method" else choices[0]

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return low

    suggest_float = suggest_int


def test_what_does_not_matter_is_not_chosen() -> None:
    """Conditions, and a rank for a method that has none; the method is chosen first."""
    vary = {
        "rank": {"low": 2, "high": 8},
        "loraplus_ratio": {"choices": [16], "when": {"method": ["lora", "dora"]}},
        "schedule": [{"name": "FreezeUnfreeze"}, None],
        "method": ["lora", "ia3"],
    }
    space = space_of(vary)
    own = {"schedule": {"name": "FreezeUnfreeze"}}
    expected = {"method": "lora", "rank": 2, "loraplus_ratio": 16, **own}
    assert chosen(space, Draws("lora"), JOB) == expected
    assert chosen(space, Draws("ia3"), JOB) == {"method": "ia3", **own}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU())
        self.fc = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def image_data(folder: Path) -> Job:
    images(folder / "data")
    data = {"kind": "class_folders", "train": "data/train", "reader": {"size": 4}}
    strategy = {"name": "LoRAAllFineTuningStrategy", "init_paras": {"rank": 1}, "head": "keep"}
    return Job.model_validate({"data": data, "strategy": strategy}).anchored(folder)


def test_what_jobs_train_is_counted_before_they_run(tmp_path: Path) -> None:
    """By hand: rank (48 + 16) + rank (16 + 2), in float32; a full network; a budget of sizes."""
    job, costs = image_data(tmp_path), Costs(Net())
    assert costs.of(varied(job, {"rank": 2})) == (164, 656)
    assert costs.of(varied(job, {"method": "full"})).parameters == 48 * 16 + 16 + 16 * 2 + 2
    assert costs.of(varied(job, {"method": "head"})).parameters == 16 * 2 + 2
    assert costs.excess(varied(job, {"rank": 2}), 82) == pytest.approx(1)
    assert costs.excess(varied(job, {"rank": 2}), 164) == 0
    sized = costs.sized(job, 300)
    assert 200 < costs.of(sized).parameters <= 300
    assert Job.model_validate(sized.to_config()) == sized
    with pytest.raises(JobError, match="a budget of 10 does not fit the job"):
        costs.sized(job, 10)
