"""In-place changes of fine-tuning in PEFT's terms: whole modules, or biases."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gift.core.dynamic_class import joined
from gift.core.trained import moved_buffers, trained_of_the_base
from gift.interop.peft.forms import Form, Tensors, Written
from gift.interop.peft.names import ends_with, kept

# Modules inside the wrapper that PEFT puts around a layer: it searches names among these as well.
_INNER = {"base_layer", "default", "lora_dropout", "vera_dropout", "oft_dropout"}
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class InPlace:
    """Parameters that are trained directly, and buffers that changed.

    Args:
        network: network that is being fine-tuned.
        form: form of its adapted tensors.
        written: the adapted tensors in PEFT's terms.
    """

    def __init__(self, network: Any, form: Form, written: Written) -> None:
        self.network, self.form, self.written = network, form, written
        self.problems: list[str] = []
        self.bias = "none"
        self.tensors: Tensors = {}
        changed = set(_trained(network)) | set(moved_buffers(network))
        changed -= self._saved_as_biases(changed)
        self.whole = self._modules_of(changed)
        self._save_modules()

    def _saved_as_biases(self, changed: set[str]) -> set[str]:
        """Return biases beside adapters, if they are exactly those that a word of PEFT means."""
        targets = self.written.targets
        wrapped = {place: path for path in targets for place in (path, f"{path}.out_proj")}
        beside = {name for name in changed if name.rpartition(".")[0] in wrapped}
        if not beside:
            return set()
        base = {n for n, _ in self.network.named_parameters() if ends_with(n, ["bias"])}
        own = {joined(path, "bias") for path in wrapped} & base
        words = {"all": base, f"{self.form.bias}": own}
        for word, names in words.items():
            if self.form.bias and beside <= names <= changed:
                self.bias = word
                for name in names:
                    path, _, last = name.rpartition(".")
                    if path in wrapped:
                        owner = wrapped[path]
                        inside = f"{owner}.base_layer{path.removeprefix(owner)}"
                        name = (
                            f"{inside}.{last}" if path == owner else f"{inside}.base_layer.{last}"
                        )
                    self.tensors[name] = self.network.get_parameter(name.replace(".base_layer", ""))
                return names
        self.problems.append(
            f"{sorted(beside)} are trained beside adapters: PEFT can train all biases"
            + (" or all of adapted layers" if self.form.bias else ", but not in this method")
            + ", and nothing else there"
        )
        return beside

    def _modules_of(self, changed: set[str]) -> list[str]:
        """Return the modules that hold these tensors, without those inside others."""
        holders = {name.rpartition(".")[0] for name in changed}
        if "" in holders:
            own = sorted(name for name in changed if "." not in name)
            self.problems.append(f"{own} stand on the network itself: PEFT saves modules inside it")
        return sorted(path for path in holders - {""} if not _is_inside(path, holders - {path}))

    def _save_modules(self) -> None:
        """Save all modules that PEFT will match; as it matches endings, these may be more."""
        names = [name for name, _ in self.network.named_modules(remove_duplicate=False)]
        config = {"modules_to_save": self.whole}
        found = kept(config, names)
        inner = {suffix.partition(".")[0] for suffix in self.form.suffixes} | _INNER
        if self.written.targets and (keys := kept(config, sorted(inner))):
            self.problems.append(f"PEFT would take {keys} of its own adapters for {self.whole}")
        adapted = {*self.written.targets, *(n.rpartition(".")[0] for n in self.written.parameters)}
        for path in found:
            inside = sorted(name for name in adapted if name == path or _is_inside(name, {path}))
            if inside:
                self.problems.append(
                    f"{path} is changed in place, and has adapted layers {inside}: PEFT saves "
                    "modules whole"
                )
            if isinstance(self.network.get_submodule(path), _CONTAINERS):
                self.problems.append(f"{path} is changed in place: PEFT cannot save a container")
            if _is_inside(path, adapted):
                self.problems.append(f"{path} is changed in place, inside an adapted layer")
            if _is_inside(path, set(found)):
                self.problems.append(f"{path} is inside another module that PEFT would save whole")
            for key, value in self.network.get_submodule(path).state_dict().items():
                if isinstance(value, Tensor):
                    self.tensors[f"{path}.{key}"] = value
                else:
                    self.problems.append(f"{path}.{key} is not a tensor, which PEFT cannot save")


def _is_inside(path: str, others: set[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _trained(network: Any) -> Iterator[str]:
    """Yield the names of trained base parameters, with all names of tied ones."""
    trained = {id(parameter) for _, parameter in trained_of_the_base(network)}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in trained:
            yield name
