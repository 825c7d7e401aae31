"""Actions: what a cap does. ``ma_...`` act on a module, ``pa_...`` on a parameter."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, Self

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from gift.core.dynamic_class import plain_class
from gift.core.frozen_norms import freeze_statistics
from gift.core.io_spec import forget_classes
from gift.core.iterator import Site
from gift.core.unfreeze import packed_values
from gift.core.weights.attach import adapt_module, adapt_tensor
from gift.errors import AdaptationError
from gift.factories.serializable import Recorded, recorded
from gift.layers.layouts import LAYOUT_CHOICES, LayoutOptions
from gift.layers.table import row_of
from gift.methods import Method, method_of


class Action(Recorded):
    """An action on a module or parameter.

    Args:
        act: function with the arguments of a cap's action.
        prepare: function that returns the action for a network, if the action depends on the whole
            network.
        open: whether the action wraps a module and leaves it open: later caps are still tried on
            the same module and on what is inside it. The action runs after all of theirs.
    """

    def __init__(
        self,
        act: Callable[..., None] | None = None,
        prepare: Callable[[nn.Module], Callable[..., None]] | None = None,
        open: bool = False,
    ) -> None:
        self.act = act
        self.prepare = prepare
        self.open = open

    def __call__(self, *place: Any, **params: Any) -> None:
        """Act on the module or parameter at `place`."""
        if self.act is None:
            raise RuntimeError(f"{self!r} needs the whole network: use it as the action of a cap")
        self.act(*place, **params)

    def bind(self, network: nn.Module) -> Self:
        """Return the action for that network."""
        if self.prepare is None:
            return self
        return self.like(type(self)(self.prepare(network), open=self.open))


def method_and_options(method: str | Method, **settings: Any) -> tuple[Method, LayoutOptions, bool]:
    """Return the method, the layouts, and whether biases are trained."""
    train_bias = settings.pop("train_bias", False)
    options = {k: settings.pop(k) for k in LAYOUT_CHOICES if k in settings}
    made = method_of(method, settings)
    settled = LayoutOptions(**options).settled(made.conv_layouts, made.rows_are_outputs)
    return made, settled, train_bias


@recorded
def ma_adapt(method: str | Method = "lora", **settings: Any) -> Action:
    """Adapt every known weight in the module and its submodules, and freeze the rest of them.

    Args:
        method: name of a method, or a method with its settings.
        settings: settings of the method, and ``train_bias``, ``conv_layout``, ``split_qkv``.

    Raises:
        ValueError: if the method or a setting is unknown, or a value is out of range.
    """
    made = method_and_options(method, **settings)

    def act(*place: Any, **params: Any) -> None:
        own = method_and_options(method, **(settings | params)) if params else made
        adapt_module(Site(*place).module, *own)

    return Action(act)


@recorded
def pa_adapt(method: str | Method = "lora", **settings: Any) -> Action:
    """Adapt one parameter of a module of any type; see `ma_adapt`."""
    made = method_and_options(method, **settings)

    def act(*place: Any, **params: Any) -> None:
        own, options, _ = method_and_options(method, **(settings | params)) if params else made
        site = Site(*place)
        adapt_tensor(site.module, site.parameter_name, own, options)

    return Action(act)


@recorded
def ma_train() -> Action:
    """Train all parameters of the module and its submodules; packed ones are refused."""
    return Action(lambda *place: _train(nn.Module.named_parameters(Site(*place).module)))


@recorded
def ma_freeze(statistics: bool = False) -> Action:
    """Freeze all parameters of the module and its submodules.

    Args:
        statistics: whether to keep its norm layers in evaluation mode too, whatever ``train()``
            sets, so that their running statistics are frozen.
    """

    def act(*place: Any) -> None:
        module = Site(*place).module
        for parameter in nn.Module.parameters(module):
            parameter.requires_grad = False
        if statistics:
            freeze_statistics(module)

    return Action(act)


def _train(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    named = list(named)
    if packed := [f"{name}: {why}" for name, p in named if (why := packed_values(p))]:
        raise AdaptationError("; ".join(packed))
    for _, parameter in named:
        parameter.requires_grad = True


@recorded
def pa_train() -> Action:
    """Train the parameter; a packed one is refused."""
    return Action(lambda *place: _train([Site(*place)[5:]]))


@recorded
def pa_freeze() -> Action:
    """Freeze the parameter."""
    return Action(lambda *place: setattr(Site(*place).parameter, "requires_grad", False))


@recorded
def ma_replace(replacement: nn.Module | Callable[[nn.Module], nn.Module]) -> Action:
    """Replace the module by another one, whose own ``requires_grad`` flags apply.

    Args:
        replacement: the new module, copied for each place, or a function that makes it from the old
            one.
    """
    if not callable(replacement):  # a module is callable
        raise TypeError(f"the replacement is {replacement!r}, expected a module or a function")

    def make(old: nn.Module) -> nn.Module:
        if isinstance(replacement, nn.Module):
            return copy.deepcopy(replacement)
        return replacement(old)

    def act(*place: Any) -> None:
        site = Site(*place)
        put_in_place(site, make(site.module))

    return Action(act)


@recorded
def ma_replace_head(num_classes: int) -> Action:
    """Replace a linear layer or 1x1 convolution by a new one with that many outputs.

    The network's attribute ``num_classes`` or ``num_labels`` is updated, if it has one (timm,
    transformers).

    Raises:
        ValueError: if the module is not such a layer, or `num_classes` is below 1.
    """
    return replacing_head(num_classes, new_head)


def replacing_head(num_classes: int, make: Callable[[nn.Module, int], nn.Module]) -> Action:
    """Return the action that replaces a layer by what `make` returns for it and `num_classes`."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}, expected an integer of at least 1")

    def prepare(network: nn.Module) -> Callable[..., None]:
        def act(*place: Any) -> None:
            site = Site(*place)
            head = make(site.module, num_classes)
            put_in_place(site, head)
            forget_classes(network)
            for module in network.modules():
                if head in module.modules():
                    tell_number_of_classes(module, num_classes)

        return act

    return Action(prepare=prepare)


def put_in_place(site: Site, new: nn.Module) -> None:
    """Put a module in the place of the one at `site`, in the same mode."""
    what = site.class_name
    if site.parent is None:
        raise ValueError(f"the network itself ({what}) cannot be replaced: it has no parent")
    if not isinstance(new, nn.Module):
        raise TypeError(f"the replacement of {what} is {new!r}, expected a torch.nn.Module")
    new.train(site.module.training)
    site.parent._modules[site.name] = new


def new_head(old: nn.Module, num_classes: int) -> nn.Module:
    """Return a layer like `old`, a linear layer or 1x1 convolution, with that many outputs.

    Raises:
        ValueError: if `old` is not such a layer.
    """
    if isinstance(old, LazyModuleMixin):
        raise ValueError("a lazy layer does not know its inputs yet: run a batch through it first")
    weight = next(nn.Module.parameters(old), None)
    like: dict[str, Any] = (
        {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
    )
    row = row_of(type(old))
    is_1x1 = getattr(old, "kernel_size", (1, 1)) == (1, 1) and getattr(old, "groups", 1) == 1
    if row is not None and row.like is not None and is_1x1:
        return row.like(old, num_classes, **like)
    name = plain_class(type(old)).__name__
    raise ValueError(
        f"{name} is not a head that gift can replace, expected nn.Linear "
        "or a 1x1 nn.Conv2d: name the right layer, or use ma_replace"
    )


CLASS_COUNTS = ("num_classes", "num_labels")
"""Attributes of networks that hold the number of classes (timm, transformers)."""


def tell_number_of_classes(module: nn.Module, num_classes: int) -> None:
    """Update the attributes and the config of a module that hold its number of classes."""
    for name in CLASS_COUNTS:
        if isinstance(vars(module).get(name), int):
            setattr(module, name, num_classes)
    config: Any = vars(module).get("config")
    if hasattr(config, "num_labels"):
        # A copy, so that restoring the module restores its own configuration.
        config = vars(module)["config"] = copy.deepcopy(config)
        config.num_labels = num_classes
        if getattr(config, "problem_type", None) != "multi_label_classification":
            config.problem_type = None  # transformers infers it again from the number of labels
