"""Reading and validating the files of PEFT: plain data and tensors, no code."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gift.errors import DeltaFileError
from gift.files.container import read_tensors
from gift.interop.peft.forms import Config, Tensors
from gift.interop.peft.names import expressions
from gift.interop.peft.prompt import PROMPT_OPTIONS
from gift.interop.peft.table import FORMS
from gift.methods.settings import is_integer, is_number
from gift.support.patterns import problem_of_patterns
from gift.support.tensors import is_finite

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"

# Options that do not affect outputs, or that are supported for all forms.
_NEUTRAL = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "runtime_config", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out",
}  # fmt: skip
# Initializations of LoRA that leave the base unchanged; others subtract the initial product from
# it.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def read_folder(folder: str | os.PathLike[str]) -> tuple[Config, Tensors]:
    """Read the config and tensors of a folder.

    Raises:
        DeltaFileError: if a file is missing or invalid.
    """
    path = Path(folder).expanduser()
    for _ in range(_TRIES):  # another process may be replacing the two files
        config, (metadata, tensors) = _config(path), _tensors(path)
        if metadata.get(CONFIG_DIGEST) in (None, config_digest(config)):
            return config, tensors
    problem = (
        f"{CONFIG_NAME} is not the one that was written with {WEIGHTS_NAME}: another settings file "
        "was put there, or settings were changed in it; write both again"
    )
    raise _unreadable(path, problem)


_TRIES = 3
LARGEST_ALPHA = 3.4e38
CONFIG_DIGEST = "gift_config"
"""Metadata key of weights that gift wrote: a digest of the config next to them."""
_MAY_CHANGE = {"base_model_name_or_path", "revision", "task_type", "inference_mode",
               "peft_version", "auto_mapping", "runtime_config"}  # fmt: skip


def config_digest(config: Config) -> str:
    """Return a digest of the entries of a config that say how the weights are read."""
    fixed = {key: value for key, value in config.items() if key not in _MAY_CHANGE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _config(path: Path) -> Config:
    try:
        config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, f"it has no {CONFIG_NAME} that can be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(path / CONFIG_NAME, f"it is not JSON: {error}") from None
    if not isinstance(config, dict):
        problem = f"it holds a {type(config).__name__}, expected an object"
        raise _unreadable(path / CONFIG_NAME, problem)
    return config


def _tensors(path: Path) -> tuple[dict[str, str], Tensors]:
    """Read the metadata and tensors of the weights."""
    weights = path / WEIGHTS_NAME
    try:
        if weights.exists():
            return read_tensors(weights)
        weights = path / OLD_WEIGHTS_NAME
        loaded = torch.load(weights, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        problem = f"it has neither {WEIGHTS_NAME} nor {OLD_WEIGHTS_NAME}"
        raise _unreadable(path, problem) from None
    except DeltaFileError:
        raise
    except Exception as error:  # malicious files can raise anything
        raise _unreadable(weights, f"{type(error).__name__}: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise _unreadable(weights, "it holds something else than tensors by name")
    return {}, {str(key): value for key, value in loaded.items()}


def _unreadable(path: Path, problem: str) -> DeltaFileError:
    return DeltaFileError(f"{path} cannot be read", [problem])


def incompatibilities(config: Config, tensors: Tensors) -> Iterator[str]:
    """Yield what no network can load: unknown methods or options, invalid or infinite values."""
    known = {name: form.options for name, form in FORMS.items()} | PROMPT_OPTIONS
    name = config.get("peft_type")
    if not isinstance(name, str) or name not in known:
        yield f"peft_type is {name!r}, known here are {sorted(known)}"
    else:
        yield from _option_incompatibilities(config, known[name])
        for option, value in FORMS[name].needs.items() if name in FORMS else ():
            if config.get(option) != value:
                yield f"tensors are missing, which PEFT saves with {option}={value}"
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            yield f"{key} has values that are not finite"


def _option_incompatibilities(config: Config, understood: frozenset[str]) -> Iterator[str]:
    known = _NEUTRAL | understood
    for option, value in config.items():
        if option not in known and value not in (None, False, "", [], {}, 0):
            yield f"{option}={value!r} has no counterpart in gift"
    start = config.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        yield (
            f"init_lora_weights={start!r} changed the base in PEFT: convert the adapter there, by "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    yield from _value_incompatibilities(config)


def _value_incompatibilities(config: Config) -> Iterator[str]:
    checks = {
        "r": (_is_size, "an integer of at least 1"),
        "lora_alpha": (_is_alpha, f"a number from -{LARGEST_ALPHA:g} to {LARGEST_ALPHA:g}"),
        "alpha": (_is_alpha, f"a number from -{LARGEST_ALPHA:g} to {LARGEST_ALPHA:g}"),
        "lora_dropout": (_is_probability, "a number in [0, 1)"),
        "vera_dropout": (_is_probability, "a number in [0, 1)"),
        "rank_pattern": (_maps_to(_is_size), "patterns to integers of at least 1"),
        "alpha_pattern": (_maps_to(_is_alpha), f"patterns to numbers up to {LARGEST_ALPHA:g}"),
        "target_modules": (_is_targets, "a regular expression or a list of names"),
        "exclude_modules": (_is_targets, "a regular expression or a list of names"),
        "feedforward_modules": (_is_targets, "a regular expression or a list of names"),
        "layers_pattern": (_is_patterns, "a regular expression or a list of them"),
        "modules_to_save": (_is_list_of_patterns, "a list of names, which PEFT reads as patterns"),
        "target_parameters": (_is_names, "a list of names"),
        "layers_to_transform": (_is_layers, "an integer or a list of them"),
    }
    if config.get("peft_type") == "OFT":
        del checks["r"]
    if config.get("peft_type") == "ADALORA":  # what a layer kept, by its name
        del checks["rank_pattern"]
    wrong = [
        f"{option} is {config[option]!r}, expected {expected}"
        for option, (check, expected) in checks.items()
        if config.get(option) is not None and not check(config[option])
    ]
    yield from wrong
    if not wrong and (problem := problem_of_patterns(expressions(config))):
        yield problem


def _is_size(value: Any) -> bool:
    return is_integer(value) and value >= 1


def _is_probability(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def _maps_to(check: Any) -> Any:
    def test(value: Any) -> bool:
        return isinstance(value, dict) and all(
            _is_pattern(key) and check(item) for key, item in value.items()
        )

    return test


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return True


def _is_alpha(value: Any) -> bool:
    """Whether float32 can hold a value, as gift and PEFT compute with it."""
    return is_number(value) and abs(value) <= LARGEST_ALPHA


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_list_of_patterns(value: Any) -> bool:
    return _is_names(value) and all(map(_is_pattern, value))


def _is_patterns(value: Any) -> bool:
    return _is_pattern(value) if isinstance(value, str) else _is_list_of_patterns(value)


def _is_targets(value: Any) -> bool:
    return _is_pattern(value) if isinstance(value, str) else _is_names(value)


def _is_layers(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, list) and all(map(is_integer, value)))
