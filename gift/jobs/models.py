"""The sections of a job, as pydantic models that validate job files."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from gift.budget.budget import Budget
from gift.errors import some
from gift.jobs.errors import hint, shown
from gift.jobs.kinds import KINDS, anchored
from gift.schedules import Schedule, load_schedule_from_config
from gift.strategies import FineTuningStrategy, load_strategy_from_config
from gift.support.recipes import registered
from gift.training.settings import Settings
from gift.zoo import load_network

T = TypeVar("T")
Filled = Annotated[T, BeforeValidator(lambda value: {} if value is None else value)]
"""A section whose lines may all be omitted."""
Named = Annotated[
    T, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
]
"""A section that may be given by its name alone."""


def _is_location(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ValueError(f"this is {shown(value)}, expected a text, or several by name")
    return value


Location = Annotated[str | dict[str, Any], BeforeValidator(_is_location)]


class Section(BaseModel):
    """A section of a file: unknown settings are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Network(Section):
    """The network to train.

    Args:
        name: "torchvision:", "timm:" or "transformers:" followed by a name, or "transformers:"
            followed by the folder of a model.
        weights: "default" for pretrained weights, a file with the state of the network, or null
            for random weights.
        options: further keyword arguments for creating the network.
    """

    name: str
    weights: str | None = "default"
    options: Filled[dict[str, Any]] = {}

    @field_validator("name")
    @classmethod
    def _no_code(cls, name: str) -> str:
        if name.startswith("import:"):
            raise ValueError(
                "a file may not name code to import: give the network on the command line, "
                f"--network {name}, or in code, run_job(job, network=...)"
            )
        return name

    @field_validator("options")
    @classmethod
    def _only_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        own = [name for name in options if name in inspect.signature(load_network).parameters]
        if own:
            raise ValueError(f"{some(own)}: this is not an option of a network")
        return options

    def anchored(self, base: Path) -> Self:
        """Return the section with paths resolved from a folder."""
        library, _, model = self.name.partition(":")
        name = self.name
        if library == "transformers":  # only its names may be folders
            name = f"{library}:{anchored(model, base, always=False)}"
        weights = self.weights
        if weights not in (None, "default"):
            # Names of torchvision weights have no dot, file names do.
            weights = anchored(str(weights), base, always="." in str(weights))
        return self.model_copy(update={"name": name, "weights": weights})


class Data(Section):
    """The examples.

    Args:
        kind: how they are stored; a function of gift.data.
        options: further keyword arguments of the function.
        reader: settings for reading inputs that differ from those of the network, such as size for
            images or max_length for texts.
        train: place of the training examples; several keywords on separate lines override options.
        valid: place of the validation examples, or null for none.
        old: place of the examples of a task that the network already knows, to report forgetting,
            or null for none.
        valid_share: share of the training examples to hold out for validation if valid is null.
    """

    kind: str
    options: Filled[dict[str, Any]] = {}
    reader: Filled[dict[str, Any]] = {}
    train: Location
    valid: Location | None = None
    old: Location | None = None
    valid_share: float | None = Field(None, gt=0, lt=1)

    @property
    def task(self) -> str:
        """The task of the examples."""
        return str(self.options.get("task") or KINDS[self.kind].task)

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}, {hint(kind, KINDS)}")
        return kind

    @field_validator("options")
    @classmethod
    def _options_exist(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        kind = KINDS.get(info.data.get("kind", ""))
        return options if kind is None else kind.checked(options)

    @field_validator("reader")
    @classmethod
    def _reader_exists(cls, reader: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        kind = KINDS.get(info.data.get("kind", ""))
        return reader if kind is None else kind.checked_reader(reader)

    @field_validator("train", "valid", "old")
    @classmethod
    def _place_is_whole(cls, place: Any, info: ValidationInfo) -> Any:
        kind = KINDS.get(info.data.get("kind", ""))
        if kind is not None and place is not None and "options" in info.data:
            own = kind.checked(kind.keywords(place))
            kind.refuse_missing(info.data["options"] | own)
            return own
        return place

    @field_validator("valid_share")
    @classmethod
    def _one_of_both(cls, share: float | None, info: ValidationInfo) -> float | None:
        if share is not None and info.data.get("valid") is not None:
            raise ValueError("there are validation examples in valid: leave one of both out")
        return share

    def anchored(self, base: Path) -> Self:
        """Return the section with paths resolved from a folder."""
        kind = KINDS[self.kind]
        places = {
            name: kind.anchored(kind.keywords(place), base)
            for name in ("train", "valid", "old")
            if (place := getattr(self, name)) is not None
        }
        reader = dict(self.reader)
        if isinstance(reader.get("tokenizer"), str):
            reader["tokenizer"] = anchored(reader["tokenizer"], base, always=False)
        found = {"options": kind.anchored(self.options, base), "reader": reader, **places}
        return self.model_copy(update=found)


class _Registered(Section):
    """A registered object that a file can name, with its arguments."""

    name: str
    init_paras: Annotated[Filled[dict[str, Any]], Field(validate_default=True)] = {}

    @classmethod
    def known(cls) -> list[str]:
        """Return the known names."""
        raise NotImplementedError

    @classmethod
    def load(cls, config: dict[str, Any]) -> Any:
        """Create an object from its name and arguments."""
        raise NotImplementedError

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in cls.known():
            raise ValueError(f"there is no {name!r}, {hint(name, cls.known())}")
        return name

    @field_validator("init_paras")
    @classmethod
    def _fit(cls, init_paras: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "name" in info.data:
            try:
                cls.load({"name": info.data["name"], "init_paras": init_paras})
            except TypeError as error:
                raise ValueError(f"this does not fit {info.data['name']}: {error}") from error
        return init_paras

    def made(self) -> Any:
        """Create the object."""
        return self.load({"name": self.name, "init_paras": self.init_paras})


class Strategy(_Registered):
    """What is trained in the network.

    Args:
        name: name of a strategy.
        init_paras: arguments of the strategy.
        head: "new" replaces the last layer by a new one for the classes of the examples, "keep"
            keeps it, "auto" keeps it only if it is for the same classes.
    """

    name: str = "RecommendedFineTuningStrategy"
    head: Literal["auto", "new", "keep"] = "auto"

    @classmethod
    def known(cls) -> list[str]:
        """Return the strategies that a file can name."""
        return [name for name, made in registered(FineTuningStrategy).items() if not made.dry_run]

    @classmethod
    def load(cls, config: dict[str, Any]) -> FineTuningStrategy:
        """Create the strategy."""
        return load_strategy_from_config(config)


class ScheduleSection(_Registered):
    """When the parts of the network are unfrozen.

    Args:
        name: name of a schedule.
        init_paras: arguments of the schedule.
    """

    @classmethod
    def known(cls) -> list[str]:
        """Return the schedules that a file can name."""
        return list(registered(Schedule))

    @classmethod
    def load(cls, config: dict[str, Any]) -> Any:
        """Create the schedule."""
        return load_schedule_from_config(config)


class Resources(Section):
    """What a run takes of a cluster; `gift finetune` ignores it.

    Args:
        gpus: number of GPUs.
        cpus: number of processors.
        memory: memory, such as 16GB; null leaves that to the cluster.
        hours: time limit; a run that reaches it is queued again. Null is that of the cluster.
        processes: number of processes that train together, on one machine.
    """

    gpus: int = Field(default=0, ge=0)
    cpus: int = Field(default=1, ge=1)
    memory: str | None = None
    hours: float | None = Field(default=None, gt=0)
    processes: int = Field(default=1, ge=1)

    @field_validator("memory")
    @classmethod
    def _is_size(cls, memory: str | None) -> str | None:
        try:
            is_size = memory is None or Budget.of(memory, 0).in_bytes
        except ValueError:
            is_size = False
        if not is_size:
            raise ValueError(f"this is {shown(memory)}, expected a size such as 16GB")
        return memory

    @property
    def megabytes(self) -> int | None:
        """The memory in millions of bytes."""
        return None if self.memory is None else Budget.of(self.memory, 0).limit // 10**6


class Job(Section):
    """A job of gift: which network is trained on which examples, and how.

    Args:
        network: the network to train; null if it is given in code.
        data: the examples.
        strategy: what is trained in the network.
        schedule: when the parts of the network are unfrozen; null for no schedule.
        training: settings of the training.
        teacher: the folder of a run whose network teaches (distillation), or a network as in
            network; null for none.
        resources: what the run takes of a cluster, see gift submit.
        folder: folder for all files of the run; a later call resumes from its checkpoint.
    """

    network: Network | None = None
    data: Data
    strategy: Filled[Named[Strategy]] = Strategy()
    schedule: Named[ScheduleSection] | None = None
    training: Filled[Settings] = Settings()
    teacher: str | Network | None = None
    resources: Filled[Resources] = Resources()
    folder: str = "run"

    @field_validator("training")
    @classmethod
    def _no_code(cls, training: Settings) -> Settings:
        made = [f.name for f in fields(training) if callable(getattr(training, f.name))]
        if made:
            raise ValueError(f"{some(made)}: what only code can give has no place in a job")
        return training

    def anchored(self, base: str | Path) -> Self:
        """Return the job with paths resolved from a folder."""
        base = Path(base).expanduser().resolve()
        network = None if self.network is None else self.network.anchored(base)
        found: dict[str, Any] = {
            "data": self.data.anchored(base),
            "folder": anchored(self.folder, base),
        }
        if isinstance(self.teacher, str):
            found["teacher"] = anchored(self.teacher, base)
        elif self.teacher is not None:
            found["teacher"] = self.teacher.anchored(base)
        return self.model_copy(update={"network": network, **found})

    def to_config(self) -> dict[str, Any]:
        """Return the job as plain data, with every setting."""
        return self.model_dump(mode="json")
