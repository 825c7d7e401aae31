"""``save_pretrained`` of other libraries while a network is being fine-tuned.

Such a method writes ``state_dict()`` into a folder, from which ``from_pretrained`` makes a model.
With only the deltas in it, that model would have random weights. So gift writes a whole model with
merged weights, unless the caller passes a state. Trainers pass one and load it again with
``load_state_dict``. That state is written under the network's own names.
"""

import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from gift.core.delta import named_deltas
from gift.core.dynamic_class import Generated, Spec, plain_class
from gift.core.record import record_of
from gift.errors import GiftWarning


def saving_methods(plain: type[nn.Module]) -> dict[str, Any]:
    """Replacements for the saving methods of a class, for a fine-tuned network."""
    if not callable(getattr(plain, "save_pretrained", None)):
        return {}
    names = ("save_pretrained", "save")
    found = {name: getattr(plain, name, None) for name in names}
    return {name: _saving(method) for name, method in found.items() if inspect.isfunction(method)}


def parts_that_save(network: nn.Module) -> Iterator[nn.Module]:
    """The modules inside `network` that can save themselves as models."""
    parts = (module for module in network.modules() if module is not network)
    return (part for part in parts if hasattr(plain_class(type(part)), "save_pretrained"))


def feature(plain: type[nn.Module], spec: Spec) -> tuple[list[type], dict[str, Any]]:
    """Let parts of a network that save themselves as models warn about missing deltas."""
    if not spec.part or spec.network:
        return [], {}
    return [Generated], {"save_pretrained": _warning(plain.save_pretrained)}  # type: ignore[attr-defined]


def _warning(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if any(delta.names for _, _, delta in named_deltas(self)):
            warnings.warn(
                "this is part of a network that is being fine-tuned: from_pretrained would load "
                "its base and ignore the deltas. Save it within gift.merged(network)",
                GiftWarning,
                stacklevel=2,
            )
        return result

    return save


def _saving(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)
    # Since version 5, transformers converts names back to those from before version 5.
    renames = "save_original_format" in signature.parameters
    own_names = {"save_original_format": False} if renames else {}

    @functools.wraps(method)  # pipelines of diffusers inspect its signature
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if "state_dict" not in given:
            return _save_whole(self, method.__name__, args, kwargs)
        state = self.state_dict() if given["state_dict"] is None else given["state_dict"]
        if not _is_partial(self, state):
            return method(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments |= {"state_dict": state} | own_names
        result = method(*bound.args, **bound.kwargs)
        folder = next(iter([*args, *kwargs.values()]), "")
        if not _is_checkpoint(folder):
            warnings.warn(
                f"{folder} holds only what was trained, not the whole model: from_pretrained would "
                "initialize the rest randomly. Load it with load_state_dict, onto the base with "
                "the same strategy; for a whole model, call save_pretrained without a state_dict, "
                "or gift.merge first",
                GiftWarning,
                stacklevel=2,
            )
        return result

    return save


def _save_whole(
    network: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    from gift.core.merging import merged

    with merged(network):
        if any(delta.names for _, _, delta in named_deltas(network)):
            raise RuntimeError(
                f"{name} cannot write this network as a whole model, since some of its deltas are "
                "not changes of plain weights (a bottleneck, a prompt, a quantised or computed "
                "weight). Save the deltas with gift.save, or the model after gift.merge"
            )
        return getattr(network, name)(*args, **kwargs)


def _is_partial(network: nn.Module, state: Any) -> bool:
    """Whether a state has trained tensors and is not the state of the whole plain model."""
    from gift.core.trained import delta_names, frozen_names

    deltas, frozen = delta_names(network), set(frozen_names(network))
    if not deltas.isdisjoint(state):
        return True
    return not record_of(network).chosen.isdisjoint(state) and not frozen <= set(state)


def _is_checkpoint(folder: object) -> bool:
    """Whether the folder is a checkpoint of transformers' Trainer, which knows how to resume."""
    return bool(re.fullmatch(r"checkpoint-\d+", os.path.basename(os.path.normpath(str(folder)))))
