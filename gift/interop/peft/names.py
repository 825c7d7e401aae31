"""How PEFT matches module names: the meaning of its options, for reading and writing."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

Targets = str | list[str]

PREFIX = "base_model.model."


def ends_with(name: str, endings: Iterable[str]) -> bool:
    """Whether a dotted name is one of these, or ends with one after a dot."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def kept(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the modules that `modules_to_save` matches: plain endings, even inside a word."""
    endings = tuple(config.get("modules_to_save") or ())
    return [name for name in names if name and endings and name.endswith(endings)]


def targeted(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Return the modules among these names that a config adapts."""
    return {name for name in names if name and _is_target(config, name)}


def _is_target(config: Mapping[str, Any], name: str) -> bool:
    if matches(config.get("exclude_modules") or [], name):
        return False
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){ending}($|\..*)", name) for ending in saved):
        return False
    targets = config.get("target_modules") or []
    if isinstance(targets, str) or name in targets:
        return matches(targets, name)
    return matches(targets, name) and _is_in_layer(config, name)


def matches(targets: Targets, name: str) -> bool:
    """Whether a name matches a regular expression, or a list of names or endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return ends_with(name, targets)


def _is_in_layer(config: Mapping[str, Any], name: str) -> bool:
    """Whether the first number in the name is one of `layers_to_transform`."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [""]
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    starts = [rf"(?:^|.*?\.){pattern}" if pattern else r".*?\.[^.]*" for pattern in patterns]
    found = next(filter(None, (re.match(rf"{start}\.(\d+)\.", name) for start in starts)), None)
    wanted = [layers] if isinstance(layers, int) else layers
    return found is not None and int(found[1]) in wanted


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a name or its end: a rank or alpha."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def exact_pattern(name: str) -> str:
    """Return a pattern that matches that name only, not names that end with it."""
    return "^" + re.escape(name)


def exactly(wanted: Collection[str], names: Iterable[str]) -> Targets:
    """Return `target_modules` for these modules only: a list, or a regex if a list is ambiguous."""
    wanted = sorted(wanted)
    if any(name not in wanted and ends_with(name, wanted) for name in names):
        return "|".join(re.escape(name) for name in wanted)
    return wanted
