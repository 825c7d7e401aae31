"""Networks of torchvision."""

from pathlib import Path
from typing import Any

from gift.data.readers import DetectorReader
from gift.errors import NetworkError
from gift.support.optional import require
from gift.zoo.errors import unknown, unreachable
from gift.zoo.loaded import LoadedNetwork
from gift.zoo.options import TORCHVISION, refuse_unknown
from gift.zoo.states import put_state
from gift.zoo.transforms import reader_like


def from_torchvision(
    name: str,
    weights: str | Path | None,
    task: str | None,
    options: dict[str, Any],
    allow_import: bool = False,
) -> LoadedNetwork:
    """Load a torchvision classifier or detector; `weights` may also name torchvision weights."""
    models = require("torchvision.models", "vision")
    detectors = models.list_models(module=models.detection)
    known = models.list_models(module=models) + detectors
    if name not in known:
        raise unknown("classifier or detector of torchvision", name, known)
    kind = "detection" if name in detectors else "classification"
    if task not in (None, kind):
        raise NetworkError(f"{name} is for {kind}, not for {task!r}")
    if not allow_import:
        refuse_unknown(name, options, TORCHVISION)
    its = models.get_model_weights(name)
    chosen = its.DEFAULT if weights == "default" else its.__members__.get(str(weights))
    if chosen is None and kind == "detection":
        options = {"weights_backbone": None, **options}  # otherwise it would be downloaded
    try:
        net = models.get_model(name, weights=chosen, **options)
    except (OSError, RuntimeError) as error:
        raise unreachable(f"the weights of {name}", error) from error
    except (TypeError, ValueError) as error:
        raise NetworkError(f"{name} cannot be made with {options}: {error}") from error
    if chosen is None and weights is not None:
        put_state(net, weights)
    classes = None if chosen is None else tuple(chosen.meta["categories"])
    if kind == "detection":
        return LoadedNetwork(net, DetectorReader(), kind, classes)
    transform = its.DEFAULT.transforms() if chosen is None else chosen.transforms()
    settings = {
        "size": (transform.crop_size * 2)[:2],
        "resize": transform.resize_size[0],
        "mean": transform.mean,
        "std": transform.std,
        "interpolation": transform.interpolation.value,
    }
    return LoadedNetwork(net, reader_like(settings, transform, name), kind, classes)
