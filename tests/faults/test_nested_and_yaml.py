"""Strategies in strategies, and YAML: no more work than the size says, scalars as meant."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import gift
from gift.errors import YamlError
from gift.factories import ma_adapt, mc_layer, mc_name
from gift.jobs import JobError, read_job
from gift.jobs.reading import read_yaml
from gift.strategies import (
    FineTuningStrategy,
    LoRAAllFineTuningStrategy,
    load_strategy_from_config,
    merge_strategies,
)
from gift.support import yaml_files

Nest = Callable[[FineTuningStrategy], FineTuningStrategy]
NESTED: dict[str, Nest] = {
    "merged": lambda inner: merge_strategies([inner]),
    "merged, with caps": lambda inner: merge_strategies(
        [inner], module_caps=[(mc_name("never"), ma_adapt("lora"))]
    ),
    "in the place of an action": lambda inner: FineTuningStrategy([(~mc_name("no"), inner)]),
    "in parameter caps": lambda inner: merge_strategies([FineTuningStrategy(), inner]),
}


def nested(nest: Nest, depth: int) -> FineTuningStrategy:
    strategy: FineTuningStrategy = LoRAAllFineTuningStrategy(rank=1)
    for _ in range(depth):
        strategy = nest(strategy)
    return strategy


def calls_of(act: Callable[[], Any]) -> int:
    """How many functions of Python it calls, which no busy machine changes."""
    count = 0

    def tick(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(tick)
    try:
        act()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")  # of caps that take nothing
@pytest.mark.parametrize("name", NESTED)
def test_nesting_costs_what_its_size_says(name: str, tmp_path: Path) -> None:
    """Twice the depth takes about twice the calls, not their square, and never 2**depth."""
    nest = NESTED[name]
    counts: dict[str, list[int]] = {}
    for depth in (8, 16, 32):
        strategy, path = nested(nest, depth), tmp_path / f"{depth}.safetensors"
        net = nn.Linear(8, 8)
        other = copy.deepcopy(net)
        steps: dict[str, Callable[[], Any]] = {
            "repr": lambda strategy=strategy: repr(strategy),
            "enable": lambda net=net, strategy=strategy: gift.enable_fine_tuning(net, strategy),
            "config": lambda strategy=strategy: load_strategy_from_config(strategy.to_config()),
            "save": lambda net=net, path=path: gift.save(net, path),
            "load": lambda other=other, path=path: gift.load(other, path),
            "write": lambda strategy=strategy, path=path: strategy.save_init_paras(
                path.with_suffix(".yaml")
            ),
            "read": lambda path=path: load_strategy_from_config(path.with_suffix(".yaml")),
        }
        for step, act in steps.items():
            counts.setdefault(step, []).append(calls_of(act))
        assert repr(load_strategy_from_config(path.with_suffix(".yaml"))) == repr(strategy)
        nn.init.ones_(net.lora_B)
        gift.save(net, path)
        gift.load(other, path)
        assert torch.equal(other.weight, net.weight)
    for step, (_, middle, last) in counts.items():
        assert last < 3 * middle, (step, counts[step])


def test_what_is_nested_too_deeply_is_refused_and_saved_in_another_way(tmp_path: Path) -> None:
    strategy = nested(NESTED["merged"], 60)
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        strategy.to_config()
    config: dict[str, Any] = LoRAAllFineTuningStrategy(rank=1).to_config()
    for _ in range(2000):
        config = {"name": "MergedStrategy", "init_paras": {"strategies": [config]}}
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        load_strategy_from_config(config)
    net, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.load_state_dict(net.state_dict())
    gift.enable_fine_tuning(net, strategy)
    nn.init.ones_(net.lora_B)
    gift.save(net, tmp_path / "x.safetensors")
    gift.load(other, tmp_path / "x.safetensors")
    assert torch.equal(other.weight, net.weight)


# YAML


def laughs(levels: int, merge: bool = False) -> str:
    """Each line stands for ten of the one before."""
    lines = ["a0: &a0 {x: 1}"]
    for n in range(1, levels):
        several = ", ".join([f"*a{n - 1}"] * 10)
        inner = f"{{<<: [{several}], y{n}: 1}}" if merge else f"[{several}]"
        lines.append(f"a{n}: &a{n} {inner}")
    return "\n".join(lines)


HOSTILE = {
    "aliases": (laughs(10), "stands for more than 100,000 values, aliases written out"),
    "merge keys": (laughs(10, merge=True), "stands for more than 100,000 values"),
    "itself": ("a: &a [*a]", "line 1: this contains itself"),
    "its key": ("&a {? [*a] : 1}", "contains itself"),
    "deep": ("[" * 300 + "]" * 300, "nested deeper than 150 levels"),
    "very deep": ("[" * 100_000, "nested deeper than 150 levels"),
    "deep mappings": ("{a: " * 200 + "1" + "}" * 200, "nested deeper than 150 levels"),
    "code": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a name of python": ("a: !!python/name:os.system ''", "could not determine a constructor"),
    "a key twice": ("a: 1\nb: {c: 1, d: 2,\n c: 3}", "lines 2 and 3: b.c is given twice"),
    "a key twice in a list": ("a:\n- {x: 1}\n- {y: 1,\n y: 2}", r"lines 3 and 4: a\[1\].y is"),
    "a number with two meanings": ("a: 1\nb: [3, 010]", "line 2: 010 is an octal number for"),
    "another": ("a: -08", "line 1: -08 is an octal"),
    "a list as a key": ("? [1]\n: 2", "unhashable"),
    "two documents": ("a: 1\n---\nb: 2", "found another document"),
    "not closed": ("a: [1", "line 1|line 2"),
    "a long number": (f"a: {'9' * 5000}", "Exceeds the limit|integer string"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused_wherever_it_is_read(name: str, tmp_path: Path) -> None:
    text, message = HOSTILE[name]
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(JobError, match=f"(?s)job.yaml cannot be read as YAML.*({message})"):
        read_job(path)
    with pytest.raises(ValueError, match=f"(?s)job.yaml is not plain YAML.*({message})"):
        load_strategy_from_config(path)


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("a: " + "x" * 2**20)
    with pytest.raises(JobError, match="1,048,579 bytes, expected at most 1,048,576"):
        read_job(path)


SCALARS: dict[str, Any] = {
    "yes": "yes", "no": "no", "on": "on", "off": "off", "Y": "Y", "true": True, "FALSE": False,
    "1:30": "1:30", "190:20:30": "190:20:30", "1_000": "1_000", "0b11": "0b11", "0x1F": 31,
    "0o17": 15, "12": 12, "-3": -3, "+4": 4, "0": 0, "1e3": 1000.0, "1e-3": 0.001, ".5": 0.5,
    "1.": 1.0, "-1.5E+2": -150.0, "2024-01-01": "2024-01-01", "~": None, "null": None, "": None,
    "nil": "nil", "=": "=", "007x": "007x", "'010'": "010", '"1:30"': "1:30", "0.10": 0.1,
    ".inf": float("inf"), "1.2.3": "1.2.3", "!!str 010": "010", "!!float 3": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_mean_what_yaml_1_2_says(text: str) -> None:
    found, _ = yaml_files.load(f"a: {text}\n")
    assert found == {"a": SCALARS[text]}
    assert type(found["a"]) is type(SCALARS[text])


TEXTS = ["yes", "No", "1:30", "010", "1e3", "1e-5", "0o17", "0x1F", "1_000", ".5", "null", "~",
         "", "2024-01-01", "=", "<<", "true", "Off", "-", "a: b", "1.", "+1",
         ".inf", "é\t"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_written_is_read_again_by_every_reader(text: str) -> None:
    data = {"a": [text, {text: 1}], "b": text}
    written = yaml_files.dump(data)
    assert yaml_files.load(written)[0] == data
    assert yaml.safe_load(written) == data
    numbers = {"a": [1e-5, 1e22, -0.0, 3, True, None, float("inf")]}
    assert yaml_files.load(yaml_files.dump(numbers))[0] == numbers


def test_aliases_within_the_bounds_are_what_they_stand_for(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("base: &b {x: 1, y: [2]}\nother: {<<: *b, x: 3}\nsame: *b\n")
    data, lines = read_yaml(path)
    assert data == {"base": {"x": 1, "y": [2]}, "other": {"x": 3, "y": [2]},
                    "same": {"x": 1, "y": [2]}}  # fmt: skip
    assert lines[("other",)] == 2


def test_settings_that_yaml_1_1_would_have_taken_for_numbers(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "data: {kind: class_folders, train: x, options: {classes: [yes, no, 1:30]}}\n"
        "training: {lr: 1:30}\n"
    )
    with pytest.raises(JobError, match=r"line 2, training.lr: this is '1:30', expected a number"):
        read_job(path)
    path.write_text(path.read_text().replace("{lr: 1:30}", "{lr: 1e-3}"))
    assert read_job(path).data.options["classes"] == ["yes", "no", "1:30"]


def test_the_error_has_all_problems() -> None:
    with pytest.raises(YamlError) as caught:
        yaml_files.load("a: 010\nb: 1\nb: 02\n")
    assert [problem[:20] for problem in caught.value.problems] == [
        "line 1: 010 is an oc", "lines 2 and 3: b is ", "line 3: 02 is an oct",
    ]  # fmt: skip


def test_the_layer_check_may_stand_in_a_file() -> None:
    """What is not about depth is read as before."""
    strategy = FineTuningStrategy([(mc_layer("linear"), ma_adapt("lora"), {"rank": 2})])
    again = load_strategy_from_config(strategy.to_config())
    assert repr(again) == repr(strategy)
