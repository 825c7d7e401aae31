"""The description of a fine-tuned network as plain data, from which its deltas can be recreated."""

from typing import Any

from torch import nn

from gift.core.delta import Delta, added_names
from gift.core.dynamic_class import joined, plain_class, spec_of
from gift.core.forwards import ForwardDelta
from gift.core.io_spec import IO_SPEC
from gift.core.record import record_of
from gift.core.stack import levels_of
from gift.core.trained import trained_of_the_base
from gift.core.undo.undo import ModuleUndo
from gift.core.weights.record import WeightDelta
from gift.engine.dry_run import on_meta
from gift.factories.actions import CLASS_COUNTS, new_head
from gift.strategies.resolved import ResolvedStrategy, group_of


def describe_deltas(network: nn.Module, of_base: bool = False) -> list[dict[str, Any]]:
    """Describe the deltas in `network`: what each method with its settings changes.

    A tied tensor is not listed, because its delta is listed with the tensor that owns it.

    Args:
        network: the network.
        of_base: describe those that belong to the base of the present strategy, not its own.
    """
    groups: dict[str, dict[str, Any]] = {}
    for path, module in network.named_modules():
        for key, delta in levels_of(module, of_base):
            if (described := _describe(delta, path, key)) is not None:
                group, kind, name, shape = described
                groups.setdefault(repr(group), group).setdefault(kind, {})[name] = shape
    return list(groups.values())


def _describe(
    delta: Delta, path: str, key: str
) -> tuple[dict[str, Any], str, str, list[int] | None] | None:
    """Return the group of a delta, its kind in the group, and the name and shape of its tensor."""
    if isinstance(delta, ForwardDelta):
        method = delta.method
        return {"call": type(method).__name__, "settings": method.settings}, "modules", path, None
    assert isinstance(delta, WeightDelta)
    if delta.owner is not None and not delta.bias_of:
        return None
    shape = None if delta.layout is None else list(delta.layout.matrix)
    group = group_of(delta.method, delta.options)
    return group, "biases" if delta.bias_of else "tensors", joined(path, key), shape


def names_regex(config: Any) -> bool:
    """Whether the plain data of a strategy contain regular expressions.

    Python's regular expressions can take exponential time on a short name, so none is accepted
    from a file.
    """
    if isinstance(config, dict):
        return bool(config.get("regex")) or any(map(names_regex, config.values()))
    return isinstance(config, list) and any(map(names_regex, config))


def resolve(network: Any) -> ResolvedStrategy:
    """Return the strategy of a fine-tuned network, without lambdas.

    Raises:
        ValueError: if an action made a change that only code can repeat.
    """
    record = record_of(network)
    paths = {id(module): path for path, module in network.named_modules()}
    heads: dict[str, int] = {}
    foreign: list[str] = []
    for undo in record.undo.modules:
        path = paths.get(id(undo.module))
        if path is not None:
            _read_changes(undo, path, heads, foreign)
    if foreign:
        raise ValueError("; ".join(foreign))
    trained = [
        name
        for name, _ in trained_of_the_base(network)
        if not any(name.startswith(f"{head}.") for head in heads)
    ]
    still = [path for path, module in network.named_modules() if spec_of(module).statistics]
    return ResolvedStrategy(describe_deltas(network), trained, still, heads)


# Attributes that a new head changes because they hold the number of classes, and the training
# mode.
_DESCRIBED = {*CLASS_COUNTS, IO_SPEC, "config", "training"}


def _read_changes(undo: ModuleUndo, path: str, heads: dict[str, int], foreign: list[str]) -> None:
    """Collect what actions did to a module: new heads, and changes that cannot be described."""
    where, module = path or "the network", undo.module
    if undo.plain is not None:
        foreign.append(f"{where} was given another class")
    changed = set(undo.attributes) - _DESCRIBED
    for key, entries in undo.entries.items():
        if key != "_modules" and not all(_is_own(vars(module)[key].get(name)) for name in entries):
            changed.add(key)
    for key, content in undo.contents.items():
        if isinstance(content, list) or (content ^ vars(module)[key]) - {*added_names(module)}:
            changed.add(key)
    if changed:
        foreign.append(f"{where} was given other {sorted(changed)}")
    for name, old in undo.entries.get("_modules", {}).items():
        new = module._modules.get(name)
        classes = _classes(old, new)
        if classes is None:
            kind = type(new).__name__
            foreign.append(f"{joined(path, name)} was replaced by a {kind} of its own")
        else:
            heads[joined(path, name)] = classes


def _is_own(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("gift.")


def _classes(old: Any, new: Any) -> int | None:
    """Return the classes of a head that `ma_replace_head` could have created, else None."""
    classes = getattr(new, "out_features", getattr(new, "out_channels", None))
    if not isinstance(old, nn.Module) or not isinstance(classes, int):
        return None
    try:
        same = new_head(on_meta(old), classes)  # the meta device draws no random numbers
    except ValueError:
        return None
    return classes if _looks(new) == _looks(same) else None


def _looks(head: Any) -> Any:
    """Return everything that defines a head, except its values and its deltas."""
    own = {name: p for name, p in head.named_parameters() if name not in added_names(head)}
    parameters = {name: (p.shape, p.dtype, p.requires_grad) for name, p in own.items()}
    return plain_class(type(head)), head.extra_repr(), parameters
