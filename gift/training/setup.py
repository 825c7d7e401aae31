"""All checks before a run begins; if one fails, nothing has changed."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import TensorDataset

from gift.core.dynamic_class import spec_of
from gift.core.io_spec import io_spec_of
from gift.core.iterator import Site
from gift.core.record import record_of
from gift.core.undo.snapshot import all_or_nothing
from gift.data.examples import Examples
from gift.engine.enable import enable_fine_tuning
from gift.errors import GiftWarning, TrainingError
from gift.factories import pa_train
from gift.files.saving import fingerprint, split
from gift.schedules import RankAllocator, Schedule
from gift.strategies import FineTuningStrategy
from gift.support.optional import require
from gift.training.callbacks import Callback, Callbacks
from gift.training.checkpoint import FILE as CHECKPOINT
from gift.training.checkpoint import check_writable, read_checkpoint
from gift.training.damaged import readable, write_damaged
from gift.training.data_changes import KEYS, DataNames, refuse_changes
from gift.training.distributed import Processes
from gift.training.evaluation import judge, judge_valid, rehearse, task_of
from gift.training.forgetting import old_heads
from gift.training.loading import Batches, examples_of
from gift.training.locking import FolderLock
from gift.training.metrics import metrics_of
from gift.training.optimizers import make_optimizer, make_rates
from gift.training.randomness import seed_all
from gift.training.result import Result
from gift.training.run import TRAIN, VALID, Old, TrainingRun
from gift.training.settings import Settings, Settled
from gift.training.starting import shown_and_kept, start, tell
from gift.training.task_options import settled_for, with_options
from gift.training.tasks import Contrastive, Loss, Task
from gift.training.trackers import check_trackers

_WITHOUT_CONSEQUENCE = ("progress", "tensorboard", "track", "device", "workers", "parallel",
                        "compile", "checkpoint_steps", "skip_damaged")  # fmt: skip
"""Settings that do not change the weights, or only their last digits."""


def prepare(
    net: nn.Module,
    train: Any,
    *,
    settings: Settings,
    processes: Processes,
    valid: Any = None,
    strategy: FineTuningStrategy | None = None,
    schedule: Schedule | None = None,
    allocator: RankAllocator | None = None,
    old: Any = None,
    task: str | None = None,
    loss: Loss | None = None,
    folder: Path | None = None,
    restart: bool = False,
    begin: Callable[[], None] | None = None,
    callbacks: Sequence[Callback] = (),
    accept_changed_data: bool = False,
    lock: FolderLock | None = None,
    teacher: nn.Module | None = None,
) -> TrainingRun:
    """Set up a run that can begin, or resume from its checkpoint; see `finetune`."""
    _check_packages(settings, folder)
    own = Callbacks(callbacks)
    _check_kinds((schedule, Schedule), (allocator, RankAllocator))
    found = _read(train, valid, task, settings, folder)
    data, held_out = found.train, found.valid
    task_of(data, task, {})  # whether there is such a task
    seed = _seeded(settings, processes)

    def batches(examples: Any, shuffle: bool = False) -> Batches:
        size, workers = settings.batch_size, settings.workers
        return Batches(examples, size, processes, shuffle, workers, seed)

    with all_or_nothing(net), _released_if_refused(schedule):
        enabled = strategy is not None or spec_of(net).network
        enabled_by = _enable(net, strategy)
        if schedule is not None:
            schedule.attach(net)
        net.to(processes.device)
        if processes.rank:  # from here on, each process draws random numbers for its own examples
            seed_all(seed + processes.rank)
        learning = batches(data, shuffle=True)
        work = _fitted_task(net, learning, settings, task, loss)
        each = learning.steps(settings.accumulate)
        chosen = settled_for(net, settings, work, each)
        _warn_of_late(schedule, chosen)
        work = with_options(learning, work, net, chosen, teacher)
        optimizer = make_optimizer(net, chosen)
        _attach(allocator, net, each * chosen.epochs, processes)
        described = _described(schedule, allocator)
        identity = {} if folder is None else _identity(
            net, enabled_by, described, found.names, work, chosen)  # fmt: skip
        if teacher is not None and identity:
            identity["teacher"] = type(teacher).__name__
        run = TrainingRun(
            net=net,
            task=work,
            settings=chosen,
            processes=processes,
            train=learning,
            valid=None if held_out is None else batches(held_out),
            old=None if old is None else _old(net, old, batches, work.name, settings.metrics),
            metrics=metrics_of(work.name, settings.metrics),
            schedule=schedule,
            allocator=allocator,
            optimizer=optimizer,
            rates=make_rates(optimizer, chosen, each * chosen.epochs),
            scaler=torch.amp.GradScaler(
                processes.device.type, enabled=settings.precision == "float16"
            ),
            callbacks=Callbacks(),
            result=Result(
                network=enabled_by.network,
                strategy=enabled_by.strategy if enabled else "all that requires a gradient",
                schedule=described,
                task=work.name,
                classes=work.classes,
                skipped=found.skipped,
                folder=folder,
            ),
            identity=identity,
            seed=seed,
        )
        run.check_watch()
        if run.valid is not None:
            rehearse(net, work, run.valid, VALID)
        state, changes = _resumed(run, restart, found.names, accept_changed_data, lock)
    start(run, data, state, begin, Callbacks([*shown_and_kept(run), *own.callbacks]))
    if run.folder is not None:
        found.names.write(run.folder)
        write_damaged(run.folder, found.skipped)
    tell(run, state, changes)
    return run


def _resumed(
    run: TrainingRun, restart: bool, names: DataNames, accept: bool, lock: FolderLock | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the checkpoint to resume from, if there is one, and what changed in the examples."""
    folder = run.result.folder
    if lock is not None and folder is not None and (folder / CHECKPOINT).exists():
        lock.take()
    state = None if restart else read_checkpoint(folder, run.identity, KEYS)
    changes = names.changes(folder, state)
    if not accept:
        refuse_changes(changes)
    if state is None:
        _judge_before(run)
    if run.folder is not None:
        check_writable(run.folder)
    if lock is not None:
        lock.take()
    return state, changes


class _Data(NamedTuple):
    """The examples of a run.

    Args:
        train, valid: training and validation examples.
        skipped: why others were left out.
        names: their names, if there is a folder to keep them in.
    """

    train: Any
    valid: Any
    skipped: list[str]
    names: DataNames


def _read(
    train: Any, valid: Any, task: str | None, settings: Settings, folder: Path | None
) -> _Data:
    data = examples_of(train, task)
    held_out = None if valid is None else examples_of(valid, task)
    _same_classes(data, held_out)
    skipped: list[str] = []
    if settings.skip_damaged:
        data, skipped = readable(data, TRAIN, settings.workers)
        if held_out is not None:
            held_out, more = readable(held_out, VALID, settings.workers)
            skipped += more
    # Naming looks at each file, which is only worth it for a checkpoint.
    named = {} if folder is None else {"training": data, "validation": held_out}
    return _Data(data, held_out, skipped, DataNames(named))


def _seeded(settings: Settings, processes: Processes) -> int:
    """Seed all random number generators, if that is asked for, and return the seed of the order."""
    if settings.seed is not None:
        seed_all(settings.seed)
        return settings.seed
    [seed, *_] = processes.gathered(int(torch.randint(2**31, ()).item()))
    return int(seed)


def _fitted_task(
    net: nn.Module, learning: Batches, settings: Settings, name: str | None, loss: Loss | None
) -> Task:
    """Return the task, after a first batch went through the network."""
    data = learning.data
    task = _task(net, data, name, loss=loss, smoothing=settings.label_smoothing)
    task.details |= _contrastive(task, settings)
    task = rehearse(net, task, learning, TRAIN)
    _warn_of_one_class(data, task)
    return task


def _task(net: nn.Module, data: Any, name: str | None, **options: Any) -> Task:
    """Return the task; what the head of the network is known to give comes before the examples."""
    proposed = data.details if isinstance(data, Examples) else {}
    return task_of(data, name, {**proposed, **io_spec_of(net).details}, **options)


def _contrastive(task: Task, settings: Settings) -> dict[str, str]:
    return {"loss": settings.contrastive_loss} if isinstance(task, Contrastive) else {}


def _check_packages(settings: Settings, folder: Path | None) -> None:
    """Check packages that are only needed at the end, before hours of training."""
    require("torchmetrics", "train")
    require("tqdm", "train")
    check_trackers(settings.track)
    if folder is not None:
        for module in ("matplotlib", "jinja2", *["tensorboard"] * settings.tensorboard):
            require(module, "train")


@contextmanager
def _released_if_refused(schedule: Schedule | None) -> Iterator[None]:
    try:
        yield
    except BaseException:  # raised again below
        if schedule is not None and schedule.is_attached:
            schedule.detach()
        raise


def _check_kinds(*parts: tuple[Any, type]) -> None:
    for given, kind in parts:
        if not isinstance(given, kind | None):
            raise TypeError(f"expected a {kind.__name__} of gift.schedules, got {given!r}")


def _attach(
    allocator: RankAllocator | None, net: nn.Module, steps: int, processes: Processes
) -> None:
    """Attach an allocator, if there is one; its steps are those of the run."""
    if allocator is None:
        return
    if processes.is_sharding:
        raise TrainingError(
            "ranks are allocated from whole gradients: parallel='ddp' works, 'fsdp' does not"
        )
    if allocator.total_steps not in (None, steps):
        raise TrainingError(
            f"{allocator!r} is for {allocator.total_steps} steps, the run has {steps} (leave "
            "total_steps out)"
        )
    try:
        allocator.attach(net, steps)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _described(schedule: Schedule | None, allocator: RankAllocator | None) -> str:
    return ", ".join(repr(given) for given in (schedule, allocator) if given is not None)


def _warn_of_late(schedule: Schedule | None, settings: Settled) -> None:
    if schedule is None:
        return
    if late := [epoch for epoch in schedule.milestones if epoch >= settings.epochs]:
        warnings.warn(
            f"{schedule!r} unfreezes in epochs {late}, counted from 0, but there are only "
            f"{settings.epochs}",
            GiftWarning,
            stacklevel=4,
        )


def _judge_before(run: TrainingRun) -> None:
    result = run.result
    if run.valid is not None:
        result.before, _ = judge_valid(run)
    if run.old is not None:
        result.old_before = run.old()


def _enable(net: nn.Module, strategy: FineTuningStrategy | None) -> Any:
    """Enable the strategy, or return the report of enabling it earlier."""
    if strategy is None:
        if spec_of(net).network:
            return record_of(net).report
        # A plain network is trained according to its `requires_grad` flags.
        strategy = FineTuningStrategy(
            para_caps=[(lambda *place: Site(*place).parameter.requires_grad, pa_train())]
        )
    return enable_fine_tuning(net, strategy)


def _same_classes(train: Any, valid: Any) -> None:
    known = [d.classes for d in (train, valid) if isinstance(d, Examples) and d.classes is not None]
    if len(set(known)) > 1:
        raise TrainingError(
            f"the classes to learn are {list(known[0])}, those to validate on {list(known[1])}: "
            "give the second data set classes=train.classes"
        )


def _old(
    net: nn.Module,
    old: Any,
    batches: Callable[..., Batches],
    kind: str,
    metrics: Sequence[str] | None,
) -> Old:
    if callable(old):
        return lambda: dict(old(net))
    data = examples_of(old, kind)
    own = isinstance(data, Examples) and data.task is not None
    given, what = batches(data), "the examples of the old task"
    device = given.processes.device
    with old_heads(net, device):
        task = rehearse(net, task_of(data, None if own else kind, {}), given, what)
    kinds = metrics_of(task.name, metrics if task.name == kind else None)

    def judged() -> dict[str, float]:
        with old_heads(net, device):
            return judge(net, task, given, kinds, what=what)[0]

    return judged


def _warn_of_one_class(data: Any, task: Task) -> None:
    """Warn if labels in memory are all the same."""
    dataset = data.dataset if isinstance(data, Examples) else None
    if task.name != "classification" or not isinstance(dataset, TensorDataset):
        return
    labels = dataset.tensors[1]
    if not labels.is_floating_point() and bool((labels == labels.flatten()[0]).all()):
        warnings.warn(
            f"all {len(labels)} examples to learn from are of class {labels.flatten()[0].item()}: "
            "there is nothing to distinguish",
            GiftWarning,
            stacklevel=4,
        )


def _identity(
    net: nn.Module,
    report: Any,
    schedule: str,
    names: DataNames,
    task: Task,
    settings: Settings,
) -> dict[str, Any]:
    """Describe what a checkpoint must match, as texts and numbers."""
    record = record_of(net)
    own = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in _WITHOUT_CONSEQUENCE
    }
    named = {k: _name_of(v) if callable(v) else v for k, v in own.items()}
    return {
        "network": report.network,
        # The description of a strategy with lambdas contains the lines of the script that define
        # them.
        "strategy": report.strategy if record.recipe is not None else "",
        "trained tensors": {n: list(p.shape) for n, p in net.named_parameters() if p.requires_grad},
        "values of the base": _digest_of_base(net),
        "schedule": schedule,
        "task": task.name,
        "loss": "" if task.own_loss is None else _name_of(task.own_loss),
        "classes": list(task.classes or ()),
        **dict(zip(KEYS, (names.numbers, names.digests), strict=True)),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in named.items()},
    }


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _digest_of_base(net: nn.Module) -> str:
    """Hash everything that is not trained: with other values it is another network."""
    text = json.dumps(fingerprint(split(net).base, with_digests=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
