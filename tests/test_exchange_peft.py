"""Networks to PEFT and from PEFT: its own loader and its own files are the other side.

Each cell of two tables, methods and layers, goes there and back; outputs must be the same to the
last digits of double precision. (VeRA's random pair has float32 numbers, which PEFT's common pair
scales for the largest layer and gift's for each.)
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import ma_adapt, mc_name
from gift.interop import load_peft, save_peft
from tests.cases.exchange import LAYERS, LOOSE, OURS, THEIRS, cells, randomised, trained_by_peft
from tests.common import all_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_peft(base: nn.Module, folder: Path) -> Any:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def loaded(base: nn.Module, folder: Path) -> Any:
    net = copy.deepcopy(base)
    load_peft(net, folder)
    return net.eval()


def assert_same(x: Tensor, one: nn.Module, other: nn.Module, base: nn.Module, row: str) -> None:
    output, close = one(x), LOOSE.get(row, 1e-10)
    torch.testing.assert_close(other(x), output, rtol=close, atol=close)
    assert (output - base(x)).abs().max() > 1e-4, "the delta of the test has no effect"


@pytest.mark.parametrize(("method", "layer"), cells(OURS))
def test_gift_to_peft_and_back(method: str, layer: str, tmp_path: Path) -> None:
    (make, inputs), (name, settings, _) = LAYERS[layer], OURS[method]
    base, x = make().eval(), inputs()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, FineTuningStrategy([(mc_name("inner"), ma_adapt(name, **settings))]))
    randomised(net)
    save_peft(net, tmp_path)
    assert_same(x, net, in_peft(base, tmp_path), base, method)
    assert_same(x, net, loaded(base, tmp_path), base, method)


@pytest.mark.parametrize(("config", "layer"), cells(THEIRS))
def test_peft_to_gift_and_back(config: str, layer: str, tmp_path: Path) -> None:
    (make, inputs), (kind, settings, _) = LAYERS[layer], THEIRS[config]
    base, x = make().eval(), inputs()
    theirs = trained_by_peft(copy.deepcopy(base), kind(target_modules=["inner"], **settings))
    theirs.save_pretrained(tmp_path / "theirs")
    net = loaded(base, tmp_path / "theirs")
    assert_same(x, theirs, net, base, config)
    save_peft(net, tmp_path / "ours")
    assert_same(x, theirs, in_peft(base, tmp_path / "ours"), base, config)
    bits = all_bits(base)
    assert all_bits(disable_fine_tuning(net)) == bits
