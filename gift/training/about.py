"""Facts about a run that its report states: environment, settings, examples."""

import dataclasses
import os
import platform
import time
from collections.abc import Mapping
from importlib import metadata

import torch

from gift.training.run import TrainingRun
from gift.version import __version__

_LIBRARIES = ("torchvision", "timm", "transformers", "datasets", "torchmetrics")


def described(run: TrainingRun, examples: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return facts as texts, by their section.

    Args:
        run: the run.
        examples: further facts about the examples.
    """
    return {
        "Environment": _environment(run),
        "Examples": _examples(run) | dict(examples),
        "Settings": {
            field.name: str(getattr(run.settings, field.name))
            for field in dataclasses.fields(run.settings)
            if getattr(run.settings, field.name) is not None
        },
    }


def _environment(run: TrainingRun) -> dict[str, str]:
    device = run.processes.device
    name = str(device)
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_name(device)}"
    found = {
        "Date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "Device": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gift": __version__,
        "torch": torch.__version__,
    }
    if run.processes.number > 1:
        found["Processes"] = f"{run.processes.number} ({run.processes.parallel})"
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found | {"Python": platform.python_version(), "System": platform.platform()}


def _examples(run: TrainingRun) -> dict[str, str]:
    found = {"To learn from": _number(run.train.data)}
    if run.valid is not None:
        found["To validate on"] = _number(run.valid.data)
    if run.result.skipped:
        found["Left out"] = f"{len(run.result.skipped):,} that cannot be read"
    return found


def _number(data: object) -> str:
    """Return the number of examples; that of batches for a data loader."""
    dataset = getattr(data, "dataset", data)
    return f"{len(dataset):,}"  # type: ignore[arg-type]
