"""The folder of a run, opened again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gift.core.io_spec import IOSpec, set_io_spec
from gift.data import Examples, reader_from_config
from gift.errors import JobError
from gift.files import load
from gift.jobs.examples import job_examples, read_examples
from gift.jobs.kinds import KINDS
from gift.jobs.models import Job
from gift.jobs.networks import job_network
from gift.jobs.reading import checked, read_yaml
from gift.training import evaluate
from gift.training.checkpoint import DELTAS
from gift.training.predicting import predict

JOB, INPUTS = "job.yaml", "inputs.json"


class Run:
    """The folder that `run_job` filled: the network that it made, ready to be used.

    Args:
        folder: of the run.
        network: the plain network, where the job names none: a module, or what
            `gift.zoo.load_network` gives.

    Raises:
        FileNotFoundError: if there is no such folder, or no run in it.
        JobError: if its files make no sense.
    """

    def __init__(self, folder: str | Path, network: Any = None) -> None:
        self.folder = Path(folder).expanduser()
        missing = [name for name in (JOB, INPUTS) if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.folder} is no folder of a run, it has no {missing[0]}")
        data, lines = read_yaml(self.folder / JOB)
        self.job = checked(Job, data, str(self.folder / JOB), lines)
        self.task, self.classes, self._reader = _read_inputs(self.folder / INPUTS)
        self.base = network

    @property
    def reader(self) -> Any:
        """What reads inputs for the network."""
        return reader_from_config(self._reader, self.folder)

    def delta(self, which: str | Path | None = None) -> Path:
        """The file of a delta of the run.

        Args:
            which: "best", "last" or a file; None is what the job keeps, if there is a best one.

        Raises:
            FileNotFoundError: if the run has not got so far.
        """
        if which is not None and which not in DELTAS:
            return Path(which)
        wanted = which or self.job.training.keep
        names = [wanted] if which else [wanted, *DELTAS]
        found = [self.folder / DELTAS[name] for name in names]
        for path in found:
            if path.is_file():
                return path
        raise FileNotFoundError(f"{self.folder} has no {found[0].name} yet: finish the run first")

    def network(self, which: str | Path | None = None) -> nn.Module:
        """The network as it was trained, in evaluation mode, ready for `gift.training.predict`.

        Args:
            which: see `delta`.

        Raises:
            DeltaFileError: if the network that the job names is not the one that was trained.
        """
        path = self.delta(which)  # before a large network is made
        net = job_network(self.job, self.base).net
        load(net, path)
        set_io_spec(net, self.reader, self.classes, self.task)
        return net.eval()

    def examples(self, place: Any = None) -> Examples:
        """Examples as those of the job.

        Args:
            place: where they are, as ``data.valid`` says it; None is just that.

        Raises:
            JobError: if the job has none to validate on, or the place is none of its kind.
        """
        place = self.job.data.valid if place is None else place
        if place is None and self.job.data.valid_share is not None:
            held_out = job_examples(self.job.data, self.reader, self.job.training.seed or 0)[1]
            assert held_out is not None
            return held_out
        if place is None:
            raise JobError(
                "the job has no validation examples", ["say where there are some: --data, place="]
            )
        kind, options = KINDS[self.job.data.kind], self.job.data.options
        try:
            own = kind.checked(kind.keywords(place))
            kind.refuse_missing(options | own)
        except ValueError as error:
            raise JobError(f"{place} says not where examples are", [str(error)]) from error
        return read_examples(self.job.data, own, self.reader, self.classes)

    def evaluate(
        self, place: Any = None, which: str | Path | None = None, device: str | None = None
    ) -> dict[str, float]:
        """Loss and metrics on examples.

        Args:
            place: see `examples`.
            which: see `delta`.
            device: None is that of the job.
        """
        settings, examples = self.job.training, self.examples(place)
        return evaluate(
            self.network(which), examples, metrics=settings.metrics,
            batch_size=settings.batch_size, device=device or settings.device,
        )  # fmt: skip

    def predict(
        self,
        inputs: Sequence[Any],
        top: int = 1,
        which: str | Path | None = None,
        device: str | None = None,
    ) -> list[Any]:
        """Predictions for pictures or texts, see `gift.training.predict`.

        Args:
            inputs: files, pictures or texts.
            top: how many classes are told.
            which: see `delta`.
            device: None is that of the job.
        """
        settings = self.job.training
        return predict(
            self.network(which), inputs,
            batch_size=settings.batch_size, top=top, device=device or settings.device,
        )  # fmt: skip


def inputs_text(train: Examples, reader: Any, folder: Path) -> str:
    """What must be known to read more inputs, as JSON; the folder gets what is larger."""
    told = IOSpec(reader, train.classes, train.task or "classification").to_config(folder)
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def _read_inputs(path: Path) -> tuple[str, tuple[str, ...] | None, dict[str, Any]]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        classes = told["classes"]
        return told["task"], None if classes is None else tuple(classes), told["reader"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise JobError(f"{path} cannot be read", [f"{type(error).__name__}: {error}"]) from error
