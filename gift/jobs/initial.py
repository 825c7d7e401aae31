"""A first job file: every setting with its default and its description."""

import re
import textwrap
from collections.abc import Iterator
from inspect import Parameter
from typing import Any

from gift.errors import JobError, refuse
from gift.jobs.documented import described_arguments, first_sentence, parameters_of
from gift.jobs.errors import hint
from gift.jobs.kinds import KINDS, DataKind
from gift.jobs.models import Data, Job, Network, Resources, ScheduleSection, Strategy
from gift.support.recipes import REGISTRY
from gift.support.yaml_files import dump
from gift.training.settings import Settings

_WIDTH = 100


def init_text(kind: str = "class_folders", strategy: str = "RecommendedFineTuningStrategy") -> str:
    """Return a job as YAML, ready to edit and run: each setting with its default and description.

    Args:
        kind: kind of the examples, one of `gift.jobs.KINDS`.
        strategy: name of the strategy.

    Raises:
        JobError: if there is no such kind or strategy.
    """
    problems = [
        f"there is no {what} {name!r}, {hint(name, known)}"
        for what, name, known in (
            ("kind", kind, [*KINDS]), ("strategy", strategy, Strategy.known())
        )
        if name not in known
    ]  # fmt: skip
    refuse(JobError, "there is no such job to begin with", problems)
    return "\n".join(_lines(KINDS[kind], strategy)) + "\n"


def _lines(kind: DataKind, strategy: str) -> Iterator[str]:
    about, schedules = described_arguments(Job), ", ".join(ScheduleSection.known())
    yield f"# {first_sentence(Job)}"
    yield "# Run it with: gift finetune job.yaml"
    yield "# Lines that have their default may be left out. Paths are as seen from this file."
    if kind.network is None:
        own = "Such data needs one of your own: gift finetune --network import:MODULE:FUNCTION."
        yield from _heading("network", about, own, value=" null")
    else:
        yield from _heading("network", about)
        values: dict[str, Any] = {"name": kind.network, "weights": "default", "options": {}}
        yield from _settings(values, described_arguments(Network))
    yield from _heading("data", about)
    yield from _data(kind)
    yield from _heading("strategy", about)
    yield from _strategy(strategy)
    yield from _heading("schedule", about, f"There are: {schedules}.", value=" null")
    yield from _heading("training", about)
    yield from _settings(parameters_of(Settings), described_arguments(Settings))
    yield from _heading("resources", about)
    yield from _settings(Resources().model_dump(), described_arguments(Resources))
    yield ""
    yield from _settings({"teacher": None}, about, indent="")
    yield from _settings({"folder": Job.model_fields["folder"].default}, about, indent="")


def _data(kind: DataKind) -> Iterator[str]:
    about = described_arguments(Data)
    yield from _settings(
        {"kind": kind.name}, about | {"kind": f"functions of gift.data: {', '.join(KINDS)}."}
    )
    given = {kind.place} if kind.place else {*kind.train}
    options = {
        name: kind.options.get(name) if default is Parameter.empty else default
        for name, default in kind.arguments().items()
        if name not in given and (name in kind.options or default is not Parameter.empty)
    }
    yield f"  options:{'' if options else ' {}'}  # {_as_yaml(about['options'])}"
    yield from _settings(options, kind.described(), indent="    ")
    settings = ", ".join(kind.reader_settings())
    more = {"reader": f"{about['reader']} There are: {settings or 'none'}."}
    yield from _settings({"reader": {}}, more)
    places = {"train": kind.train, "valid": kind.valid, "old": None, "valid_share": None}
    yield from _settings(places, about)


def _strategy(name: str) -> Iterator[str]:
    about, maker = described_arguments(Strategy), REGISTRY[name]
    yield from _settings({"name": name}, {"name": first_sentence(maker)})
    method = getattr(maker, "method", None)  # the strategy takes its settings
    meaning = described_arguments(method) | described_arguments(maker)
    taken = parameters_of(maker)
    paras = {n: value for n, value in taken.items() if value is not Parameter.empty}
    yield f"  init_paras:{'' if paras else ' {}'}"
    for name in taken.keys() - paras.keys():
        yield f"    # {name} must be given: {meaning.get(name, '')}"[:_WIDTH]
    yield from _settings(paras, meaning, indent="    ")
    yield from _settings({"head": Strategy.model_fields["head"].default}, about)


def _as_yaml(text: str) -> str:
    """Convert values in a description to YAML."""
    for word, value in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{word}\b", value, text)
    return text.removesuffix(".")


def _heading(name: str, about: dict[str, str], more: str = "", value: str = "") -> Iterator[str]:
    yield ""
    text = f"{about[name][0].upper()}{about[name][1:]} {more}".strip()
    yield from textwrap.wrap(_as_yaml(text), _WIDTH, initial_indent="# ", subsequent_indent="# ")
    yield f"{name}:{value}"


def _settings(values: dict[str, Any], about: dict[str, str], indent: str = "  ") -> Iterator[str]:
    """Yield lines with the values; comments are behind them, or above if they are long."""
    for name, value in values.items():
        plain = list(value) if isinstance(value, tuple) else value
        text = dump({name: plain}, width=_WIDTH)
        lines = textwrap.indent(text, indent).splitlines()
        comment = _as_yaml(about.get(name, ""))
        if len(lines) == 1 and len(lines[0]) + len(comment) + 4 <= _WIDTH:
            yield lines[0] + (f"  # {comment}" if comment else "")
        else:
            start = f"{indent}# "
            yield from textwrap.wrap(comment, _WIDTH, initial_indent=start, subsequent_indent=start)
            yield from lines
