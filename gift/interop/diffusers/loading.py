"""Loading a file of diffusers onto the networks of a pipeline."""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from gift.engine.enable import enabling_trained
from gift.errors import DeltaFileError, refuse
from gift.files.container import read_tensors
from gift.interop.diffusers.keys import peft_key
from gift.interop.diffusers.networks import (
    METADATA,
    PEFT_TYPES,
    file_in,
    is_name,
    name_of,
    named_networks,
)
from gift.interop.peft.folder import incompatibilities
from gift.interop.peft.forms import Config, Tensors, sizes
from gift.interop.peft.loading import put_values, refuse_fine_tuned, strategy_of
from gift.interop.peft.names import PREFIX
from gift.interop.peft.reading import Reading
from gift.interop.report import PartReport

_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def load_diffusers(
    net: Any, path: str | os.PathLike[str], name: str | None = None
) -> dict[str, PartReport]:
    """Fine-tune plain networks with the deltas in a file of diffusers.

    Supports LoRA, DoRA and LoKr of linear layers and convolutions. Names of tensors may be those of
    today (``lora_A.weight``) or of older versions of diffusers (``lora.down.weight``,
    ``lora_linear_layer.down.weight``, and ``to_q_lora`` of attention processors). Without settings
    in the header and without ``alpha``, the scaling is 1. The strategy that it enables has
    registered parts only.

    Args:
        net: the network, several by their names, ``{"unet": unet, "text_encoder": encoder}``, or a
            pipeline of diffusers.
        path: path of the file, or of a folder that has ``pytorch_lora_weights.safetensors``.
        name: name of a single network in the file: ``"unet"``, ``"transformer"``,
            ``"text_encoder"``, ``"text_encoder_2"``, or ``""`` for a file of one network without
            such names. By default the only one in the file, or the one that fits its class.

    Returns:
        The report of `enable_fine_tuning` for each network, by its name; its `left` counts the
        tensors of networks that were not given.

    Raises:
        FileNotFoundError: if there is no such file.
        DeltaFileError: naming everything that does not fit; all networks are unchanged.
        RuntimeError: if a network is already being fine-tuned.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.interop.diffusers import load_diffusers, save_diffusers
        >>> from gift.strategies import LoRALinearFineTuningStrategy
        >>> net, fresh = (nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
        >>> report = enable_fine_tuning(net, LoRALinearFineTuningStrategy())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_diffusers(net, folder, name="unet")
        ...     reports = load_diffusers(fresh, folder)
        >>> [name for name, p in fresh.named_parameters() if p.requires_grad]
        ['0.lora_B', '0.lora_A']
    """
    nets = named_networks(net)
    file = file_in(path)
    metadata, tensors = read_tensors(file)
    problems: list[str] = []
    wanted = _wanted(tensors, net, nets, name, problems)
    own, left = _by_network(tensors, wanted, problems)
    problems += _missing(net, wanted, own, left)
    settings = _settings(metadata, problems)
    readings: dict[str, Reading] = {}
    for one, content in own.items():
        part = net if nets is None else nets[one]
        refuse_fine_tuned(part)
        found: list[str] = []
        reading = _reading(part, content, _of(settings, one), found)
        problems += [f"{one}: {problem}" if one else problem for problem in found]
        if reading is not None:
            readings[one] = reading
    kind = type(net).__name__ if nets is None else ", ".join(nets)
    refuse(DeltaFileError, f"{file} does not fit {kind}, nothing changed", problems)
    reports: dict[str, PartReport] = {}
    with ExitStack() as stack:
        for one, reading in readings.items():
            strategy = strategy_of(reading)
            report = stack.enter_context(enabling_trained(reading.network, strategy))
            put_values(reading.network, reading)
            reports[one] = PartReport(**vars(report), left=dict(left))
    return reports


def _wanted(
    tensors: Tensors,
    net: Any,
    nets: Mapping[str, nn.Module] | None,
    name: str | None,
    problems: list[str],
) -> set[str]:
    """Return the names of the networks that are meant; "" is that of a file without names."""
    if nets is not None:
        if name is not None:
            problems.append("name= is for a single network; here the networks have names")
        return set(nets)
    if name is not None:
        return {name}
    known = sorted({first for key in tensors if is_name(first := key.partition(".")[0])})
    if len(known) < 2:
        return set(known) or {""}
    own = name_of(net)
    if own not in known:
        problems.append(
            f"it has deltas of {', '.join(known)}: name= says which of them are for this "
            f"{type(net).__name__}"
        )
    return {own} & set(known) if own else set()


def _by_network(
    tensors: Tensors, wanted: set[str], problems: list[str]
) -> tuple[dict[str, Tensors], Counter[str]]:
    """Return the tensors of each network that is meant, and a count of those of the others."""
    if wanted == {""}:
        return {"": tensors}, Counter()
    own: dict[str, Tensors] = {}
    left: Counter[str] = Counter()
    strange: list[str] = []
    for key, tensor in tensors.items():
        first, _, rest = key.partition(".")
        if first in wanted:
            own.setdefault(first, {})[rest] = tensor
        elif is_name(first):
            left[first] += 1
        else:
            strange.append(key)
    problems += _unknown(strange, "have no name of a network first")
    return own, left


def _unknown(keys: list[str], what: str) -> Iterator[str]:
    """Yield a problem for keys that are not of this format, if there are any."""
    if keys:
        kohya = any(key.startswith(("lora_", "lycoris_")) for key in keys)
        hint = "; load_kohya reads files of kohya" if kohya else ""
        yield f"{len(keys)} keys {what}, the first is {min(keys)}{hint}"


def _missing(
    net: Any, wanted: set[str], own: Collection[str], left: Collection[str]
) -> Iterator[str]:
    """Yield networks that the file lacks, or that only the file has."""
    if not own and wanted:
        there = ", ".join(sorted(left)) or "no network"
        yield f"it has tensors of {there}, none of {', '.join(sorted(wanted))}"
    elif isinstance(net, Mapping) and (absent := sorted(wanted - set(own))):
        yield f"it has no tensors of {', '.join(absent)}"
    elif not isinstance(net, nn.Module | Mapping) and left:
        yield (
            f"it has tensors of {', '.join(sorted(left))}, which the pipeline does not have: give "
            "the networks that are meant, by their names"
        )


def _settings(metadata: Mapping[str, str], problems: list[str]) -> Config | None:
    """Return the settings of PEFT in the header, those of all networks."""
    if METADATA not in metadata:
        return None
    try:
        settings = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        problems.append(f"{METADATA} is not JSON: {error}")
        return None
    if not isinstance(settings, dict):
        problems.append(f"{METADATA} holds a {type(settings).__name__}, expected an object")
        return None
    return settings


def _of(settings: Config | None, name: str) -> Config:
    """Return the settings of one network."""
    lead = f"{name}." if name else ""
    return {
        key.removeprefix(lead): value
        for key, value in (settings or {}).items()
        if key.startswith(lead)
    }


def _reading(
    net: nn.Module, content: Tensors, settings: Config, problems: list[str]
) -> Reading | None:
    """Return the deltas of one network in the terms of PEFT, or None if there are problems."""
    paths = {path for path, _ in net.named_modules(remove_duplicate=False)}
    tensors: Tensors = {}
    alphas: dict[str, Tensor] = {}
    layers: set[str] = set()
    others = []
    for key, tensor in content.items():
        layer, end = peft_key(net, paths, key) or ("", key)
        if not layer:
            others.append(key)
        elif end == "alpha":
            alphas[layer] = tensor
        elif (own := f"{PREFIX}{layer}.{end}") in tensors:
            problems.append(f"{key}: another key is for the same tensor, {layer}.{end}")
        else:
            layers.add(layer)
            tensors[own] = tensor
    problems += _unknown(others, "are not of this format")
    if settings and alphas:
        problems.append("it has alphas twice, in its header and as tensors")
    config = settings or _without_settings(tensors, alphas, problems)
    if problems:
        return None
    # diffusers adapts what has tensors, whatever the settings of PEFT choose.
    chosen = {"target_modules": sorted(layers)} | dict.fromkeys(_CHOOSING)
    config = {"peft_type": "LORA"} | config | chosen
    if config["peft_type"] not in PEFT_TYPES:
        problems.append(f"its peft_type is {config['peft_type']!r}, expected one of {PEFT_TYPES}")
    problems += incompatibilities(config, tensors)
    if problems:
        return None
    reading = Reading(net, config, tensors)
    problems += reading.problems
    return reading


def _without_settings(
    tensors: Tensors, alphas: Mapping[str, Tensor], problems: list[str]
) -> Config:  # fmt: skip
    """Return the settings that a file means without any: the scaling is 1 or that of its alphas."""
    is_lokr = any(".lokr_w" in key for key in tensors)
    ranks = dict(_ranks_of_lokr(tensors) if is_lokr else _ranks_of_lora(tensors))
    if is_lokr and (others := sorted(key for key in tensors if ".lokr_w" not in key)):
        problems.append(f"it has LoKr, and {', '.join(others)}, which are not of LoKr")
    if not ranks:
        problems.append("it has no lora_A, and no whole lokr_w2 or lokr_w2_a")
    if lone := sorted(set(alphas) - set(ranks)):
        problems.append(f"it has alphas of layers without factors: {', '.join(lone)}")
    for layer, alpha in alphas.items():
        if alpha.numel() != 1 or alpha.is_complex():
            problems.append(f"{layer}.alpha has shape {list(alpha.shape)}, expected one number")
    if problems:
        return {}
    if is_lokr:  # of two whole factors, alpha says nothing
        pairs = {key.removeprefix(PREFIX).rpartition(".lokr_w")[0] for key in tensors
                 if key.endswith("_a")}  # fmt: skip
        alphas = {layer: alpha for layer, alpha in alphas.items() if layer in pairs}
    found = {layer: (rank, float(alphas.get(layer, rank))) for layer, rank in ranks.items()}
    if is_lokr:
        return {"peft_type": "LOKR"} | sizes(found, "alpha")
    dora = any(key.endswith(".lora_magnitude_vector") for key in tensors)
    return sizes(found, "lora_alpha") | {"use_dora": dora}


def _ranks_of_lora(tensors: Tensors) -> Iterator[tuple[str, int]]:
    """Yield the layers with a factor, and its rank."""
    end = ".lora_A.weight"
    for key, tensor in tensors.items():
        if key.endswith(end) and tensor.ndim:
            yield key.removeprefix(PREFIX).removesuffix(end), len(tensor)


def _ranks_of_lokr(tensors: Tensors) -> Iterator[tuple[str, int]]:
    """Yield the layers with a second matrix, and the rank of the pair that makes a matrix.

    With two whole matrices it is one with which PEFT decomposes neither.
    """
    for key, tensor in tensors.items():
        layer, _, end = key.rpartition(".lokr_")
        if end not in ("w2", "w2_a") or tensor.ndim < 2:
            continue
        first = tensors.get(f"{layer}.lokr_w1_a")
        pair = tensor if end == "w2_a" else first
        rank = max(tensor.shape) if pair is None else pair.shape[-1]
        yield layer.removeprefix(PREFIX), rank
