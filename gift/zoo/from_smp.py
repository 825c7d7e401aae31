"""Networks of segmentation-models-pytorch."""

from pathlib import Path
from typing import Any

from gift.data.readers import SegmentationReader
from gift.errors import NetworkError
from gift.support.optional import require
from gift.zoo.errors import unknown, unreachable
from gift.zoo.loaded import LoadedNetwork
from gift.zoo.options import SMP, refuse_unknown
from gift.zoo.states import put_state

ENCODER = "resnet34"
"""The encoder that segmentation-models-pytorch itself takes by default."""


def from_smp(
    name: str,
    weights: str | Path | None,
    task: str | None,
    options: dict[str, Any],
    allow_import: bool = False,
) -> LoadedNetwork:
    """Load a network of segmentation-models-pytorch; the default weights are of the encoder."""
    smp = require("segmentation_models_pytorch", "segmentation")
    known = list(smp.MODEL_ARCHITECTURES_MAPPING)
    if name.lower() not in known:
        raise unknown("network of segmentation-models-pytorch", name, known)
    if task not in (None, "segmentation"):
        raise NetworkError(f"{name} is for segmentation, not for {task!r}")
    if not allow_import:
        refuse_unknown(name, options, SMP)
    encoder = str(options.pop("encoder_name", ENCODER))
    encoders = smp.encoders.get_encoder_names()
    if encoder not in encoders and not encoder.startswith("tu-"):
        raise unknown("encoder of segmentation-models-pytorch", encoder, encoders)
    pretrained = "imagenet" if weights == "default" else None
    try:
        net = smp.create_model(name, encoder, pretrained, **options)
        about = smp.encoders.get_preprocessing_params(encoder) if pretrained else {}
    except (OSError, ConnectionError) as error:
        raise unreachable(f"the encoder {encoder} of {name}", error) from error
    except Exception as error:  # the hub has errors of its own for what cannot be reached
        if pretrained is not None and type(error).__module__.partition(".")[0] not in _OWN:
            raise unreachable(f"the encoder {encoder} of {name}", error) from error
        raise NetworkError(f"{name} cannot be made with {encoder}, {options}: {error}") from error
    if weights not in ("default", None):
        put_state(net, str(weights))
    settings: dict[str, Any] = {
        key: tuple(about[key]) for key in ("mean", "std") if about.get(key) is not None
    }
    channels = options.get("in_channels", 3)
    if channels == 1:
        settings = {key: (sum(values) / len(values),) for key, values in settings.items()}
        settings = settings or {"mean": (0.449,), "std": (0.226,)}  # means of ImageNet's
    reader = SegmentationReader(**settings) if channels in (1, 3) else None
    return LoadedNetwork(net, reader, "segmentation")


_OWN = ("builtins", "segmentation_models_pytorch", "torch", "timm")
