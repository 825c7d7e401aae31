"""Loading states of networks from files."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gift.errors import NetworkError, first_line, some
from gift.private.torch.calls import COMPILED

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", f"{COMPILED}.")


def put_state(net: nn.Module, path: str | Path) -> None:
    """Load the complete state of a network from a safetensors or torch file.

    Wrappers of training scripts around a state, and prefixes of DDP and ``torch.compile``, are
    removed. Tied tensors may be stored once.

    Raises:
        NetworkError: if the file is not a state, or not of this network, which is then unchanged.
    """
    state = _read(Path(path))
    own = net.state_dict()
    loaded = {own[name].data_ptr() for name in set(own) & set(state)}
    problems = {
        # Some files store tied tensors once, others lack the number of tracked batches.
        "missing": [
            name
            for name in own
            if name not in state
            and own[name].data_ptr() not in loaded
            and not name.endswith(".num_batches_tracked")
        ],
        "unknown": sorted(set(state) - set(own)),
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    found = [f"{what}: {some(names, 3)}" for what, names in problems.items() if names]
    if found:
        raise NetworkError(
            f"{path} is not a state of this {type(net).__name__}; "
            + "; ".join(found)
            + "; does it "
            "need other options, such as the number of classes?"
        )
    net.load_state_dict(state, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NetworkError(f"there is no file {path} with weights")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise NetworkError(
            f"{path} has no weights that can be read; expected what safetensors, or torch.save of "
            f"net.state_dict(), wrote ({first_line(error)})"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise NetworkError(f"{path} has no state of a network, but a {type(state).__name__}")
    state = dict(state)
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
