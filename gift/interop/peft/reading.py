"""Converting the files of PEFT to deltas and values of a network."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.dynamic_class import joined
from gift.core.weights.frozen import plain_tensor
from gift.factories.actions import method_and_options
from gift.interop.peft.forms import Config, Layer, Read, Tensors
from gift.interop.peft.layers import context_incompatibilities, kind_of, layer_incompatibilities
from gift.interop.peft.names import PREFIX, ends_with, kept, targeted
from gift.interop.peft.table import FORMS
from gift.layers.table import layout_of
from gift.support.tensors import cast_incompatibility, dtype_name

_WRAPPED = ".base_layer"


class Reading:
    """The content of a file for a network, and where the two do not fit.

    Args:
        network: a plain network.
        config: config without problems according to `gift.interop.peft.folder.incompatibilities`.
        tensors: tensors by their full keys.
    """

    def __init__(self, network: nn.Module, config: Config, tensors: Tensors) -> None:
        self.network = network
        self.form = FORMS[config["peft_type"]]
        self.config = self.form.defaults | config
        self.problems: list[str] = []
        self.reads: list[Read] = []
        self.biased: set[str | None] = set()  # adapted modules whose biases are trained
        self.in_place: Tensors = {}
        self.trained: list[str] = []
        self.paths = _paths(network)
        self.modules = dict(network.named_modules(remove_duplicate=False))
        self.base = {
            **dict(network.named_parameters(remove_duplicate=False)),
            **dict(network.named_buffers(remove_duplicate=False)),
        }
        self.whole = _outermost(kept(self.config, self.modules))
        words = ("none", "all", self.form.bias)
        if self.config.get("bias", "none") not in words:
            self.problems.append(f"bias is {self.config['bias']!r}, expected one of {words}")
        layers, others, shared = self._sorted(tensors)
        for layer in layers:
            self._read_layer(layer, shared)
        self._compare_targets(layers)
        self._read_whole(others)
        self._read_rest(others)
        self._check_ties()
        if not self.reads and not self.in_place and not self.problems:
            self.problems.append("it adapts nothing")

    def _sorted(self, tensors: Tensors) -> tuple[list[Layer], Tensors, Tensors]:
        """Split tensors into those of layers, of the base, and those that all layers share."""
        beside: dict[str, Tensors] = {}
        others: Tensors = {}
        shared: Tensors = {}
        for key, tensor in tensors.items():
            rest = key.removeprefix(PREFIX)
            suffix = next((s for s in self.form.suffixes if rest.endswith(f".{s}")), None)
            if suffix is not None:
                beside.setdefault(rest.removesuffix(f".{suffix}"), {})[suffix] = tensor
            elif rest == key:
                shared[key] = tensor
            elif ".original_module." not in key and ".modules_to_save." not in key:
                others[rest.replace(_WRAPPED, "")] = tensor
        unknown = sorted(set(shared) - self.form.shared)
        self.problems += [f"{key}: PEFT has no such key" for key in unknown]
        return list(self._layers(beside)), others, shared

    def _layers(self, beside: dict[str, Tensors]) -> Iterator[Layer]:
        inside = f"{_WRAPPED}.out_proj"
        for path, tensors in list(beside.items()):
            if path.endswith(inside) and path.removesuffix(inside) in beside:
                prefixed = {f"{inside[1:]}.{suffix}": tensor for suffix, tensor in tensors.items()}
                beside[path.removesuffix(inside)] |= prefixed
                del beside[path]
        for path, tensors in beside.items():
            own = path
            while own.endswith(_WRAPPED):
                own = own.removesuffix(_WRAPPED)
            module = self.modules.get(own)
            if module is None:
                self.problems.append(f"{own}: there is no such module")
                continue
            layer = Layer(self.network, own, module, tensors)
            # Of several single parameters of a module, PEFT wraps the first one innermost.
            names = [n for n in self._parameters() if n.rpartition(".")[0] == own]
            depth = path.count(_WRAPPED, len(own))
            if depth < len(names):
                layer = replace(layer, tensor=names[-1 - depth].rpartition(".")[2], single=True)
            elif depth:
                self.problems.append(f"{own}: no parameter of it is a target")
                continue
            yield layer

    def _parameters(self) -> list[str]:
        """Return the single parameters that the config adapts."""
        targets = self.config.get("target_parameters") or []
        return [name for name in self.base if targets and ends_with(name, targets)]

    def _read_layer(self, layer: Layer, shared: Tensors) -> None:
        path = layer.path
        problems: list[str] = []
        if not layer.single:
            problems += layer_incompatibilities(layer.module, self.form.peft_type, self.form.kinds)
        problems += _kind_incompatibilities(layer, self.form.indices)
        problems += context_incompatibilities(self.network, path)
        if len(self.paths[id(layer.module)]) > 1:
            problems.append(
                f"it has several names, {self.paths[id(layer.module)]}: PEFT adapts one"
            )
        if not problems:
            try:
                reads = self.form.read(layer, self.config, shared)
                problems += [text for read in reads for text in _shape_incompatibilities(read)]
                self.reads += reads
            except (ValueError, RuntimeError, IndexError) as error:  # torch's own, for odd shapes
                problems.append(str(error))
        self.problems += [f"{path}: {problem}" for problem in problems]

    def _compare_targets(self, layers: list[Layer]) -> None:
        """Compare with the config, which PEFT follows: it ignores tensors for anything else."""
        parameters = set(self._parameters())
        found = {joined(layer.path, layer.tensor) for layer in layers}
        self.problems += [
            f"{name} is a target, and has no tensors" for name in sorted(parameters - found)
        ]
        targets = self.config.get("target_modules")
        if targets is None and not parameters:
            return  # PEFT chose by the architecture
        adapted = {
            layer.path for layer in layers if joined(layer.path, layer.tensor) not in parameters
        }
        if isinstance(targets, str) and targets.lower() == "all-linear":
            wrong = [p for p in adapted if kind_of(self.modules[p]) not in ("linear", "transposed")]
            self.problems += [
                f"{path} is not a target, as it is not linear" for path in sorted(wrong)
            ]
            return
        wanted = targeted(self.config, (path for path, _ in self.network.named_modules()))
        if self.config.get("ensure_weight_tying") or self.form.ties:
            tied = {id(self.base.get(f"{path}.weight")) for path in wanted}
            wanted |= {path for path in adapted if id(self.base.get(f"{path}.weight")) in tied}
        self.problems += [
            f"{path} is a target, and has no tensors" for path in sorted(wanted - adapted)
        ]
        self.problems += [
            f"{path} has tensors, and is not a target" for path in sorted(adapted - wanted)
        ]

    def _read_whole(self, others: Tensors) -> None:
        """Read modules that are trained whole."""
        for path in self.whole:
            if len(self.paths[id(self.modules[path])]) > 1:
                self.problems.append(f"{path} has several names: PEFT copies a module for each")
            for key in self.modules[path].state_dict():
                name = f"{path}.{key}"
                if name in others:
                    self._take(name, others.pop(name))
                else:
                    self.problems.append(f"{name} is missing, of a module that was trained whole")

    def _take(self, name: str, value: Tensor) -> None:
        base = self.base.get(name)
        if base is None:
            self.problems.append(f"{name}: there is no such tensor in the network")
        elif base.shape != value.shape:
            self.problems.append(f"{name} is {tuple(value.shape)}, here {tuple(base.shape)}")
        elif problem := cast_incompatibility(value, base.dtype):
            self.problems.append(f"{name} {problem}")
        else:
            self.in_place[name] = value

    def _read_rest(self, others: Tensors) -> None:
        """Read trained biases; all other tensors must equal those of the base."""
        claimed = {read.claimed for read in self.reads}
        missing = self._biases(claimed) - set(others) - set(self.in_place)
        self.problems += [f"{name} is missing, as biases were trained" for name in sorted(missing)]
        for name, value in others.items():
            path, base = name.rpartition(".")[0], self.base.get(name)
            owner = next((p for p in (path, path.removesuffix(".out_proj")) if p in claimed), None)
            if base is not None and base.shape == value.shape and torch.equal(base, value.to(base)):
                is_trained = ends_with(name, ["bias"]) and self.config.get("bias", "none") != "none"
                if not is_trained:
                    continue  # a copy, as of embeddings
            self._take(name, value)
            if isinstance(base, nn.Parameter) and owner is None:
                self.trained.append(name)
            elif ends_with(name, ["bias"]) and owner is not None:
                self.biased.add(owner)
            elif base is not None:
                self.problems.append(f"{name} is not that of this network: the base is another one")

    def _biases(self, claimed: set[Any]) -> set[str]:
        """Return the biases that PEFT trains."""
        word = self.config.get("bias", "none")
        found = {name for name in self.base if ends_with(name, ["bias"])}
        if word == "all":
            return found
        adapted = {joined(path, "bias") for path in claimed if path is not None}
        return found & adapted if word == self.form.bias and word else set()

    def _check_ties(self) -> None:
        """Check tied tensors: PEFT adapts each name separately, gift keeps one tensor."""
        reads = {read.name: read for read in self.reads}
        names: dict[int, list[str]] = {}
        for name, tensor in self.base.items():
            names.setdefault(id(tensor), []).append(name)
        for tied in names.values():
            for name, other in ((n, o) for n in tied for o in tied if n != o):
                both = not self.form.ties or other in reads
                if name in reads and both and not _alike(reads[name], reads.get(other)):
                    self.problems.append(
                        f"{name} and {other} are one tensor: PEFT adapts them apart"
                    )
                value, second = self.in_place.get(name), self.in_place.get(other, self.base[other])
                if value is not None and not torch.equal(value.to(second), second):
                    self.problems.append(
                        f"{name} and {other} are one tensor: PEFT trains them apart"
                    )


def _kind_incompatibilities(layer: Layer, indices: frozenset[str]) -> Iterator[str]:
    """Yield factors and indices of another kind, before anything is computed with them."""
    for suffix, tensor in layer.tensors.items():
        kind = dtype_name(tensor.dtype)
        if suffix in indices:
            if tensor.dtype not in (torch.int32, torch.int64):
                yield f"{suffix} is {kind}, expected int32 or int64"
        elif not tensor.is_floating_point():
            yield f"{suffix} is {kind}, expected a real floating-point dtype"


def _paths(network: nn.Module) -> dict[int, list[str]]:
    paths: dict[int, list[str]] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return paths


def _outermost(paths: list[str]) -> list[str]:
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]


def _alike(read: Read, other: Read | None) -> bool:
    """Whether two deltas are equal."""
    if other is None or (read.method, read.settings) != (other.method, other.settings):
        return False
    return all(
        value.shape == other.values[key].shape and torch.equal(value, other.values[key])
        for key, value in read.values.items()
    )


def _shape_incompatibilities(read: Read) -> Iterator[str]:
    """Yield values that do not fit the method, which is tried on the meta device."""
    layer = read.layer
    if plain_tensor(layer.module, layer.tensor).is_meta:
        yield "the network has no values yet"
        return
    weight = layer.weight
    try:
        method, options, _ = method_and_options(read.method, **read.options)
        layout = layout_of(layer.module, layer.tensor, weight.shape, options)
        probe = torch.empty(layout.matrix, dtype=weight.dtype, device="meta")
        made = method.fit(layout.matrix).init_parameters(probe)
    except ValueError as error:  # of settings, or as the matrix cannot have them
        yield str(error)
        return
    for key, value in read.values.items():
        if problem := cast_incompatibility(value, made[key].dtype if key in made else weight.dtype):
            yield f"{key} {problem}"
    for key, expected in made.items():
        if key in read.values and read.values[key].shape != expected.shape:
            found = tuple(read.values[key].shape)
            yield f"{key} is {found}, expected {tuple(expected.shape)}"
