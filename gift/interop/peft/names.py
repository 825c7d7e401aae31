"""How PEFT matches module names: the meaning of its options, for reading and writing."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
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
    if any(re.match(_anywhere(ending), name) for ending in saved):
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
    tried = (re.match(_before_a_number(pattern), name) for pattern in patterns)
    found = next(filter(None, tried), None)
    wanted = [layers] if isinstance(layers, int) else layers
    return found is not None and int(found[1]) in wanted


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a name or its end: a rank or alpha."""
    for pattern, value in (patterns or {}).items():
        if re.match(_at_the_end(pattern), name):
            return value
    return default


def expressions(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield all regular expressions of a config, as names are matched with them."""
    wholes = ("target_modules", "exclude_modules", "feedforward_modules")
    yield from (config[option] for option in wholes if isinstance(config.get(option), str))
    yield from map(_anywhere, config.get("modules_to_save") or ())
    for option in ("rank_pattern", "alpha_pattern"):
        yield from map(_at_the_end, config.get(option) or ())
    layers = config.get("layers_pattern") or ()
    yield from map(_before_a_number, [layers] if isinstance(layers, str) else layers)


def _anywhere(ending: str) -> str:
    return rf"(^|.*\.){ending}($|\..*)"


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _before_a_number(pattern: str) -> str:
    start = rf"(?:^|.*?\.){pattern}" if pattern else r".*?\.[^.]*"
    return rf"{start}\.(\d+)\."


def exact_pattern(name: str) -> str:
    """Return a pattern that matches that name only, not names that end with it."""
    return "^" + re.escape(name)


def exactly(wanted: Collection[str], names: Iterable[str]) -> Targets:
    """Return `target_modules` for these modules only: a list, or a regex if a list is ambiguous."""
    wanted = sorted(wanted)
    if any(name not in wanted and ends_with(name, wanted) for name in names):
        return "|".join(re.escape(name) for name in wanted)
    return wanted
