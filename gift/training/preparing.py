"""Everything that is looked at before a run begins; what does not fit leaves no trace."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gift.data.examples import Examples
from gift.enable import enable_fine_tuning
from gift.extras import needed
from gift.factories import pa_train
from gift.generated import spec_of
from gift.network import NetworkRecord
from gift.schedules import Schedule
from gift.strategies import FineTuningStrategy
from gift.training.checkpoint import forget, read_checkpoint, restore
from gift.training.errors import TrainingError
from gift.training.forgetting import old_heads
from gift.training.judging import judge, rehearse, task_of
from gift.training.loading import Batches, examples_of
from gift.training.logs import open_logs
from gift.training.metrics import metrics_of
from gift.training.optimising import make_optimizer, make_rates
from gift.training.predicting import remember
from gift.training.processes import Processes
from gift.training.randomness import seed_all
from gift.training.result import Result
from gift.training.run import Old, Run
from gift.training.settings import Settings
from gift.training.tasks import Loss
from gift.transaction import all_or_nothing

_WITHOUT_CONSEQUENCE = ("progress", "tensorboard", "device", "workers", "parallel", "compile",
                        "checkpoint_steps")  # fmt: skip
"""Settings that change no weight, or only their last digits."""


def prepare(
    net: nn.Module,
    train: Any,
    valid: Any,
    strategy: FineTuningStrategy | None,
    schedule: Schedule | None,
    old: Any,
    task: str | None,
    loss: Loss | None,
    folder: Path | None,
    restart: bool,
    settings: Settings,
    processes: Processes,
) -> Run:
    """A run that can begin, or go on where its checkpoint was written; see `finetune`."""
    if folder is not None:  # what the report needs, before hours of training
        needed("matplotlib", "train"), needed("jinja2", "train")
    data = examples_of(train, task)
    held_out = None if valid is None else examples_of(valid, task)
    _same_classes(data, held_out)
    work = task_of(data, task, loss=loss, smoothing=settings.label_smoothing)
    seed = settings.seed
    if seed is None:
        seed = int(torch.randint(2**31, ()).item())
        [seed, *_] = processes.gathered(seed)
    else:
        seed_all(seed)

    def batches(examples: Any, shuffle: bool = False) -> Batches:
        return Batches(
            examples,
            settings.batch_size,
            processes,
            shuffle,
            settings.workers,
            seed if shuffle else 0,
        )

    with all_or_nothing(net):
        enabled = strategy is not None or spec_of(net).network
        told = _enable(net, strategy)
        if schedule is not None:
            schedule.attach(net)
        net.to(processes.device)
        learning = batches(data, shuffle=True)
        rehearse(net, work, learning)
        optimizer = make_optimizer(net, settings)
        metrics = metrics_of(work.name, settings.metrics)
        run = Run(
            net=net,
            task=work,
            settings=settings,
            processes=processes,
            train=learning,
            valid=None if held_out is None else batches(held_out),
            old=None if old is None else _old(net, old, batches),
            metrics=metrics,
            schedule=schedule,
            optimizer=optimizer,
            rates=make_rates(optimizer, settings, 1),
            scaler=torch.amp.GradScaler(
                processes.device.type, enabled=settings.precision == "float16"
            ),
            logs=open_logs(None),
            result=Result(
                network=told.network,
                strategy=told.strategy if enabled else "all that requires a gradient",
                schedule="" if schedule is None else repr(schedule),
                task=work.name,
                classes=work.classes,
                folder=folder,
            ),
            identity=_identity(net, told, schedule, data, settings),
            seed=seed,
        )
        run.check_watch()
        if run.valid is not None:
            rehearse(net, work, run.valid)
        state = None if restart else read_checkpoint(folder, run.identity)
    return _begun(run, data, state)


def _begun(run: Run, data: Any, state: dict[str, Any] | None) -> Run:
    """The run with all that takes time, or that writes."""
    settings, processes = run.settings, run.processes
    processes.shard(run.net)
    if processes.is_sharding:
        run.optimizer = make_optimizer(run.net, settings)
    run.rates = make_rates(run.optimizer, settings, run.steps_per_epoch * settings.epochs)
    if isinstance(data, Examples):
        remember(run.net, data)
    if run.folder is not None and state is None:
        forget(run.folder)  # before anything new could be taken for a part of it
    if state is not None:
        restore(run, state)
    else:
        if run.valid is not None:
            run.result.before, _ = judge(
                run.net, run.task, run.valid, run.metrics, autocast=run.autocast()
            )
        if run.old is not None:
            run.result.old_before = run.old()
    if run.folder is not None:
        run.logs = open_logs(run.folder, settings.tensorboard)
        run.logs.rewind(run.step, run.epoch)
    return run


def _enable(net: nn.Module, strategy: FineTuningStrategy | None) -> Any:
    """The report of enabling, which may have been done before."""
    if strategy is None:
        if spec_of(net).network:
            return net._gift_network.report  # type: ignore[union-attr]  # its record
        # A plain network is trained as its flags say.
        strategy = FineTuningStrategy(
            para_caps=[(lambda *place: place[6].requires_grad, pa_train())]
        )
    return enable_fine_tuning(net, strategy)


def _same_classes(train: Any, valid: Any) -> None:
    known = [d.classes for d in (train, valid) if isinstance(d, Examples) and d.classes is not None]
    if len(set(known)) > 1:
        raise TrainingError(
            f"the classes to learn are {list(known[0])}, those to validate on {list(known[1])}: "
            "give the second data set classes=train.classes"
        )


def _old(net: nn.Module, old: Any, batches: Callable[..., Batches]) -> Old:
    if callable(old):
        return lambda: dict(old(net))
    data = examples_of(old)
    task, given = task_of(data, None), batches(data)
    device = given.processes.device

    def judged() -> dict[str, float]:
        with old_heads(net, device):
            rehearse(net, task, given)
            return judge(net, task, given, metrics_of(task.name, None))[0]

    with old_heads(net, device):
        rehearse(net, task, given)
    return judged


def _identity(
    net: nn.Module, told: Any, schedule: Schedule | None, data: Any, settings: Settings
) -> dict[str, Any]:
    """What makes a run this run, as texts and numbers."""
    record: NetworkRecord = net._gift_network  # type: ignore[assignment]
    own = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in _WITHOUT_CONSEQUENCE
    }
    named = {k: getattr(v, "__qualname__", repr(v)) if callable(v) else v for k, v in own.items()}
    return {
        "network": told.network,
        # A strategy with lambdas is told by the lines of the script that they stand in.
        "strategy": told.strategy if record.recipe is not None else "",
        "trained tensors": {n: list(p.shape) for n, p in net.named_parameters() if p.requires_grad},
        "schedule": "" if schedule is None else repr(schedule),
        "number of examples": len(data),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in named.items()},
    }
