"""The training loop: `finetune`."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gift.core.frozen_norms import kept_modes
from gift.core.trained import named_trainable
from gift.errors import NotFiniteError
from gift.files import save
from gift.schedules import RankAllocator, Schedule
from gift.strategies import FineTuningStrategy
from gift.support.progress import bar, hidden
from gift.training.about import described
from gift.training.callbacks import Callback
from gift.training.checkpoint import (
    DELTAS,
    FILE,
    random_states,
    restore_states,
    told_if_full,
    write_checkpoint,
)
from gift.training.distributed import Processes
from gift.training.evaluation import drawings, judge_valid, plain_task
from gift.training.finite import describe_not_finite
from gift.training.loading import windows
from gift.training.locking import FolderLock
from gift.training.randomness import kept_random
from gift.training.report import write_report
from gift.training.result import Result, write_result
from gift.training.run import TRAIN, TrainingRun, put_state, trained_state
from gift.training.settings import settings_of
from gift.training.setup import prepare
from gift.training.shown_examples import ExampleCollector, gathered
from gift.training.stopping import Signals
from gift.training.tasks import Loss


def finetune(
    net: nn.Module,
    train: Any,
    valid: Any = None,
    *,
    strategy: FineTuningStrategy | None = None,
    schedule: Schedule | None = None,
    allocator: RankAllocator | None = None,
    old: Any = None,
    task: str | None = None,
    loss: Loss | None = None,
    folder: str | Path | None = None,
    restart: bool = False,
    begin: Callable[[], None] | None = None,
    callbacks: Sequence[Callback] = (),
    accept_changed_data: bool = False,
    teacher: nn.Module | None = None,
    about: Mapping[str, str] | None = None,
    **settings: Any,
) -> Result:
    """Fine-tune a network on examples, on the device that is available.

    With a folder, each epoch ends with a checkpoint. If the run is killed, the same call resumes
    from there and ends with the same weights as an uninterrupted run. Ctrl-C and SIGTERM write a
    checkpoint first. More ``epochs`` than before continue a run, also one that has ended. When
    started by ``torchrun``, the processes train together.

    Args:
        net: the network, plain or already enabled; it is trained in place.
        train: `gift.data.Examples`, a torch dataset or data loader, a pair of tensors, or a
            Hugging Face dataset.
        valid: validation examples, in the same forms.
        strategy: strategy to enable on the network; None trains what an earlier
            `enable_fine_tuning` selected, or else what requires a gradient. The network stays
            enabled afterwards: `gift.merge` makes it a plain network that keeps what it learned,
            `disable_fine_tuning` restores the base.
        schedule: schedule of freezing and unfreezing; None leaves that to the strategy.
        allocator: allocator of the ranks of AdaLoRA; its steps are those of the run. The best
            epoch is one of those with the final ranks.
        old: examples of the old task, or a function that returns metrics of a network: the result
            then reports forgetting. If the head was replaced, the old head is used for this.
        task: "classification", "multi_label", "regression", "language", "segmentation" or
            "detection", if the examples do not specify it. If neither does, the task is regression
            where the targets are floating-point numbers and the network returns one number for
            each of them, else classification.
        loss: function of outputs and targets that returns a mean; None uses the loss of the task.
        folder: where to write ``checkpoint.pt``, ``best.safetensors`` and ``last.safetensors``
            (see `gift.load`), logs, plots and ``report.html``.
        restart: whether to start from scratch even if the folder has a checkpoint.
        begin: called after all checks passed, before anything is written or trained, for example
            to write files that belong to the run.
        callbacks: own code that is called after each step, epoch and so on; see `Callback`.
        accept_changed_data: whether to resume although examples were added, removed or changed.
        teacher: network for the same examples and classes whose outputs are learnt as well
            (distillation), see the settings ``distill_...``; it is moved to the device, and not
            changed.
        about: further facts about the examples for the report, such as where they are.
        settings: fields of `Settings`: ``epochs``, ``lr``, ``batch_size``, ``device`` and so on.

    Raises:
        TrainingError: if network, examples and settings do not fit each other, in which case the
            network is left unchanged; if another run trains in the folder; or if the loss is not
            finite or the disk is full, in which case the last checkpoint is kept.
        ValueError: if a setting is out of range, or the strategy does not fit.
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
    place = None if folder is None else Path(folder)
    lock = FolderLock(place, processes)
    with hidden(not chosen.progress or not processes.first), closing(lock):
        run = prepare(
            net,
            train,
            settings=chosen,
            processes=processes,
            valid=valid,
            strategy=strategy,
            schedule=schedule,
            allocator=allocator,
            old=old,
            task=task,
            loss=loss,
            folder=place,
            restart=restart,
            begin=begin,
            teacher=teacher,
            callbacks=callbacks,
            accept_changed_data=accept_changed_data,
            lock=lock,
        )
        run.result.about = described(run, about or {})
        try:
            with told_if_full(run):
                run.callbacks.on_train_begin(run)
                with Signals(run) as signals:
                    while not run.finished:
                        train_epoch(run, signals)
                        finish_epoch(run, signals)
                        signals.check(write=False)
                return conclude(run)
        finally:
            run.callbacks.close()


def train_epoch(run: TrainingRun, signals: Signals) -> None:
    """Train for one epoch, or for what is left of it."""
    settings = run.settings
    run.clock = time.monotonic()
    if not run.steps_done:
        run.totals = (0.0, 0.0)
        run.epoch_random = random_states(run)
        start_schedule(run)
        run.callbacks.on_epoch_begin(run)
    todo = enumerate(windows(remaining_batches(run), settings.accumulate), start=run.steps_done)
    make_model(run)
    name = f"epoch {run.epoch + 1}/{settings.epochs}"
    shown = bar(todo, name, initial=run.steps_done, total=run.steps_per_epoch)
    for number, window in shown:
        mean, count, stepped = train_step(run, window)
        run.step, run.steps_done = run.step + 1, number + 1
        run.totals = (run.totals[0] + mean * count, run.totals[1] + count)
        rates = {f"lr_{i}" if i else "lr": float(group["lr"])
                 for i, group in enumerate(run.optimizer.param_groups)}  # fmt: skip
        if stepped:
            run.rates.step()
        row = {"step": run.step, "loss": mean, **rates}
        run.result.steps.append(row)
        run.callbacks.on_step_end(run, row)
        shown.set_postfix(loss=f"{mean:.4g}", refresh=False)
        every = settings.checkpoint_steps
        if every and run.step % every == 0 and run.steps_done < run.steps_per_epoch:
            write_checkpoint(run)
        signals.check()


def remaining_batches(run: TrainingRun) -> Iterator[Any]:
    """Return the remaining batches of the epoch, if a run resumes in the middle of it."""
    if not run.steps_done:
        return run.train.of(run.epoch)
    # Loading the finished batches repeats their random draws; the state is then set back to that
    # of the run.
    now = random_states(run)
    restore_states(run, run.epoch_random)
    batches = run.train.of(run.epoch)
    for _ in islice(batches, run.steps_done * run.settings.accumulate):
        pass
    restore_states(run, now)
    return batches


def start_schedule(run: TrainingRun) -> None:
    """Unfreeze what the schedule unfreezes in this epoch."""
    if run.schedule is None:
        return
    unfrozen = run.schedule.step(run.epoch, run.optimizer)
    if unfrozen:
        run.model = None  # the wrapper must be rebuilt with the newly trained parameters
        run.result.unfrozen[run.epoch + 1] = list(unfrozen)
        if run.best_state:  # newly unfrozen tensors enter the best state with their current values
            run.best_state = trained_state(run.net) | run.best_state


def make_model(run: TrainingRun) -> None:
    """Create the model if there is none yet, and put the network into training mode."""
    if run.model is None:
        run.model = run.processes.model(run.net, run.settings.compile, lambda: all_take_part(run))
    run.net.train()


def all_take_part(run: TrainingRun) -> bool:
    """Whether one batch gives every trained parameter a gradient."""
    trained = [p for _, p in named_trainable(run.net) if p.requires_grad]
    with kept_random(run.train.generator), kept_modes(run.net), run.autocast():
        batch, _ = next(iter(run.train.of()))
        run.net.eval()
        _, loss = run.task.judged(run.net, run.train.on_device(batch))
    if loss is None:
        return False
    return None not in torch.autograd.grad(loss, trained, allow_unused=True)


def train_step(run: TrainingRun, window: list[tuple[Any, bool]]) -> tuple[float, float, bool]:
    """Make one optimizer step with the batches of a window.

    Returns the mean loss, the number of targets, and whether the step was made: it is skipped if
    float16 overflowed.

    The gradient is that of the mean over all targets in the window, however they are distributed
    over batches and processes.
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
            # DDP and FSDP average the gradients of all processes.
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
    if run.allocator is not None:
        run.allocator.add_gradients()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.allocator is not None:
        run.allocator.step()
    run.optimizer.zero_grad()
    return mean, count, run.scaler.get_scale() >= scale


def _is_finite(norm: Any) -> bool:
    return math.isfinite((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())


def _reason(run: TrainingRun, window: list[tuple[Any, bool]]) -> str:
    """Say which examples have non-finite values, or else what to try."""
    places = run.train.places(run.epoch)
    first = run.steps_done * run.settings.accumulate
    for number, (batch, _) in enumerate(window, start=first):
        if reason := describe_not_finite(batch, places[number], number):
            return f"{TRAIN} have {reason}"
    return "try a lower lr, a longer warmup or precision='float32'"


def _stop(run: TrainingRun, what: str, reason: str) -> None:
    kept = "there is no folder with a checkpoint"
    if run.result.folder is not None and (run.result.folder / FILE).exists():
        kept = f"{run.result.folder} has the last good checkpoint"
    raise NotFiniteError(
        f"{what} in step {run.steps_done + 1} of epoch {run.epoch + 1}: {reason}; {kept}"
    )


def finish_epoch(run: TrainingRun, signals: Signals) -> None:
    """Evaluate the network, save it if it is the best so far, and write a checkpoint."""
    total, count = run.totals
    row = {"epoch": run.epoch + 1, "train_loss": total / max(count, 1)}
    if run.valid is not None:
        with signals.evaluating():
            values, _ = judge_valid(run)
        row |= {f"valid_{name}": value for name, value in values.items()}
        value = run.watched(row)
        if run.allocator is not None and not run.allocator.is_final:
            pass  # its ranks are not those to keep
        elif run.is_better(value):
            run.best, run.waited, run.result.best_epoch = value, 0, run.epoch + 1
            run.best_state = trained_state(run.net)
            save_delta(run, "best")
        else:
            run.waited += 1
    row["step"] = run.step
    row["seconds"] = time.monotonic() - run.clock
    run.result.history.append(row)
    run.callbacks.on_epoch_end(run, row)
    run.epoch, run.steps_done = run.epoch + 1, 0
    patience = run.settings.patience
    if patience is not None and run.waited >= patience:
        run.result.stopped = f"no improvement in {patience} epochs"
    run.finished = run.epoch >= run.settings.epochs or run.result.stopped != "done"
    write_checkpoint(run)


def save_delta(run: TrainingRun, which: str) -> None:
    """Write the "best" or "last" delta into the folder of the run; all processes must call this."""
    if run.result.folder is None:
        return
    if run.processes.has_part_in_files:
        with told_if_full(run):
            save(run.net, run.result.folder / DELTAS[which])
    run.processes.wait()


def conclude(run: TrainingRun) -> Result:
    """Restore the weights to keep, evaluate them, and complete the result."""
    result = run.result
    save_delta(run, "last")
    if run.settings.keep == "best" and run.best_state:
        put_state(run.net, run.best_state)
    if run.valid is not None:
        collector = ExampleCollector(
            plain_task(run.task), run.valid.data, run.result.folder is not None
        )
        result.after, result.confusion = judge_valid(run, in_detail=True, see=collector.see)
        result.shown = gathered(run.processes.gathered(collector.samples()), False)
        result.mistakes = gathered(run.processes.gathered(collector.worst()), True)
        result.numbers = [
            pair for part in run.processes.gathered(collector.numbers()) for pair in part
        ]
        result.samples = drawings(run.net, run.task, run.valid)
    if run.old is not None:
        result.old_after = run.old()
    named = dict(run.net.named_parameters())
    result.total = sum(p.numel() for p in named.values())
    result.trained = sum(p.numel() for _, p in named_trainable(run.net))
    run.callbacks.on_train_end(run)
    if run.folder is not None:
        write_result(result, run.folder)
        write_report(result, run.folder)
    run.processes.wait()
    return result
