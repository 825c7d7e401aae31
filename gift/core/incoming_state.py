"""Check a state before a fine-tuned network loads it.

torch only compares keys and shapes, and with ``strict=False`` not even a mismatch is an error. The
checks here find out what a state is. If another library renamed its deltas, all deltas would stay
untrained. If another library rebuilt the model, its state would replace the frozen base.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import named_deltas
from gift.core.state_settings import is_settings
from gift.core.weights.record import weight_deltas
from gift.errors import some
from gift.quantization import is_quantised
from gift.support.sharding import is_sharded


@dataclass(frozen=True)
class Incoming:
    """A state, and the network that is about to load it.

    Args:
        network: a network that is being fine-tuned.
        state: the state, by the network's own names.
        own: the network's whole state.
        frozen: names of the parameters that are not trained.
        deltas: names of the tensors that methods added.
        trained: names of all trained parameters.
        strict: whether torch refuses missing and unexpected keys.
        prefix: what precedes the names in the state of a bigger module.
    """

    network: nn.Module
    state: Mapping[str, Any]
    own: Mapping[str, Any]
    frozen: Set[str]
    deltas: Set[str]
    trained: Set[str]
    strict: bool
    prefix: str

    def problems(self) -> Iterator[str]:
        """Reasons why nothing of the state may be loaded."""
        if found := self._renamed():
            pairs = [
                f"{self.prefix + theirs} (here {self.prefix + ours})"
                for theirs, ours in found.items()
            ]
            yield (
                f"{len(found)} trained tensors have other names in the state: {some(pairs, 3)}. "
                "The library that wrote it renamed them, or it is the state of another network: "
                "rename the keys to those of net.state_dict()"
            )
        elif self._is_merged() and self._has_effect():
            yield (
                "the state looks like a merged copy of this network: it differs from the base in "
                "adapted weights only. The deltas would be applied twice: load it into a plain "
                "network (after gift.disable_fine_tuning, or before enable_fine_tuning)"
            )

    def surprises(self) -> Iterator[str]:
        """Warnings about a state that may be loaded."""
        if not self.own_deltas:
            return
        if self.own_deltas & self.state.keys():
            # Base and deltas from one state fit together, so only what was trained here is lost.
            whole = self.frozen <= self.state.keys()
            if whole and (changed := self._changed()) and self._has_effect():
                yield (
                    f"the state replaced {len(changed)} frozen tensors of the base by other "
                    f"values, and the deltas by its own: {some(changed)}"
                )
        elif self.frozen & self.state.keys():
            yield from self._surprises_of_a_base()
        elif not self.strict and not self.trained & self.state.keys() and self._is_for_it:
            yield "the state contains nothing that is trained here: all deltas stay as they are"

    @property
    def _is_for_it(self) -> bool:
        """Whether the state has anything for this network, rather than for its siblings."""
        return bool(self.state) or not self.prefix

    def _surprises_of_a_base(self) -> Iterator[str]:
        changed = self._changed()
        if not changed:
            if self._comparable and (not self.strict or self._has_effect()):
                yield (
                    "the state is that of the base, without deltas: nothing changes, the deltas "
                    "stay as they are"
                )
        elif self._has_effect():
            yield (
                f"the state replaced {len(changed)} frozen tensors of the base by other values "
                f"({some(changed)}), and has no deltas: the network keeps its own, which were "
                "trained for the previous base"
            )
        elif self._is_merged():
            yield (
                "the state looks like a merged copy of this network and is now its base: the "
                "deltas, which have no effect yet, start from it"
            )

    @property
    def own_deltas(self) -> Set[str]:
        """The deltas that a state contains."""
        return self.deltas & self.own.keys()

    def _renamed(self) -> dict[str, str]:
        """Map unexpected keys that can only be renamed trained tensors to the names of these."""
        missing = (self.own_deltas | (self.trained & self.own.keys())) - self.state.keys()
        unexpected = [key for key in self.state if key not in self.own and not is_settings(key)]
        if not missing or not unexpected:
            return {}
        kinds: dict[Any, list[str]] = {}
        for name in self.own:
            if name in missing:
                kinds.setdefault(_kind(name, self.own[name]), []).append(name)
        found = {
            key: kinds[kind].pop(0)
            for key in unexpected
            if kinds.get(kind := _kind(key, self.state[key]))
        }
        # Every network has names like `weight` and `bias`, so there all must have a counterpart.
        certain = any(name in self.deltas for name in found.values())
        return found if certain or len(found) == len(missing) else {}

    @property
    def _comparable(self) -> list[str]:
        return [
            name
            for name in self.frozen & self.state.keys() & self.own.keys()
            if _is_comparable(self.own[name], self.state[name])
        ]

    def _changed(self) -> list[str]:
        """Names of the frozen tensors whose values would change."""
        return sorted(
            name for name in self._comparable if not _equal(self.own[name], self.state[name])
        )

    def _is_merged(self) -> bool:
        """Whether only adapted weights differ from the base, among all the tensors of the state."""
        if self.own_deltas & self.state.keys() or not self.own_deltas:
            return False
        tensors = {id(p) for m in self.network.modules() for p in _adapted(m)}
        named = self.network.named_parameters(remove_duplicate=False)
        adapted = {name for name, p in named if id(p) in tensors}
        others = [name for name in self._comparable if name not in adapted]
        if not others or any(not _equal(self.own[n], self.state[n]) for n in others):
            return False
        return bool(self._changed())

    def _has_effect(self) -> bool:
        """Whether a delta changes what the network computes."""
        found = named_deltas(self.network)
        # Deltas of tied tensors, and of biases that follow weights, are reported where they are
        # held.
        return any(delta.owner is None and delta.has_effect(m, key) for m, key, delta in found)


def _kind(name: str, value: object) -> tuple[str, Any]:
    return name.rpartition(".")[2], getattr(value, "shape", None)


def _adapted(module: nn.Module) -> list[Any]:
    return [module._parameters[t] for t in weight_deltas(module) if t in module._parameters]


def _is_comparable(here: Any, there: Any) -> bool:
    for tensor in (here, there):
        if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta:
            return False
        if is_sharded(tensor) or is_quantised(tensor):
            return False
    return bool(here.shape == there.shape)


def _equal(here: Tensor, there: Tensor) -> bool:
    return torch.equal(here, there.to(here))
