"""Keep the base frozen when ``requires_grad_`` is called on a part of a fine-tuned network.

Libraries unfreeze a part with ``net.encoder.requires_grad_(True)``. That part can be any module,
also one that fine-tuning left unchanged. Its class stays the same, because code may check for it
(``type(net.encoder) is nn.Sequential``). Instead, the module gets an instance attribute that
shadows the method: an object that is copied and pickled like any other part of the module. Setting
``requires_grad`` of a parameter directly cannot be prevented, only detected, see `unfrozen`.
"""

import warnings
from threading import RLock
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gift.core.dynamic_class import joined, plain_class
from gift.core.record import record_of
from gift.errors import GiftWarning, some

HELD = "requires_grad_"
"""The name of the instance attribute, which shadows the method of that name."""


class HeldFlags:
    """Replacement for ``requires_grad_`` of a module in a network that is being fine-tuned.

    Freezes every parameter in the module, or unfreezes those that fine-tuning trains. The frozen
    base stays frozen.

    Args:
        module: the module.
        frozen: names of its own parameters that stay frozen.

    Attributes:
        empty: names of the module's attributes that are None, where a submodule may be set later.
    """

    def __init__(self, module: nn.Module, frozen: frozenset[str]) -> None:
        self.module = module
        self.frozen = frozen
        self.empty = tuple([name for name, value in module.__dict__.items() if value is None])

    def __call__(self, requires_grad: bool = True) -> nn.Module:
        """Freeze the parameters in the module, or train those that are not held frozen."""
        module = self.module
        held = {id(p) for part in module.modules() for p in held_in(part)}
        written = getattr(plain_class(type(module)), HELD)
        parameters = list(nn.Module.parameters(module))
        if written is nn.Module.requires_grad_:
            for parameter in parameters:
                if not requires_grad or id(parameter) not in held:
                    parameter.requires_grad = requires_grad
        else:  # the author's own method may do more: call it, then freeze the base again
            before = {id(p) for p in parameters if p.requires_grad}
            written(module, requires_grad)
            for parameter in parameters:
                if id(parameter) in held - before and parameter.requires_grad:
                    parameter.requires_grad = False
        if requires_grad and parameters and held.issuperset(map(id, parameters)):
            warnings.warn(
                f"nothing in this {type(module).__name__} is trained, so requires_grad_ changed "
                "nothing: the base of a network that is being fine-tuned stays frozen. To train "
                "it, name it in the strategy (ma_train, ModulesFineTuningStrategy)",
                GiftWarning,
                stacklevel=2,
            )
        return module


def held_in(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of `module` itself that stay frozen."""
    if not is_held(module):
        return []
    own = [module._parameters.get(name) for name in module.__dict__[HELD].frozen]
    return [parameter for parameter in own if parameter is not None]


def is_held(module: nn.Module) -> bool:
    """Whether `module` is in a fine-tuned network and has parameters, its own or in submodules."""
    return isinstance(module.__dict__.get(HELD), HeldFlags)


def hold_flags(network: nn.Module) -> None:
    """Hold the parameters that a fine-tuned network does not train frozen, and only these.

    Called whenever the set of trained parameters changes.
    """
    watch(network)
    record = record_of(network)
    trained = record.chosen - record.waiting
    parts = list(network.named_modules(remove_duplicate=False))
    free = {
        id(parameter)
        for path, module in parts
        for name, parameter in module._parameters.items()
        if joined(path, name) in trained
    }
    record.held = []
    same: dict[frozenset[str], frozenset[str]] = {}  # one object for all layers of a kind
    for module in dict.fromkeys(module for _, module in parts):
        own = module._parameters
        if not (own or module._modules):
            continue
        known = module.__dict__.get(HELD)
        if known is not None and not isinstance(known, HeldFlags):
            continue  # an attribute of the author's own
        frozen = frozenset([n for n, p in own.items() if p is not None and id(p) not in free])
        if known is None or known.frozen != frozen:
            known = module.__dict__[HELD] = HeldFlags(module, same.setdefault(frozen, frozen))
        if frozen:
            record.held.append(known)


def unfrozen(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that fine-tuning froze and whose ``requires_grad`` was set since."""
    return [
        parameter
        for flags in record_of(network).held
        for name in flags.frozen
        if (parameter := flags.module._parameters.get(name)) is not None and parameter.requires_grad
    ]


def warn_unfrozen(network: nn.Module) -> None:
    """Warn once about the parameters that `unfrozen` finds."""
    if torch.compiler.is_compiling():  # Dynamo cannot read flags or issue warnings
        return
    record = record_of(network)
    if record.warned_unfrozen or not (found := {id(p) for p in unfrozen(network)}):
        return
    record.warned_unfrozen = True
    names = [name for name, p in nn.Module.named_parameters(network) if id(p) in found]
    warnings.warn(
        f"{len(names)} parameters were frozen by fine-tuning, but their requires_grad has been set "
        f"since: {some(names)}. They are trained as well and are part of parameters(), so the next "
        "step of an optimizer that holds them changes the base. If that is not intended, set "
        "requires_grad = False and pass only net.parameters() to the optimizer; otherwise, name "
        "them in the strategy (ma_train, pa_train)",
        GiftWarning,
        stacklevel=3,
    )


_WATCHED: WeakSet[nn.Module] = WeakSet()
_watching = RLock()  # several threads may enable networks
_hooks: list[Any] = []


def watch(network: nn.Module) -> None:
    """Let every optimizer warn about what `unfrozen` finds in `network` before it updates that.

    A check in the network's ``__call__`` is not enough, because other code may call its methods or
    its submodules.
    """
    with _watching:
        _WATCHED.add(network)
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))


def fine_tuned_networks() -> tuple[nn.Module, ...]:
    """All networks that are being fine-tuned now."""
    with _watching:
        return tuple(_WATCHED)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for network in fine_tuned_networks():
        record: Any = vars(network).get("_gift_network")
        if record is None or record.warned_unfrozen or not (found := unfrozen(network)):
            continue
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not moved.isdisjoint(map(id, found)):
            warn_unfrozen(network)


def release_flags(network: nn.Module) -> None:
    """Undo `hold_flags`."""
    with _watching:
        _WATCHED.discard(network)
    for module in network.modules():
        if is_held(module):
            del module.__dict__[HELD]
