"""Jobs that differ from a first one in some settings, and the names of what may differ."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gift.errors import JobError, YamlError, refuse
from gift.jobs.errors import hint
from gift.jobs.models import Job
from gift.jobs.reading import checked, put, read_yaml
from gift.methods import METHODS, Method
from gift.strategies import STRATEGIES
from gift.support import yaml_files
from gift.training.settings import Settings
from gift.utils.info import WITHOUT_METHOD

METHOD, TARGETS, RANK, BUDGET = "method", "targets", "rank", "budget"
SHORT = {
    METHOD: "a method by its name; also bottleneck, loreft, prompt, p_tuning, "
    "prefix, visual_prompt, bitfit, norm, full and head",
    TARGETS: "the layers that it adapts: all, linear or conv",
    RANK: "the rank, or the other setting that gives a method its size",
    BUDGET: "sizes chosen by gift.suggest: a number of parameters, a share, or megabytes",
}
"""Names that stand for no single setting of a job."""

_TARGETS = ("all", "linear", "conv")
_HEAD = "head"


def place_of(name: str) -> tuple[str, ...]:
    """Return the place of a setting in a job; a name of `SHORT` is its own place.

    Args:
        name: dotted path, ``training.lr``; the name of a setting of the training, ``lr``; or a
            name of `SHORT`.

    Raises:
        ValueError: if there is no such setting.

    Example:
        >>> place_of("lr"), place_of("strategy.init_paras.lora_alpha"), place_of("rank")
        (('training', 'lr'), ('strategy', 'init_paras', 'lora_alpha'), ('rank',))
    """
    place = tuple(str(name).split("."))
    settings = [field.name for field in fields(Settings)]
    sections = [section for section in Job.model_fields if section != "folder"]
    if len(place) == 1 and name in settings:
        return ("training", name)
    if len(place) == 1 and name in (*SHORT, "schedule", "strategy"):
        return place
    if len(place) > 1 and place[0] == "training" and place[1] in settings:
        return place
    if len(place) > 1 and place[0] in sections and place[0] != "training" and all(place):
        return place
    known = [*SHORT, "schedule", "strategy", *settings, *(f"training.{s}" for s in settings)]
    raise ValueError(f"there is no setting {name!r}, {hint(name, known)}")


def method_names() -> list[str]:
    """Return the names of methods that `varied` knows."""
    return [*METHODS, *WITHOUT_METHOD, _HEAD]


def varied(job: Job, settings: Mapping[str, Any]) -> Job:
    """Return a job with other settings; `BUDGET` is left to `gift.many.costs.Costs`.

    Args:
        job: the job.
        settings: values by the names that `place_of` knows. A rank is ignored where the method has
            no size.

    Raises:
        JobError: naming every setting that does not exist or does not fit.
    """
    problems, config = [], copy.deepcopy(job.to_config())
    places = {}
    for name in settings:
        try:
            places[name] = place_of(name)
        except ValueError as error:
            problems.append(str(error))
    refuse(JobError, "the job cannot be varied", problems)
    short = {name: value for name, value in settings.items() if name in SHORT}
    whole = [name for name in places if len(places[name]) == 1 and name not in SHORT]
    for name in whole:
        config[name] = settings[name]
    if METHOD in short or TARGETS in short:
        config["strategy"] = _strategy(config["strategy"], short.get(METHOD), short.get(TARGETS))
    for name, place in places.items():
        if len(place) > 1:
            put(config, place, settings[name])
    made = checked(Job, config, f"the job with {in_words(settings)}")
    if RANK in short and (setting := size_setting(made)) is not None:
        put(config, ("strategy", "init_paras", setting), short[RANK])
        made = checked(Job, config, f"the job with {in_words(settings)}")
    return made


def in_words(settings: Mapping[str, Any]) -> str:
    """Format settings on one line.

    >>> in_words({"method": "lora", "lr": 0.001})
    'method lora, lr 0.001'
    """

    def one(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {one(value)}" for name, value in settings.items()) or "no changes"


def method_of_job(job: Job) -> type[Method] | None:
    """Return the method of the job's strategy, if it is one of those that are made from methods."""
    return getattr(STRATEGIES.get(job.strategy.name), "method", None)


def size_setting(job: Job) -> str | None:
    """Return the setting that gives the method of a job its size; None if it has none."""
    method = method_of_job(job)
    return None if method is None else method.size_setting


def _strategy(before: Any, method: Any, targets: Any) -> dict[str, Any]:
    """Return the strategy section of a method; of the earlier one what still fits it is kept."""
    before = {"name": before} if isinstance(before, str) else dict(before or {})
    own = getattr(STRATEGIES.get(before.get("name", "")), "method", None)
    head = before.get("head", "auto")
    if method is None:
        if own is None:
            problem = f"targets: {before.get('name')} has none, name a method too"
            raise JobError("the job cannot be varied", [problem])
        method = own.name
    if method not in METHODS:
        return _without_method(str(method), head)
    before_targets = str(before.get("name", "")).removesuffix("FineTuningStrategy")
    if targets is None:
        endings = [t for t in _TARGETS if own and before_targets.endswith(t.capitalize())]
        targets = endings[0] if endings else "all"
    if targets not in _TARGETS:
        problem = f"targets: this is {targets!r}, expected one of {_TARGETS}"
        raise JobError("the job cannot be varied", [problem])
    prefix = METHODS[method].strategy_prefix
    name = f"{prefix}{str(targets).capitalize()}FineTuningStrategy"
    paras = before.get("init_paras", {}) if own is METHODS[method] else {}
    if name != before.get("name"):
        paras = {key: value for key, value in paras.items() if key != "experts"}
    return {"name": name, "init_paras": dict(paras), "head": head}


def _without_method(name: str, head: str) -> dict[str, Any]:
    """Return the strategy section of a name that is not a method: another name, or a file."""
    if name == _HEAD:
        # a strategy without caps: what is trained is the new head that is put before it
        return {"name": "FineTuningStrategy", "init_paras": {}, "head": "new"}
    if name in WITHOUT_METHOD:
        return {"name": WITHOUT_METHOD[name].__name__, "init_paras": {}, "head": head}
    if name.endswith((".yaml", ".yml")):
        data, _ = read_yaml(Path(name).expanduser())
        return {"head": head} | dict(data)
    known = [one for one in STRATEGIES if one == name]
    if known or name.endswith("Strategy"):  # an unknown one is an error of the job
        return {"name": name, "init_paras": {}, "head": head}
    raise JobError(
        "the job cannot be varied", [f"there is no method {name!r}, {hint(name, method_names())}"]
    )


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Parse a variant that is given as a text.

    Args:
        text: a method, and settings behind it: ``lora:rank=8:lr=1e-3``.

    Returns:
        The text, which names the variant, and its settings.

    Example:
        >>> parsed("lora:rank=8")
        ('lora:rank=8', {'method': 'lora', 'rank': 8})
    """
    method, *rest = re.split(r":(?=[\w.]+=)", text)  # not at a colon in a value
    settings: dict[str, Any] = {}
    problems = []
    if ":" in method:
        method, _, wrong = method.partition(":")
        problems.append(f"{wrong!r} is not NAME=VALUE")
    settings[METHOD] = method.strip()
    for part in rest:
        name, _, value = part.partition("=")
        try:
            settings[name.strip()] = yaml_files.load(value)[0]
        except YamlError as error:
            problems += error.problems
    refuse(JobError, f"{text!r} is not a method with settings", problems)
    return text.strip(), settings


def split_list(texts: Iterable[str]) -> list[str]:
    """Split texts at commas, but not in brackets: ``["lora,dora", "ia3"]`` gives three."""
    parts = (part for text in texts for part in re.split(r",(?![^{\[]*[}\]])", text))
    return [part.strip() for part in parts if part.strip()]
