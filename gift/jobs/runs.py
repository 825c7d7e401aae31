"""Opening the folder of a run."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from gift.core.io_spec import IOSpec, set_io_spec
from gift.data import Examples, reader_from_config
from gift.errors import JobError, some
from gift.files import load
from gift.jobs.examples import job_examples, read_examples
from gift.jobs.kinds import KINDS
from gift.jobs.models import Job
from gift.jobs.networks import job_network, named_network, remembered_code
from gift.jobs.reading import checked, read_yaml
from gift.training import Result, evaluate
from gift.training.checkpoint import DELTAS
from gift.training.predicting import predict
from gift.training.result import RESULT, read_result

JOB, INPUTS = "job.yaml", "inputs.json"


class Run:
    """A folder that `run_job` wrote, with its trained network, ready for use.

    Args:
        folder: folder of the run.
        network: the plain network, if the job names none: a module, or what
            `gift.zoo.load_network` returns.
        allow_import: whether to run the code that makes the network of this run, if the run was
            started with ``--network import:...``.

    Raises:
        FileNotFoundError: if there is no such folder, or no run in it.
        JobError: if its files are not valid.
    """

    def __init__(self, folder: str | Path, network: Any = None, allow_import: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        missing = [name for name in (JOB, INPUTS) if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder} is not the folder of a run, it has no {missing[0]}"
            )
        data, lines = read_yaml(self.folder / JOB)
        self.job = checked(Job, data, str(self.folder / JOB), lines)
        self._inputs, self._reader = _read_inputs(self.folder / INPUTS)
        self.task, self.classes = self._inputs.task, self._inputs.classes
        self.base = network
        if network is None and allow_import and self.job.network is None:
            code = remembered_code(self.folder, allow_import)
            if code is not None:
                seed = self.job.training.seed or 0
                self.base = named_network(
                    code, "default", self.job.data.task, seed, allow_import=True
                )

    @property
    def result(self) -> Result:
        """The result of the run, without its steps, which are in ``steps.csv``.

        Raises:
            FileNotFoundError: if the run has not ended yet.
        """
        if not (self.folder / RESULT).is_file():
            raise FileNotFoundError(f"{self.folder} has no {RESULT} yet: finish the run first")
        return read_result(self.folder)

    @property
    def reader(self) -> Any:
        """The reader of inputs for the network."""
        return reader_from_config(self._reader, self.folder)

    def delta(self, which: str | Path | None = None) -> Path:
        """Return the path of a delta of the run.

        Args:
            which: "best", "last" or a file; None is the one that the job keeps, or else the one
                that exists.

        Raises:
            FileNotFoundError: if the run has not written it yet.
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
        """Load the trained network, in evaluation mode, ready for `gift.training.predict`.

        Args:
            which: see `delta`.

        Raises:
            DeltaFileError: if the network that the job names is not the one that was trained.
        """
        path = self.delta(which)  # fails before a large network is created
        net = job_network(self.job, self.base).net
        load(net, path)
        set_io_spec(net, self.reader, self.classes, self.task, self._inputs.details)
        return net.eval()

    def examples(self, place: Any = None, classes: Sequence[str] | None = None) -> Examples:
        """Read examples in the same way as those of the job.

        Args:
            place: place of the examples, in the form of ``data.valid``; None uses that.
            classes: what the classes are called there, in the order of those of the run; None if
                they are called the same.

        Raises:
            JobError: if the job has no validation examples, or the place does not fit its kind.
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
            raise JobError(f"{place} does not say where the examples are", [str(error)]) from error
        if classes is not None and len(classes) != len(self.classes or ()):
            problem = (
                f"expected {len(self.classes or ())}, in the order of {some(self.classes or ())}"
            )
            raise JobError(f"there are {len(classes)} names of classes", [problem])
        found = read_examples(
            self.job.data, own, self.reader, self.classes if classes is None else tuple(classes)
        )
        return replace(found, classes=self.classes)

    def evaluate(
        self,
        place: Any = None,
        which: str | Path | None = None,
        device: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Compute loss and metrics on examples.

        Args:
            place: see `examples`.
            which: see `delta`.
            device: None uses the device of the job.
            classes: see `examples`.
        """
        settings, examples = self.job.training, self.examples(place, classes)
        return evaluate(
            self.network(which), examples, metrics=settings.metrics,
            batch_size=settings.batch_size, device=device or settings.device,
        )  # fmt: skip

    def predict(
        self,
        inputs: Sequence[Any],
        top: int | None = None,
        which: str | Path | None = None,
        device: str | None = None,
        **options: Any,
    ) -> list[Any]:
        """Predict for images, sounds, texts or rows of a table, see `gift.training.predict`.

        Args:
            inputs: files, images, sounds, texts or rows.
            top: number of classes, or of objects, to show.
            which: see `delta`.
            device: None uses the device of the job.
            options: further arguments of `gift.training.predict`, such as `threshold`.
        """
        settings = self.job.training
        return predict(
            self.network(which), inputs, batch_size=settings.batch_size, top=top,
            device=device or settings.device, **options,
        )  # fmt: skip


def inputs_text(train: Examples, reader: Any, folder: Path) -> str:
    """Return as JSON what is needed to read more inputs; larger parts are written to the folder."""
    spec = IOSpec(reader, train.classes, train.task or "classification", train.details)
    config = spec.to_config(folder)
    return json.dumps(config, indent=1, ensure_ascii=False) + "\n"


def _read_inputs(path: Path) -> tuple[IOSpec, dict[str, Any]]:
    """Return what the file says of inputs and outputs, and the plain data of the reader."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return IOSpec.from_config(config, None), config["reader"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise JobError(f"{path} cannot be read", [f"{type(error).__name__}: {error}"]) from error
