"""Networks by name."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gift.core.io_spec import set_io_spec
from gift.data.classes import distinct
from gift.data.examples import Reader
from gift.errors import NetworkError
from gift.zoo.errors import unknown
from gift.zoo.from_smp import from_smp
from gift.zoo.from_timm import from_timm
from gift.zoo.from_torchvision import from_torchvision
from gift.zoo.from_transformers import from_transformers
from gift.zoo.loaded import LoadedNetwork
from gift.zoo.states import put_state

LIBRARIES = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "transformers": from_transformers,
    "smp": from_smp,
}


def load_network(
    name: str,
    weights: str | Path | None = "default",
    *,
    reader: Reader | Mapping[str, Any] | None = None,
    task: str | None = None,
    allow_import: bool = False,
    **options: Any,
) -> LoadedNetwork:
    """Load a network by name, with the reader that its weights expect.

    Args:
        name: ``torchvision:resnet18`` (or a detector or segmentation network,
            ``torchvision:fasterrcnn_resnet50_fpn``), ``timm:resnet18.a1_in1k``,
            ``transformers:bert-base-uncased``, ``transformers:a/folder``, or ``smp:unet`` of
            segmentation-models-pytorch; with `allow_import` also
            ``import:package.module:function``.
        weights: "default" for pretrained weights, the name of other torchvision weights, a file
            with the state of the network (safetensors or ``torch.save``), or None for random
            weights.
        reader: another reader, or some of its settings; None uses the reader of the weights.
        task: task, for networks that support several: "classification", "regression",
            "multi_label", "segmentation", "language".
        allow_import: whether the name, or an option, may run foreign code.
        options: keyword arguments for creating the network, such as ``num_classes``. Unless
            `allow_import`, only those that neither run code nor read other files; see
            `gift.zoo.options`.

    Raises:
        NetworkError: if there is no such network, or its weights are not available.

    Example:
        >>> from gift.zoo import load_network
        >>> loaded = load_network("torchvision:resnet18", weights=None)
        >>> loaded.reader.size, loaded.reader.resize, loaded.task
        ((224, 224), 256, 'classification')
        >>> load_network("torchvision:resnet19")
        Traceback (most recent call last):
        gift.errors.NetworkError: there is no classifier, detector or segmentation network of
        torchvision 'resnet19', closest: ['resnet18', ...]
    """
    library, _, model = name.partition(":")
    if not model:
        close = ", ".join(f"'{known}:{library}'" for known in LIBRARIES)
        raise NetworkError(f"the network is {name!r}, expected a library before it: {close}")
    if library == "import":
        if not allow_import:
            raise NetworkError(f"{name!r} runs foreign code, which only allow_import=True permits")
        loaded = _imported(model, weights, task, options)
    elif library in LIBRARIES:
        loaded = LIBRARIES[library](model, weights, task, options, allow_import)
    else:
        raise unknown("library", library, [*LIBRARIES, "import"])
    classes = None if loaded.classes is None else distinct(loaded.classes)
    loaded = dataclasses.replace(loaded, reader=_chosen(reader, loaded.reader), classes=classes)
    set_io_spec(loaded.net, loaded.reader, loaded.classes, loaded.task)
    return loaded


def _chosen(given: Any, default: Any) -> Any:
    """Return the given reader, or the default one with the given settings."""
    if not isinstance(given, Mapping):
        return default if given is None else given
    if default is None:
        raise NetworkError("the network has no reader of its own: give a whole one")
    try:
        return dataclasses.replace(default, **given)
    except (TypeError, ValueError) as error:
        raise NetworkError(f"reader={dict(given)} does not fit: {error}") from error


def _imported(
    path: str, weights: str | Path | None, task: str | None, options: dict[str, Any]
) -> LoadedNetwork:
    """Create a network with an imported function."""
    module_name, _, function = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise NetworkError(f"import:{path}: {error}") from error
    maker = getattr(module, function, None)
    if not callable(maker):
        raise unknown(f"function of {module_name}", function, dir(module))
    net = maker(**options)
    if not isinstance(net, nn.Module):
        raise NetworkError(f"import:{path} gives a {type(net).__name__}, expected a nn.Module")
    if weights not in ("default", None):
        put_state(net, str(weights))
    return LoadedNetwork(net, None, task or "classification")
