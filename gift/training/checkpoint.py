"""The checkpoint of a run: everything that a killed run needs to resume as if never interrupted."""

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gift.errors import TrainingError
from gift.private.torch.containers import tree_map
from gift.support.atomic_files import replace_file
from gift.training.distributed import sharded_like, whole
from gift.training.optimizers import continue_rates
from gift.training.randomness import random_state, restore_random
from gift.training.run import TrainingRun, put_state, trained_state
from gift.training.settings import defaults

FILE = "checkpoint.pt"
DELTAS = {"best": "best.safetensors", "last": "last.safetensors"}
_FORMAT = 1
_COUNTERS = (
    "epoch", "steps_done", "step", "totals", "best", "waited", "finished", "seed", "epoch_random",
)  # fmt: skip
_RESULT_FIELDS = ("history", "steps", "unfrozen", "before", "old_before", "best_epoch", "stopped")


def write_checkpoint(run: TrainingRun) -> None:
    """Write the checkpoint atomically; all processes must call this."""
    if run.result.folder is None:
        return
    random = random_states(run)  # collective: each process contributes its state
    if run.processes.has_part_in_files:
        state = _state(run, random)
        if run.folder is not None:
            path = run.folder / FILE
            with told_if_full(run):
                replace_file(path, lambda temporary: torch.save(state, temporary))
            run.callbacks.on_checkpoint(run, path)
    run.processes.wait()


@contextmanager
def told_if_full(run: TrainingRun) -> Iterator[None]:
    """Context in which a file that cannot be written is an error that says what is left.

    Raises:
        TrainingError: naming the file and the last good checkpoint.
    """
    try:
        yield
    except OSError as error:
        # torch and safetensors tell no number; other errors with one are about other things.
        if error.errno not in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        kept = "there is no checkpoint yet"
        if run.result.folder is not None and (run.result.folder / FILE).exists():
            kept = (
                f"{run.result.folder / FILE} is still the last good checkpoint: make room, and the "
                "same call resumes from it"
            )
        name = "" if error.filename is None else f"{error.filename}: "
        raise TrainingError(f"{name}{error.strerror or error}; {kept}") from error


def _state(run: TrainingRun, random: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "identity": run.identity,
        "counters": {name: getattr(run, name) for name in _COUNTERS}
        | {"steps": run.steps_per_epoch * run.settings.epochs},
        "result": {name: getattr(run.result, name) for name in _RESULT_FIELDS},
        "net": trained_state(run.net),
        "best_state": run.best_state,
        "optimizer": whole(run.optimizer.state_dict()),
        "rates": run.rates.state_dict(),
        "scaler": run.scaler.state_dict(),
        "schedule": None if run.schedule is None else run.schedule.state_dict(),
        "allocator": None if run.allocator is None else run.allocator.state_dict(),
        "random": random,
    }


def check_writable(folder: Path) -> None:
    """Check that files can be written into a folder, or into one that can be created.

    Raises:
        TrainingError: if they cannot.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written into" if there.is_dir() else "is not a folder"
        raise TrainingError(f"nothing can be written into {folder}: {there} {what}")


def forget(folder: Path) -> None:
    """Remove the checkpoint and the deltas that an earlier run left in a folder."""
    for name in (FILE, *DELTAS.values()):
        (folder / name).unlink(missing_ok=True)


def read_checkpoint(
    folder: Path | None, identity: dict[str, Any], but: Collection[str] = ()
) -> dict[str, Any] | None:
    """Return the checkpoint in a folder, or None if there is none.

    Args:
        folder: folder of the run.
        identity: description of the run, which the checkpoint must match; but there may be more
            epochs than the checkpoint knows.
        but: entries of the identity that may differ.

    Raises:
        TrainingError: if the checkpoint cannot be read, or belongs to another run.
    """
    if folder is None or not (folder / FILE).exists():
        return None
    path = folder / FILE
    advice = "choose another folder, or start over (restart=True, --restart)"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise ValueError(f"its format is {state['format']}, expected {_FORMAT}")
    except Exception as error:  # damaged or foreign files can raise anything
        raise TrainingError(
            f"{path} is not a checkpoint that can be read ({type(error).__name__}): {advice}"
        ) from None
    # A version that did not have a setting yet did what its default does.
    then = {key: value for key, value in defaults().items() if key in identity}
    then |= state["identity"]
    differences = [
        f"{key} was {then.get(key)!r} and is {identity.get(key)!r}"
        for key in sorted(then.keys() | identity.keys())
        if then.get(key) != identity.get(key)
        and key not in but
        and not (key == "epochs" and identity["epochs"] > then["epochs"])
    ]
    if differences:
        raise TrainingError(
            f"{path} is of another run, whose " + "; ".join(differences) + f": {advice}"
        )
    return state


def restore(run: TrainingRun, state: dict[str, Any]) -> None:
    """Restore a run to the point at which its checkpoint was written."""
    if run.schedule is not None:
        run.schedule.load_state_dict(state["schedule"], run.optimizer)
    if run.allocator is not None:
        run.allocator.load_state_dict(state["allocator"])
    put_state(run.net, state["net"])
    load_optimizer(run.optimizer, state["optimizer"])
    steps = run.steps_per_epoch * run.settings.epochs
    if steps == state["counters"].get("steps", steps):
        run.rates.load_state_dict(state["rates"])
    else:
        continue_rates(run.rates, state["rates"])
    run.scaler.load_state_dict(state["scaler"])
    for name in _COUNTERS:
        setattr(run, name, state["counters"][name])
    for name in _RESULT_FIELDS:
        setattr(run.result, name, state["result"][name])
    run.best_state = state["best_state"]
    run.train.seed = run.seed
    if run.settings.epochs > state["identity"].get("epochs", run.settings.epochs):
        # Who asks for more epochs of a run that has ended does not want it to stay ended.
        run.finished, run.result.stopped, run.waited = False, "done", 0
    restore_states(run, state["random"])


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer state of full tensors, and shard it as the parameters are sharded."""
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    own = dict(zip(numbers, parameters, strict=True))
    dealt = {
        number: tree_map(lambda value, like=own[number]: sharded_like(value, like), values)
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": dealt})


def random_states(run: TrainingRun) -> list[dict[str, Any]]:
    """Return the random states of all processes."""
    return run.processes.gathered(random_state(run.train.generator))


def restore_states(run: TrainingRun, states: list[dict[str, Any]]) -> None:
    """Restore the random state of this process; a process that is new keeps its own."""
    if run.processes.rank < len(states):
        restore_random(states[run.processes.rank], run.train.generator)
