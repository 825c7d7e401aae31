"""The loop: `finetune`."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gift.core.frozen_norms import kept_modes
from gift.core.network import named_trainable
from gift.errors import NotFiniteError
from gift.files import save
from gift.schedules import Schedule
from gift.strategies import FineTuningStrategy
from gift.support.optional import require
from gift.training.checkpoint import (
    DELTAS,
    FILE,
    random_states,
    restore_states,
    write_checkpoint,
)
from gift.training.distributed import Processes
from gift.training.evaluation import judge
from gift.training.finite import told_not_finite
from gift.training.loading import windows
from gift.training.randomness import kept_random
from gift.training.report import write_report
from gift.training.result import Result
from gift.training.run import TRAIN, VALID, Run, put_state, trained_state
from gift.training.settings import settings_of
from gift.training.setup import prepare
from gift.training.tasks import Loss


def finetune(
    net: nn.Module,
    train: Any,
    valid: Any = None,
    *,
    strategy: FineTuningStrategy | None = None,
    schedule: Schedule | None = None,
    old: Any = None,
    task: str | None = None,
    loss: Loss | None = None,
    folder: str | Path | None = None,
    restart: bool = False,
    begin: Callable[[], None] | None = None,
    **settings: Any,
) -> Result:
    """Fine-tune a network on examples, on whatever device there is.

    With a folder, each epoch ends with a checkpoint, and the same call goes on from there after a
    kill, with the same weights in the end as without. Started by ``torchrun``, the processes train
    together.

    Args:
        net: the network, plain or enabled already; it is trained in place.
        train: `gift.data.Examples`, a dataset or data loader of torch, a pair of tensors, or a
            data set of Hugging Face.
        valid: the same, to judge by.
        strategy: enabled on the network; None trains what `enable_fine_tuning` was told before, or
            else what requires a gradient. The network is being fine-tuned afterwards: `gift.merge`
            makes it a plain one with what it learnt, `disable_fine_tuning` the base that it was.
        schedule: when what is frozen; None leaves that to the strategy.
        old: examples of the old task, or a function that gives metrics of a network: the result
            tells what was forgotten. Where the head was replaced, the old one is used for that.
        task: "classification", "language", "regression" or "detection", if the examples do not
            say so. Where neither does, targets that are not whole numbers, for a network that gives
            one number for each, are those of a regression; all others are classes.
        loss: called with outputs and targets, gives a mean; None is the task's own.
        folder: gets ``checkpoint.pt``, ``best.safetensors`` and ``last.safetensors`` (see
            `gift.load`), logs, plots and ``report.html``.
        restart: begin anew, whatever the folder has.
        begin: called once all is found to fit, before anything is written or trained: to write
            down what belongs to the run.
        settings: those of `Settings`: ``epochs``, ``lr``, ``batch_size``, ``device`` and so on.

    Raises:
        TrainingError: if network, examples and settings do not fit each other; the network is as
            it was then. Or if the loss is not finite; the last checkpoint is kept.
        ValueError: for settings out of range, or a strategy that does not fit.
        DataError: if an example cannot be read.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift.strategies import LoRAAllFineTuningStrategy
        >>> from gift.training import finetune
        >>> _ = torch.manual_seed(0)
        >>> inputs = torch.randn(256, 16)
        >>> labels = (inputs[:, 0] > 0).long()
        >>> net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> result = finetune(
        ...     net, (inputs, labels), (inputs, labels), epochs=5, lr=0.03, device="cpu",
        ...     strategy=LoRAAllFineTuningStrategy(rank=1), progress=False,
        ... )
        >>> result.after["accuracy"] > 0.9
        True
    """
    chosen = settings_of(settings)
    processes = Processes(chosen)
    run = prepare(
        net,
        train,
        settings=chosen,
        processes=processes,
        valid=valid,
        strategy=strategy,
        schedule=schedule,
        old=old,
        task=task,
        loss=loss,
        folder=None if folder is None else Path(folder),
        restart=restart,
        begin=begin,
    )
    try:
        while not run.finished:
            train_epoch(run)
            finish_epoch(run)
    finally:
        run.logs.close()
    return conclude(run)


def train_epoch(run: Run) -> None:
    """One pass over the examples, or what is left of it."""
    settings = run.settings
    run.clock = time.monotonic()
    if not run.steps_done:
        run.totals = (0.0, 0.0)
        run.epoch_random = random_states(run)
        start_schedule(run)
    todo = enumerate(windows(remaining_batches(run), settings.accumulate), start=run.steps_done)
    make_model(run)
    name = f"epoch {run.epoch + 1}/{settings.epochs}"
    bar = progress(run, todo, name, initial=run.steps_done, total=run.steps_per_epoch)
    for number, window in bar:
        mean, count, stepped = train_step(run, window)
        run.step, run.steps_done = run.step + 1, number + 1
        run.totals = (run.totals[0] + mean * count, run.totals[1] + count)
        rates = {f"lr_{i}" if i else "lr": float(group["lr"])
                 for i, group in enumerate(run.optimizer.param_groups)}  # fmt: skip
        if stepped:
            run.rates.step()
        row = {"step": run.step, "loss": mean, **rates}
        run.result.steps.append(row)
        run.logs.step(row)
        bar.set_postfix(loss=f"{mean:.4g}", refresh=False)
        every = settings.checkpoint_steps
        if every and run.step % every == 0 and run.steps_done < run.steps_per_epoch:
            write_checkpoint(run)


def remaining_batches(run: Run) -> Iterator[Any]:
    """The batches of the epoch that are left, where a run goes on within one."""
    if not run.steps_done:
        return run.train.of(run.epoch)
    # What was drawn for the others is drawn again, and then goes on from where the run was.
    now = random_states(run)
    restore_states(run, run.epoch_random)
    batches = run.train.of(run.epoch)
    for _ in range(run.steps_done * run.settings.accumulate):
        next(batches)
    restore_states(run, now)
    return batches


def start_schedule(run: Run) -> None:
    """Unfreeze what is due."""
    if run.schedule is None:
        return
    unfrozen = run.schedule.step(run.epoch, run.optimizer)
    if unfrozen:
        run.model = None  # what wraps the network must see what is trained now
        run.result.unfrozen[run.epoch + 1] = list(unfrozen)
        if run.best_state:  # in the best state, they are what they are now
            run.best_state = trained_state(run.net) | run.best_state


def make_model(run: Run) -> None:
    """Make what is called for training, if there is none yet; the network gets ready for that."""
    if run.model is None:
        run.model = run.processes.model(run.net, run.settings.compile, lambda: all_take_part(run))
    run.net.train()


def progress(run: Run, todo: Iterable[Any], name: str, **options: Any) -> Any:
    """What is to be done, with a bar that shows how far that is."""
    shown = run.settings.progress and run.processes.first
    return require("tqdm", "train").tqdm(todo, name, disable=not shown, leave=False, **options)


def all_take_part(run: Run) -> bool:
    """Whether a batch gives every trained parameter a gradient."""
    trained = [p for _, p in named_trainable(run.net) if p.requires_grad]
    with kept_random(run.train.generator), kept_modes(run.net), run.autocast():
        batch, _ = next(iter(run.train.of()))
        run.net.eval()
        _, loss = run.task.judged(run.net, run.train.on_device(batch))
    if loss is None:
        return False
    return None not in torch.autograd.grad(loss, trained, allow_unused=True)


def train_step(run: Run, window: list[tuple[Any, bool]]) -> tuple[float, float, bool]:
    """One step of the optimizer with the batches of a window.

    Gives the mean loss, of how many targets, and whether the step was made: it is left out where
    float16 overflowed.

    The gradient is that of the mean over all targets in the window, however they are spread over
    batches and processes.
    """
    task, processes, model = run.task, run.processes, run.model
    for batch, _ in window:
        task.check(batch)
    count = processes.sum(sum(task.count(batch) for batch, counts in window if counts))
    total = torch.zeros((), dtype=torch.float64)
    for number, (batch, counts) in enumerate(window):
        moved = run.train.on_device(batch)
        with processes.accumulating(model, last=number == len(window) - 1):
            with run.autocast():
                loss = task.training_loss(model, moved) * float(counts) / max(count, 1)
            # The gradients of all processes are averaged.
            run.scaler.scale(loss * processes.number).backward()
        total += loss.detach().cpu().double()
    mean = processes.sum(total)
    run.scaler.unscale_(run.optimizer)
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if run.settings.clip is not None:
        nn.utils.clip_grads_with_norm_(trained, run.settings.clip, norm)
    if not math.isfinite(mean) or not (run.scaler.is_enabled() or _is_finite(norm)):
        what = "loss" if not math.isfinite(mean) else "gradient"
        _stop(run, f"the {what} is not finite", _reason(run, window))
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return mean, count, run.scaler.get_scale() >= scale


def _is_finite(norm: Any) -> bool:
    return math.isfinite((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())


def _reason(run: Run, window: list[tuple[Any, bool]]) -> str:
    """Which examples have numbers that are not finite, or what else may have been wrong."""
    places = run.train.places(run.epoch)
    first = run.steps_done * run.settings.accumulate
    for number, (batch, _) in enumerate(window, start=first):
        if told := told_not_finite(batch, places[number], number):
            return f"{TRAIN} have {told}"
    return "try a lower lr, a longer warmup or precision='float32'"


def _stop(run: Run, what: str, reason: str) -> None:
    kept = "there is no folder with a checkpoint"
    if run.result.folder is not None and (run.result.folder / FILE).exists():
        kept = f"{run.result.folder} has the last good checkpoint"
    raise NotFiniteError(
        f"{what} in step {run.steps_done + 1} of epoch {run.epoch + 1}: {reason}; {kept}"
    )


def finish_epoch(run: Run) -> None:
    """Judge the network, keep it if it is the best, write down where the run is."""
    total, count = run.totals
    row = {"epoch": run.epoch + 1, "train_loss": total / max(count, 1)}
    if run.valid is not None:
        values, _ = judge(
            run.net, run.task, run.valid, run.metrics, autocast=run.autocast(), what=VALID
        )
        row |= {f"valid_{name}": value for name, value in values.items()}
        value = run.watched(row)
        if run.is_better(value):
            run.best, run.waited, run.result.best_epoch = value, 0, run.epoch + 1
            run.best_state = trained_state(run.net)
            save_delta(run, "best")
        else:
            run.waited += 1
    row["step"] = run.step
    row["seconds"] = time.monotonic() - run.clock
    run.result.history.append(row)
    run.logs.epoch(row)
    run.epoch, run.steps_done = run.epoch + 1, 0
    patience = run.settings.patience
    if patience is not None and run.waited >= patience:
        run.result.stopped = f"no improvement in {patience} epochs"
    run.finished = run.epoch >= run.settings.epochs or run.result.stopped != "done"
    write_checkpoint(run)


def save_delta(run: Run, which: str) -> None:
    """Write the "best" or "last" delta into the run's folder; all processes call this."""
    if run.result.folder is None:
        return
    if run.processes.has_part_in_files:
        save(run.net, run.result.folder / DELTAS[which])
    run.processes.wait()


def conclude(run: Run) -> Result:
    """Leave the network as it is to be kept, and tell what was done."""
    result = run.result
    save_delta(run, "last")
    if run.settings.keep == "best" and run.best_state:
        put_state(run.net, run.best_state)
    if run.valid is not None:
        result.after, result.confusion = judge(
            run.net, run.task, run.valid, run.metrics, True, run.autocast(), VALID
        )
    if run.old is not None:
        result.old_after = run.old()
    named = dict(run.net.named_parameters())
    result.total = sum(p.numel() for p in named.values())
    result.trained = sum(p.numel() for _, p in named_trainable(run.net))
    if run.folder is not None:
        write_report(result, run.folder)
    run.processes.wait()
    return result
