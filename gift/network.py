"""What a network gains while it is being fine-tuned: it shows its trained parameters only."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.adapted import adapters_of, settings_misfits, settings_of
from gift.generated import Generated, Spec, change_class, contributes
from gift.report import Report
from gift.transaction import Undo


@dataclass
class NetworkRecord:
    """What fine-tuning keeps on the network.

    Args:
        chosen: names of the parameters that the strategy left trainable. They stay chosen while
            somebody freezes them for a while.
        report: what the strategy did.
        undo: the way back.
        keeps_base: whether the way back has the values of what is trained in place.
        only_trainable_parameters: whether ``parameters()`` gives trained parameters only.
        only_trainable_state: whether ``state_dict()`` gives these and buffers only.
        loading: while a state is being loaded, its prefix and keys.
    """

    chosen: set[str]
    report: Report
    undo: Undo
    keeps_base: bool = True
    only_trainable_parameters: bool = True
    only_trainable_state: bool = True
    loading: list[str] = field(default_factory=list)


class FineTunedNetwork(Generated):
    """Methods of the network that was given to `enable_fine_tuning`."""

    _gift_network: NetworkRecord

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The trained parameters; ``named_parameters()`` gives all."""
        if not self._gift_network.only_trainable_parameters:
            yield from super().parameters(recurse)  # type: ignore[misc]
        else:
            yield from (p for _, p in named_trainable(self, recurse))  # type: ignore[arg-type]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze the trained parameters, or train them again; no frozen one comes to life."""
        trained = dict(named_trainable(self))  # type: ignore[arg-type]
        self._gift_network.chosen.update(trained)
        for parameter in trained.values():
            parameter.requires_grad = requires_grad
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The trained parameters and the persistent buffers, under any prefix."""
        state = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        if self._gift_network.only_trainable_state:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            for name in frozen_names(self):  # type: ignore[arg-type]
                state.pop(prefix + name, None)
            _describe_deltas(self, state, prefix)  # type: ignore[arg-type]
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load trained parameters and buffers, or a whole checkpoint of the base.

        Raises:
            RuntimeError: naming every key that is missing, unknown or of another shape or method;
                nothing is loaded then.
        """
        problems = _problems(self, state_dict, strict)  # type: ignore[arg-type]
        if problems:
            raise RuntimeError(
                f"the state does not fit this fine-tuned {type(self).__name__}, "
                "nothing was loaded:\n  " + "\n  ".join(problems)
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)  # type: ignore[misc]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        # Here and in the hook below when a bigger module loads its state: the network's own
        # `load_state_dict` is not called then.
        inner = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        problems = _misfits(self, inner)  # type: ignore[arg-type]
        if problems:
            errors += problems
            for key in [k for k in state_dict if k.startswith(prefix)]:
                del state_dict[key]
        self._gift_network.loading = [prefix, *inner]
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )


def loaded(network: nn.Module, incompatible: Any) -> None:
    """Hook after loading: nobody misses the frozen tensors that a saved delta does not have."""
    record: NetworkRecord = network._gift_network  # type: ignore[assignment]
    if record.loading:
        prefix, *keys = record.loading
        record.loading = []
        _settle(incompatible.missing_keys, network, prefix, dict.fromkeys(keys))


@contributes
def _network_parts(plain: type, spec: Spec) -> tuple[list[type], dict[str, Any]]:
    if not spec.network:
        return [], {}
    readers = {name: getattr(plain, name, None) for name in ("dtype", "device")}
    return [FineTunedNetwork], {
        name: _of_the_base(reader)
        for name, reader in readers.items()
        if isinstance(reader, property)
    }


class _Whole:
    """A network as it was: its ``parameters()`` are all of them."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return nn.Module.parameters(self._network, recurse)


def _of_the_base(reader: property) -> property:
    """`model.dtype` and `model.device` of transformers read ``parameters()``, whose first is now a
    delta, of another dtype perhaps, or missing.
    """
    assert reader.fget is not None
    read = reader.fget
    return property(lambda self: read(_Whole(self)), reader.fset, reader.fdel, reader.__doc__)


def named_trainable(network: nn.Module, recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained: chosen by the strategy, or unfrozen since."""
    record = network.__dict__.get("_gift_network")
    chosen = record.chosen if record is not None else ()
    for name, parameter in network.named_parameters(recurse=recurse):
        if parameter.requires_grad or name in chosen:
            yield name, parameter


def frozen_names(network: nn.Module) -> list[str]:
    """Names of the parameters that are not trained, including the second names of tied ones."""
    chosen = network._gift_network.chosen  # type: ignore[union-attr,operator]
    return [
        name
        for name, p in network.named_parameters(remove_duplicate=False)
        if not p.requires_grad and name not in chosen  # type: ignore[operator]
    ]


def delta_names(network: nn.Module) -> set[str]:
    """Names of the parameters that methods added."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in network.named_modules()
        for adapter in adapters_of(module).values()
        if adapter.owner is None
        for name in adapter.names.values()
    }


def _all_tensors(network: nn.Module) -> dict[str, Any]:
    """All that a state of the network can hold: parameters, persistent buffers, extra states."""
    record: NetworkRecord = network._gift_network  # type: ignore[assignment]
    only, record.only_trainable_state = record.only_trainable_state, False
    try:
        return OrderedDict(network.state_dict(keep_vars=True))
    finally:
        record.only_trainable_state = only


def _misfits(network: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Shapes, and methods where the state tells them, that are not the network's."""
    have = _all_tensors(network)
    problems = []
    for key, value in state.items():
        expected, found = _shape(have.get(key)), _shape(value)
        if expected is not None and found is not None and expected != found:
            problems.append(f"{key} has shape {found}, expected {expected}")
    return problems


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) and not is_lazy(value) else None


def _problems(network: nn.Module, state: Mapping[str, Any], strict: bool) -> list[str]:
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a state dict, got {type(state).__name__}")
    problems = _misfits(network, state)
    told = getattr(state, "_metadata", None) or {}
    for path, module in network.named_modules():
        problems += settings_misfits(module, path, told.get(path, {}))
    if not strict:
        return problems
    have = _all_tensors(network)
    frozen = set(frozen_names(network))
    expected = [key for key in have if key not in frozen]
    if _is_whole_base(network, state):
        expected = [key for key in have if key not in delta_names(network)]
    problems += [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in have]
    return problems


def _is_whole_base(network: nn.Module, keys: Mapping[str, Any]) -> bool:
    """Whether these are keys of the network as it was before, without any delta."""
    frozen = frozen_names(network)
    deltas = delta_names(network)
    return bool(frozen) and all(n in keys for n in frozen) and not any(n in keys for n in deltas)


def _settle(missing: list[str], network: nn.Module, prefix: str, keys: Mapping[str, Any]) -> None:
    """After loading: what was rightly absent is not missing, and a new base is the base."""
    allowed = set(frozen_names(network))
    if _is_whole_base(network, keys):
        allowed = delta_names(network)
        network._gift_network.undo.refresh_values()  # type: ignore[union-attr]
        for module in network.modules():
            for tensor, adapter in adapters_of(module).items():
                if adapter.is_on_meta(module):
                    adapter.reset(module, tensor)
    missing[:] = [key for key in missing if key.removeprefix(prefix) not in allowed]


def _describe_deltas(network: nn.Module, state: Any, prefix: str) -> None:
    """Say in the state's metadata with which settings each delta was trained."""
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        for path, module in network.named_modules():
            if settings := settings_of(module):
                metadata.setdefault((prefix + path).rstrip("."), {})["gift"] = settings


def install_record(network: nn.Module, record: NetworkRecord) -> None:
    """Make `network` show its trained parameters only."""
    network.__dict__["_gift_network"] = record
    change_class(network, network=True)
    network.register_load_state_dict_post_hook(loaded)


def remove_record(network: nn.Module) -> NetworkRecord:
    """Undo `install_record`."""
    record: NetworkRecord = network.__dict__.pop("_gift_network")
    change_class(network, network=False)
    for key, hook in list(network._load_state_dict_post_hooks.items()):
        if hook is loaded:
            del network._load_state_dict_post_hooks[key]
    return record
