"""What a search may vary: ranges, choices and conditions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gift.errors import closest
from gift.jobs.errors import hint, shown
from gift.jobs.models import Job
from gift.many.variants import METHOD, RANK, TARGETS, place_of, size_setting, varied

_RANGE = ("low", "high", "log", "step", "when")
_CHOICES = ("choices", "when")


@dataclass(frozen=True)
class Parameter:
    """One setting that varies.

    Args:
        name: its name, see `gift.many.variants.place_of`.
        choices: the values, if they are listed.
        low, high: the range, both ends included; whole numbers if both are.
        log: whether the logarithm is what varies evenly.
        step: distance between values; None allows all.
        when: the values of other settings for which this one matters.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def matters(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the conditions hold for settings chosen so far."""
        return all(settings.get(name) in values for name, values in self.when.items())

    def suggested(self, trial: Any) -> Any:
        """Return the value that Optuna chooses for a trial."""
        if self.choices:
            # Optuna stores texts, numbers and None.
            labels = {_label(choice): choice for choice in self.choices}
            return labels[trial.suggest_categorical(self.name, list(labels))]
        if isinstance(self.low, int) and isinstance(self.high, int):
            step = int(self.step or 1)
            return trial.suggest_int(self.name, self.low, self.high, step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)


def space_of(vary: Mapping[str, Any]) -> list[Parameter]:
    """Return the parameters of the section ``vary`` of a search, in the order of their choice.

    Args:
        vary: for each setting a list of values; ``{choices: [...]}``; or ``{low: 1, high: 64,
            log: true, step: null}``. The last two may have conditions, ``when: {method: lora}``.

    Raises:
        ValueError: naming everything that is wrong.

    Example:
        >>> lr, rank = space_of({"lr": {"low": 1e-5, "high": 0.1, "log": True}, "rank": [4, 8]})
        >>> lr.log, rank.choices
        (True, (4, 8))
    """
    problems: list[str] = []
    first = [name for name in (METHOD, TARGETS) if name in vary]
    names = [*first, *(str(name) for name in vary if name not in first)]
    found = []
    for number, name in enumerate(names):
        try:
            place_of(name)
            found.append(_parameter(name, vary[name], names[:number], names))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    places: dict[tuple[str, ...], str] = {}
    for parameter in found:
        other = places.setdefault(place_of(parameter.name), parameter.name)
        if other != parameter.name:
            problems.append(f"{parameter.name}: this is the same setting as {other}")
    if problems:
        raise ValueError("; ".join(problems))
    return found


def chosen(space: list[Parameter], trial: Any, job: Job) -> dict[str, Any]:
    """Return the settings that Optuna chooses for a trial; those that do not matter are left out.

    A rank is left out where the method has no size.

    Args:
        space: see `space_of`.
        trial: a trial of Optuna.
        job: the job that is varied.
    """
    settings: dict[str, Any] = {}
    for parameter in space:
        if not parameter.matters(settings):
            continue
        if parameter.name == RANK and not _has_size(job, settings):
            continue
        settings[parameter.name] = parameter.suggested(trial)
    return settings


def largest(space: list[Parameter], name: str, default: Any) -> Any:
    """Return the largest value that a setting may have."""
    for parameter in space:
        if place_of(parameter.name) == place_of(name):
            return max(parameter.choices) if parameter.choices else parameter.high
    return default


def _has_size(job: Job, settings: Mapping[str, Any]) -> bool:
    of_strategy = {k: v for k, v in settings.items() if k in (METHOD, TARGETS, "strategy")}
    return size_setting(varied(job, of_strategy)) is not None


def _parameter(name: str, given: Any, before: list[str], names: list[str]) -> Parameter:
    if isinstance(given, list | tuple):
        given = {"choices": list(given)}
    if not isinstance(given, dict):
        raise ValueError(f"this is {shown(given)}, expected a list of values, or low and high")
    known = _CHOICES if "choices" in given else _RANGE
    if unknown := [key for key in given if key not in known]:
        near = closest(unknown[0], known)
        raise ValueError(f"there is no {unknown[0]!r} here, {hint(unknown[0], near or known)}")
    when = _conditions(given.get("when") or {}, before, names)
    if "choices" in given:
        choices = given["choices"]
        if not isinstance(choices, list | tuple) or not choices:
            raise ValueError(f"choices: this is {shown(choices)}, expected a list of values")
        if len({_label(choice) for choice in choices}) < len(choices):
            raise ValueError("choices: a value is listed twice")
        return Parameter(name, tuple(choices), when=when)
    return _range(name, given, when)


def _range(name: str, given: dict[str, Any], when: Mapping[str, tuple[Any, ...]]) -> Parameter:
    low, high, step, log = (given.get(key) for key in ("low", "high", "step", "log"))
    numbers = {key: given.get(key) for key in ("low", "high")}
    if step is not None:
        numbers["step"] = step
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key}: this is {shown(value)}, expected a number")
    if low > high:  # type: ignore[operator]  # numbers, as checked above
        raise ValueError(f"low is {low}, which is above high, {high}")
    if log not in (None, True, False):
        raise ValueError(f"log: this is {shown(log)}, expected true or false")
    if log and (low <= 0 or step is not None):  # type: ignore[operator]
        raise ValueError("log needs a low above 0, and no step")
    if step is not None and step <= 0:
        raise ValueError(f"step is {step}, expected a number above 0")
    return Parameter(name, (), low, high, bool(log), step, when)  # type: ignore[arg-type]


def _conditions(given: Any, before: list[str], names: list[str]) -> dict[str, tuple[Any, ...]]:
    if not isinstance(given, dict):
        raise ValueError(f"when: this is {shown(given)}, expected settings and their values")
    for name in given:
        if name not in names:
            raise ValueError(f"when: {name!r} does not vary, {hint(name, before or names)}")
        if name not in before:
            raise ValueError(f"when: {name!r} must stand above")
    return {k: tuple(v) if isinstance(v, list | tuple) else (v,) for k, v in given.items()}


def _label(choice: Any) -> Any:
    plain = choice is None or isinstance(choice, str | int | float)
    return choice if plain else json.dumps(choice, sort_keys=True)
