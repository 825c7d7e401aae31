"""The start of a run, after all checks: everything that writes or cannot be undone."""

from collections.abc import Callable, Iterator
from typing import Any

from gift.data.examples import Examples
from gift.errors import some
from gift.training.callbacks import Callback
from gift.training.checkpoint import forget, random_states, restore, restore_states
from gift.training.evaluation import judge_valid
from gift.training.logs import Console, CsvLog, TensorBoardLog, TextLog
from gift.training.optimizers import make_optimizer, make_rates
from gift.training.predicting import remember
from gift.training.run import TrainingRun, put_state, trained_state
from gift.training.trackers import trackers


def start(
    run: TrainingRun,
    data: Any,
    state: dict[str, Any] | None,
    begin: Callable[[], None] | None,
    callbacks: Callback,
) -> None:
    """Shard the network, prepare the folder, and restore the checkpoint.

    Args:
        run: the run.
        data: the training examples.
        state: the checkpoint, if the run resumes.
        begin: see `finetune`.
        callbacks: callbacks of the run.
    """
    run.callbacks = callbacks
    settings, processes = run.settings, run.processes
    processes.shard(run.net)
    if processes.is_sharding:
        run.optimizer = make_optimizer(run.net, settings)
        steps = run.steps_per_epoch * settings.epochs
        run.rates = make_rates(run.optimizer, settings, steps)
    if isinstance(data, Examples):
        remember(run.net, data, run.task.name, run.task.details)
    if run.folder is not None and state is None:
        forget(run.folder)  # so that no old file is mistaken for a part of this run
    if begin is not None:
        begin()
    if state is not None:
        restore(run, state)


def tell(run: TrainingRun, state: dict[str, Any] | None, changes: list[str]) -> None:
    """Say what the user should know before the first step."""
    skipped = run.result.skipped
    if skipped:
        run.say(f"{len(skipped):,} examples cannot be read and are left out: {some(skipped, 3)}")
    if state is None:
        return
    if changes:
        run.say("going on with other examples: " + "; ".join(changes))
        if run.best_state:
            _judge_best_again(run)
    run.say(_where(run, state))


def _judge_best_again(run: TrainingRun) -> None:
    """Evaluate the best weights so far on validation examples that changed."""
    if run.valid is None:
        return
    random, now = random_states(run), trained_state(run.net)
    put_state(run.net, run.best_state)
    values, _ = judge_valid(run)
    run.best = run.watched({f"valid_{name}": value for name, value in values.items()})
    put_state(run.net, now)
    restore_states(run, random)


def shown_and_kept(run: TrainingRun) -> Iterator[Callback]:
    """Yield the callbacks that show the run, and keep its logs."""
    settings = run.settings
    if settings.progress and run.processes.first:
        yield Console()
    if run.folder is not None:
        yield TextLog(run.folder)
        yield CsvLog(run.folder)
        if settings.tensorboard or "tensorboard" in (settings.track or ()):
            yield TensorBoardLog(run.folder / "tensorboard")
    if run.processes.first:
        yield from trackers(settings.track, run.folder)


def _where(run: TrainingRun, state: dict[str, Any]) -> str:
    """Say where a run resumes."""
    if run.finished:
        ended = "" if run.result.stopped == "done" else f" ({run.result.stopped})"
        return f"finished already, after epoch {run.epoch}{ended}"
    step = f", step {run.steps_done + 1} of {run.steps_per_epoch}" if run.steps_done else ""
    before, now = state["identity"].get("epochs", run.settings.epochs), run.settings.epochs
    more = "" if before == now else (
        f"; there were to be {before} epochs, there are to be {now}: the learning rate follows its "
        "schedule over all of them"
    )  # fmt: skip
    return f"resuming at epoch {run.epoch + 1}{step}{more}"
