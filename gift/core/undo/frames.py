"""What fine-tuning added to modules, kept to be put back."""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.delta import added_names, held
from gift.core.dynamic_class import Spec, generated_class, plain_class, set_class, spec_of
from gift.core.frozen_base import HELD, hold_flags
from gift.core.weights.record import weight_deltas
from gift.support.tensors import with_data

OWN = (HELD, "_gift_weights", "_gift_forwards", "_gift_network", "_gift_schedule", "_gift_mode")


class Below:
    """A fine-tuned network as it was before another strategy was enabled on top.

    Args:
        network: the network, before that.
    """

    def __init__(self, network: nn.Module) -> None:
        self.frames = [Frame(m) for m in network.modules() if spec_of(m) != Spec()]

    def put(self, network: nn.Module) -> None:
        """Restore it, after everything that gift added was removed; can be repeated."""
        shared: dict[int, Tensor] = {}
        for frame in self.frames:
            frame.apply(shared)
        hold_flags(network)


class Frame:
    """The parts of one module that `ModuleUndo` leaves out: its class, and what gift added."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.spec = spec_of(module)  # not the class, which pickle cannot find by name
        # Include adapted tensors in ``__dict__``: a hook computed these.
        keys = [key for key in (*OWN, *weight_deltas(module)) if key in module.__dict__]
        self.own = {key: module.__dict__[key] for key in keys}
        self.parameters = dict(module._parameters)
        self.buffers = dict(module._buffers)
        self.hooks = dict(module._load_state_dict_post_hooks)
        self.not_saved = set(module._non_persistent_buffers_set)
        self.place = _place_of_base(module)
        self.added = [
            p for n in added_names(module) if (p := module._parameters.get(n)) is not None
        ]

    def apply(self, shared: dict[int, Tensor]) -> None:
        """Put the parts back.

        Args:
            shared: buffers that were moved or cast so far, by the id of the buffer before.
        """
        module = self.module
        set_class(module, generated_class(plain_class(type(module)), self.spec))
        # A hook that computed a tensor may be gone.
        own = {k: v for k, v in self.own.items() if k in OWN or k in module.__dict__}
        module.__dict__.update(own)
        if spec_of(module).statistics:  # freeze them again, remember the requested mode
            module.__dict__["_gift_mode"] = module.training
            module.training = False
        device, dtype = _place_of_base(module)
        # Base tensors stay as they are now. If they were moved or cast, the deltas follow.
        added = added_names(module)
        _put_among(module._parameters, self.parameters, added)
        _put_among(module._buffers, self.buffers, added)
        _put_among(module._load_state_dict_post_hooks, self.hooks, self.hooks)
        for name in added if device is not None else ():
            delta = held(module, name)[name]
            cast = dtype != self.place[1] and delta.is_floating_point()
            data = delta.data.to(device=device, dtype=dtype if cast else None)
            if data is not delta.data and (delta.device, delta.dtype) != (data.device, data.dtype):
                delta.grad = None  # must have the dtype of its tensor
                # Layers of other networks may share a buffer; it stays as it is for them.
                held(module, name)[name] = (
                    with_data(delta, data)
                    if isinstance(delta, nn.Parameter)
                    else shared.setdefault(id(delta), data)
                )
        module._non_persistent_buffers_set.update(self.not_saved)


def _place_of_base(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device of the module's own tensors, and dtype of its first floating-point one."""
    # Those that gift added are not there yet, or come after the others.
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    dtypes = (tensor.dtype for tensor in own if tensor.is_floating_point())
    return next((tensor.device for tensor in own), None), next(dtypes, None)


def _put_among(now: dict[Any, Any], then: dict[Any, Any], names: Container[Any]) -> None:
    """Restore the entries of `then` with these names in `now`, and the order of `then`."""
    present = {**now}
    now.clear()
    for key, value in then.items():
        if key in present or key in names:
            now[key] = present.pop(key, value)
    now.update(present)
