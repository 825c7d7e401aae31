"""Classes and readers that are noted on a network belong to what it is at that moment."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift.core.io_spec import io_spec_of, set_io_spec
from gift.data import PictureReader, tensors
from gift.data.examples import Examples
from gift.factories import ma_adapt
from gift.strategies import FineTuningStrategy, HeadReplacementStrategy, merge_strategies
from gift.strategies.lora import LoRAAllFineTuningStrategy
from gift.training import finetune, predict

OLD, NEW = ("cat", "dog", "eel"), ("ant", "bee", "cow")
READER = PictureReader(size=8)
QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "tensorboard": False, "epochs": 2}
STRATEGY = merge_strategies([HeadReplacementStrategy(3), LoRAAllFineTuningStrategy(rank=1)])


def base(classes: tuple[str, ...] | None = OLD) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    if classes is not None:
        set_io_spec(net, PictureReader(size=4), classes, "classification")
    return net


def examples() -> Examples:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    made = tensors(inputs, inputs[:, :3].argmax(1), classes=NEW)
    return Examples(made.dataset, classes=NEW, reader=READER)


def trained(net: nn.Module) -> nn.Module:
    finetune(net, examples(), strategy=STRATEGY, **QUIET)
    return net


def labels(net: nn.Module) -> list[str | int]:
    return [found.label for found in predict(net, torch.eye(4))]


def named(net: nn.Module, names: tuple[str, ...] | range) -> list[str | int]:
    """The labels by plain computation."""
    with torch.no_grad():
        predicted: Tensor = copy.deepcopy(net).eval()(torch.eye(4)).argmax(1)
    return [names[number] for number in predicted]


@pytest.mark.parametrize("classes", [OLD, None])
def test_each_state_of_a_network_has_its_own_classes(
    classes: tuple[str, ...] | None, tmp_path: Path
) -> None:
    before = labels(base(classes))
    assert before == named(base(), OLD if classes else range(3))
    net = trained(base(classes))
    after = labels(net)
    assert after == named(net, NEW)
    with gift.disabled(net):
        assert labels(net) == before
    with gift.merged(net):
        assert labels(net) == after
    assert labels(net) == after
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert labels(twin) == after
    gift.save(net, tmp_path / "delta.safetensors")
    fresh = base(classes)
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert labels(fresh) == after
    assert io_spec_of(fresh).reader == READER
    merged = gift.merge(copy.deepcopy(net))
    assert labels(merged) == after
    assert labels(gift.disable_fine_tuning(net)) == before
    assert labels(gift.disable_fine_tuning(fresh)) == before
    again = base(classes)
    gift.enable_fine_tuning(again, STRATEGY)
    gift.load(again, tmp_path / "delta.safetensors")
    assert labels(again) == after


def test_a_new_head_has_no_names_for_its_classes() -> None:
    net = base()
    gift.plan_fine_tuning(net, STRATEGY)
    assert io_spec_of(net).classes == OLD
    gift.enable_fine_tuning(net, STRATEGY)
    assert (io_spec_of(net).classes, io_spec_of(net).reader) == (None, PictureReader(size=4))
    kept = base()
    gift.enable_fine_tuning(kept, LoRAAllFineTuningStrategy(rank=1))
    assert io_spec_of(kept).classes == OLD


@pytest.mark.parametrize("classes", [OLD, None])
def test_what_is_noted_while_a_network_is_fine_tuned_goes_with_the_delta(
    classes: tuple[str, ...] | None,
) -> None:
    net = base(classes)
    before = vars(net).get("_gift_io_spec")
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    set_io_spec(net, READER, NEW, "classification")
    assert io_spec_of(net).classes == NEW
    gift.disable_fine_tuning(net)
    assert io_spec_of(net).classes == classes
    assert vars(net).get("_gift_io_spec") is before


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapper_has_what_the_network_inside_has_unless_it_has_its_own(
    wrap: Callable[[nn.Module], Any],
) -> None:
    wrapper = wrap(base())
    assert io_spec_of(wrapper).classes == OLD
    set_io_spec(wrapper, None, NEW, "classification")
    assert io_spec_of(wrapper).classes == NEW


def test_a_reader_that_needs_files_is_told_of_where_there_is_a_folder(tmp_path: Path) -> None:
    """Without one, plain data of the tokenizer would name files that are not there."""

    class Filed(PictureReader):
        stands_alone = False

    net = base()
    set_io_spec(net, Filed(size=4), OLD, "classification")
    assert io_spec_of(net).to_config()["reader"] is None
    assert io_spec_of(net).to_config(tmp_path)["reader"]["size"] == [4, 4]


def test_a_strategy_that_no_file_can_name_is_no_hindrance(tmp_path: Path) -> None:
    """It is written down as what it came to, where a note is not a change that must be told."""
    caps = [(lambda *place: place[3] == "Linear", ma_adapt("lora", rank=1))]
    strategy = merge_strategies([HeadReplacementStrategy(3), FineTuningStrategy(caps)])
    net = base()
    finetune(net, examples(), strategy=strategy, **QUIET)
    gift.save(net, tmp_path / "delta.safetensors")
    fresh = base()
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert labels(fresh) == labels(net) == named(net, NEW)


def test_a_file_tells_its_classes(tmp_path: Path) -> None:
    net = trained(base())
    gift.save(net, tmp_path / "delta.safetensors")
    file = gift.inspect(tmp_path / "delta.safetensors")
    assert file.inputs["classes"] == list(NEW)
    assert "ant, bee, cow" in str(file)
