"""Networks of timm."""

import math
from pathlib import Path
from typing import Any

from gift.data.readers import PictureReader
from gift.errors import NetworkError, some
from gift.support.optional import require
from gift.zoo.errors import unknown, unreachable
from gift.zoo.loaded import HEAD_TASKS, LoadedNetwork
from gift.zoo.options import TIMM, refuse_unknown
from gift.zoo.states import put_state
from gift.zoo.transforms import reader_like


def from_timm(
    name: str,
    weights: str | Path | None,
    task: str | None,
    options: dict[str, Any],
    allow_import: bool = False,
) -> LoadedNetwork:
    """Load a timm classifier."""
    timm = require("timm", "timm")
    if task not in (None, *HEAD_TASKS, "contrastive"):
        raise NetworkError(f"networks of timm are for {some(HEAD_TASKS)}, not for {task!r}")
    elsewhere = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    base, _, tag = name.partition(".")
    if not elsewhere and not timm.is_model(base):
        raise unknown("network of timm", base, timm.list_models())
    trained = timm.list_pretrained(f"{base}.*")
    if tag and not elsewhere and name not in trained:
        raise unknown("set of weights of timm", name, trained)
    if weights == "default" and not elsewhere and not trained:
        raise NetworkError(f"timm has no weights for {name}: give weights=FILE or weights=None")
    if not allow_import:
        refuse_unknown(name, options, TIMM)
    try:
        if task == "contrastive":  # features, without a head
            options = options | {"num_classes": 0}
        net = timm.create_model(name, pretrained=weights == "default", **options)
    except OSError as error:
        raise unreachable(f"{name} of timm", error) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise NetworkError(f"{name} cannot be made with {options}: {error}") from error
    if weights not in ("default", None):
        put_state(net, str(weights))
    known = weights == "default" and task != "contrastive"
    classes = _imagenet(timm, net) if known else None
    channels = options.get("in_chans", 3)
    return LoadedNetwork(net, _reader(timm, net, name, channels), task or HEAD_TASKS[0], classes)


def _reader(timm: Any, net: Any, name: str, channels: int) -> PictureReader | None:
    config = timm.data.resolve_data_config({}, model=net)
    size = config["input_size"][1:]
    scaled = [math.floor(side / config["crop_pct"]) for side in size]
    settings = {
        "size": size,
        "resize": scaled[0] if config["crop_mode"] == "center" else scaled,
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
    }
    if channels != 3:  # timm itself opens such images in the caller's mode
        settings |= {key: [sum(config[key]) / 3] * channels for key in ("mean", "std")}
    if channels == 1:
        return PictureReader(**settings)
    return reader_like(settings, timm.data.create_transform(**config), name)


def _imagenet(timm: Any, net: Any) -> tuple[str, ...] | None:
    """Return the classes, if they are those of an ImageNet variant."""
    subset = timm.data.infer_imagenet_subset(net)
    if subset is None:
        return None
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(number) for number in range(info.num_classes()))
