"""Regular expressions in files of strangers: those that could take very long are not matched."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gift
from gift.errors import DeltaFileError
from gift.factories import ma_adapt, mc_name, mc_path
from gift.interop import load_peft, save_peft
from gift.strategies import LoRALinearFineTuningStrategy, load_strategy_from_config
from gift.support.patterns import ways
from tests.common import full_state

# Each takes 2^n or n^5 steps, or more, for some name of n letters.
SLOW = [
    r"(a+)+b", r"(a*)*b", r"(a|aa)+b", r"(a|a)*b", r"(.*a){12}b", r"([a-z]+)*\.x", r"(\w+\.?)+x",
    r"((a{1,30}){1,30}){1,30}b", "a?" * 40 + "a" * 40, ".*" * 5 + "x", r"(?:(?:a+)+|b)+c",
    r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(x+x+)+y", r"(?!(a+)+b)a.*", r"(?=(a+)+b)a", r"(.*)\1\1\1b",
    r"(?i:(a+)+b)",
]  # fmt: skip
# As adapters of people have them.
USUAL = [
    r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"^.*(?:language_model|text).*\.layers\.\d+\.(?:q_proj|v_proj)$",
    r"(?!.*vision_tower).*\.(q_proj|k_proj)", r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"model\.layers\.(0|1|2)\.attn", r"[a-z]+\.[0-9]{1,3}\.attn(\.to_q)?", "0|2",
    "|".join(re.escape(f"blocks.{i}.attn.qkv") for i in range(5000)),
]  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    tuned = net()
    gift.enable_fine_tuning(tuned, LoRALinearFineTuningStrategy(rank=1))
    save_peft(tuned, folder)
    return folder


def changed(saved: Path, folder: Path, **options: Any) -> Path:
    """As PEFT writes it, which keeps no digest of the configuration beside the weights."""
    weights = load_file(saved / "adapter_model.safetensors")
    save_file(weights, folder / "adapter_model.safetensors")
    config = json.loads((saved / "adapter_config.json").read_text()) | options
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


OPTIONS = {
    "target_modules": lambda pattern: pattern,
    "exclude_modules": lambda pattern: pattern,
    "rank_pattern": lambda pattern: {pattern: 1},
    "alpha_pattern": lambda pattern: {pattern: 1},
    "modules_to_save": lambda pattern: [pattern],
    "layers_pattern": lambda pattern: [pattern],
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pattern", SLOW)
def test_an_adapter_with_a_slow_pattern_is_refused(
    option: str, pattern: str, saved: Path, tmp_path: Path
) -> None:
    folder = changed(saved, tmp_path, **{option: OPTIONS[option](pattern)})
    other = net()
    before = full_state(other)
    shown = re.escape(repr(pattern[:20])[:-1])
    with pytest.raises(DeltaFileError, match=rf"(?s)the regular expression .*{shown[1:]}"):
        load_peft(other, folder)
    assert full_state(other) == before


def test_many_patterns_add_up(saved: Path, tmp_path: Path) -> None:
    many = {f"{i}.*.*.*x": 2 for i in range(200)}
    with pytest.raises(DeltaFileError, match="may take too long"):
        load_peft(net(), changed(saved, tmp_path, rank_pattern=many))


def test_a_pattern_that_is_none_where_it_is_used(saved: Path, tmp_path: Path) -> None:
    """Alone it is one: flags stand at the beginning, and it is matched after a prefix."""
    with pytest.raises(DeltaFileError, match="is not a regular expression"):
        load_peft(net(), changed(saved, tmp_path, rank_pattern={"(?i)X": 2}))


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_matched(pattern: str, saved: Path, tmp_path: Path) -> None:
    options = {"exclude_modules": pattern} if pattern != "0|2" else {"target_modules": pattern}
    load_peft(net(), changed(saved, tmp_path, **options))
    strategy = gift.FineTuningStrategy([(mc_path(regex=pattern), ma_adapt("lora"))])
    assert load_strategy_from_config(strategy.to_config()).to_config() == strategy.to_config()


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("check", [mc_name, mc_path])
def test_a_strategy_of_a_file_with_a_slow_pattern_is_refused(pattern: str, check: Any) -> None:
    """In code it may stand, as everything may."""
    inner = gift.FineTuningStrategy([(~check(regex=["x", pattern]), ma_adapt("lora"))])
    strategy = gift.merge_strategies([inner])
    with pytest.raises(ValueError, match="may take too long"):
        load_strategy_from_config(strategy.to_config())


def attempts(parts: list[Any], name: str) -> int:
    """How often a matcher that tries everything comes to an end, for parts that repeat letters."""
    if not parts:
        return 1
    (least, most), *rest = parts
    counts = range(least, min(most, len(name)) + 1)
    return sum(attempts(rest, name[count:]) for count in counts)


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [("a*", [(0, 99)]), ("a+a*", [(1, 99), (0, 99)]), ("a{2,5}a?a*", [(2, 5), (0, 1), (0, 99)]),
     ("a?a?a?", [(0, 1)] * 3), ("a*a*a*", [(0, 99)] * 3)],
)  # fmt: skip
def test_the_bound_is_one(pattern: str, parts: list[Any]) -> None:
    assert attempts(parts, "a" * 60) <= ways(pattern) < float("inf")
