"""PEFT's rules, written again in gift, against PEFT's own functions; and files of other dtypes."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_layer
from gift.interop import load_peft, save_peft
from gift.interop.peft.names import by_pattern, exact_pattern, exactly, targeted
from gift.interop.peft.oft import adjusted
from gift.interop.peft.products import peft_factorization
from tests.cases.exchange import randomised

NAMES = [
    "fc", "xfc", "block.fc", "block.xfc", "layers.0.fc", "layers.1.fc", "layers.1.experts.0.fc",
    "layers.10.up", "h.2.attn.fc", "h.2.attn", "model.layers.3.mlp.up", "head", "head.fc", "a.b.c",
]  # fmt: skip
TARGETS: list[Any] = [
    ["fc"], ["block.fc"], ["fc", "up"], [], r".*fc", r"layers\.[01]\..*", "fc|head",
    ["attn", "a.b.c"],
]  # fmt: skip
EXCLUDED: list[Any] = [None, [], ["block.fc"], ["fc"], r".*experts.*", r"layers\..*"]
SAVED: list[Any] = [None, [], ["head"], ["fc"], ["layers.1"]]
LAYERS: list[Any] = [None, [], 1, [0, 2], [10, 3]]
PATTERNS: list[Any] = [None, [], "layers", ["h", "layers"]]


def test_targets_are_those_of_peft() -> None:
    """For some hundreds of configurations, each name."""
    chance, seen = random.Random(0), set()
    for _ in range(600):
        config: dict[str, Any] = {
            "target_modules": chance.choice(TARGETS),
            "exclude_modules": chance.choice(EXCLUDED),
            "modules_to_save": chance.choice(SAVED),
            "layers_to_transform": chance.choice(LAYERS),
            "layers_pattern": chance.choice(PATTERNS),
            "target_parameters": None,
        }
        theirs = SimpleNamespace(**config)
        expected = {name for name in NAMES if check_target_module_exists(theirs, name)}
        assert targeted(config, NAMES) == expected, config
        seen.add(frozenset(expected))
    assert len(seen) > 20


def test_patterns_are_those_of_peft() -> None:
    found = set()
    for patterns in (
        {"fc": 1},
        {"^fc": 1, "fc": 2},
        {r"layers\.\d+": 3},
        {"c|up": 4, r".*": 5},
        {},
    ):
        for name in NAMES:
            expected = patterns.get(get_pattern_key(patterns.keys(), name), 0)
            assert by_pattern(patterns, name, 0) == expected
            found.add(expected)
    assert found == {0, 1, 2, 4, 5}


@pytest.mark.parametrize("count", [1, 2, 5, len(NAMES)])
def test_what_is_written_means_these_modules_and_no_others(count: int) -> None:
    chance = random.Random(count)
    for _ in range(50):
        wanted = set(chance.sample(NAMES, count))
        config = {"target_modules": exactly(wanted, NAMES)}
        assert targeted(config, NAMES) == wanted
        for name in wanted:
            patterns = {exact_pattern(name): 1}
            assert {n for n in NAMES if by_pattern(patterns, n, 0)} == {name}


def test_parts_of_sizes_are_those_of_peft() -> None:
    for size in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 6, 8, 12, 16, 500):
            assert peft_factorization(size, factor) == factorization(size, factor), (size, factor)


def test_block_sizes_are_those_of_peft() -> None:
    layer = OFTLayer(nn.Linear(2, 2))
    for columns in range(2, 120):
        for size in (2, 3, 4, 7, 8, 32, 64):
            expected = layer.adjust_oft_parameters(columns, size) if columns % size else size
            assert adjusted(columns, size) == expected, (columns, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_written_and_read_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """In single precision whatever the base has, there as here."""
    base = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).to(dtype)
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).to(dtype)
    net.load_state_dict(base.state_dict())
    strategy = FineTuningStrategy([(mc_layer(), ma_adapt("lora", rank=2, lora_alpha=3))])
    enable_fine_tuning(net, strategy)
    randomised(net)
    save_peft(net, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, parameter in net.named_parameters():
        if "lora" in name:
            assert torch.equal(tensors[f"base_model.model.{name}.weight"], parameter)
    again = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).to(dtype)
    again.load_state_dict(base.state_dict())
    x = torch.randn(4, 8, dtype=dtype)
    theirs = PeftModel.from_pretrained(again, tmp_path)(x)
    load_peft(base, tmp_path)
    assert torch.equal(base(x), net(x))
    torch.testing.assert_close(net(x), theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


def test_a_file_of_peft_of_half_precision_is_read(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 16))
    model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), LoraConfig(r=2, target_modules=["0"]))
    randomised(model).half().save_pretrained(tmp_path)
    load_peft(base, tmp_path)
    assert base[0].lora_A.dtype is torch.float32
    assert torch.equal(base[0].lora_A, model.base_model.model[0].lora_A["default"].weight.float())
