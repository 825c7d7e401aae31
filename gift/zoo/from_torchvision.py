"""Networks of torchvision."""

from pathlib import Path
from typing import Any

from torch import nn

from gift.data.examples import Reader
from gift.data.readers import DetectorReader, SegmentationReader
from gift.errors import NetworkError
from gift.factories.heads import last_linear
from gift.support.optional import require
from gift.zoo.errors import unknown, unreachable
from gift.zoo.loaded import HEAD_TASKS, LoadedNetwork
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
    """Load a torchvision network for images; `weights` may also name torchvision weights."""
    models = require("torchvision.models", "vision")
    kinds = dict.fromkeys(models.list_models(module=models), "classification")
    kinds |= dict.fromkeys(models.list_models(module=models.segmentation), "segmentation")
    kinds |= dict.fromkeys(models.list_models(module=models.detection), "detection")
    if name not in kinds:
        raise unknown("classifier, detector or segmentation network of torchvision", name, kinds)
    kind = kinds[name]
    if kind == "classification" and task in (*HEAD_TASKS, "contrastive"):
        kind = task
    if task not in (None, kind):
        raise NetworkError(f"{name} is for {kind}, not for {task!r}")
    if not allow_import:
        refuse_unknown(name, options, TORCHVISION)
    its = models.get_model_weights(name)
    chosen = its.DEFAULT if weights == "default" else its.__members__.get(str(weights))
    if chosen is None and kind in ("detection", "segmentation"):
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
    if kind == "contrastive":
        path, _ = last_linear(net)
        net.set_submodule(path, nn.Identity())  # vectors are what the head would get
        classes = None
    transform = None if kind == "detection" else (chosen or its.DEFAULT).transforms()
    return LoadedNetwork(net, _reader(transform, kind, name), kind, classes)


def _reader(transform: Any, kind: str, name: str) -> Reader | None:
    """Return the reader for the transform of the weights, which detectors do without."""
    if kind == "detection":
        return DetectorReader()
    settings = {"mean": transform.mean, "std": transform.std}
    if kind == "segmentation":
        return SegmentationReader(size=transform.resize_size[0], **settings)
    settings |= {
        "size": (transform.crop_size * 2)[:2],
        "resize": transform.resize_size[0],
        "interpolation": transform.interpolation.value,
    }
    return reader_like(settings, transform, name)
