"""How a network is trained: every setting of `finetune`, with its default."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gift.errors import closest

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """What `gift.training.finetune` and the ``training`` part of a job take.

    Args:
        epochs: passes over the training examples.
        batch_size: examples in a batch, over all processes. A single one that is left over joins
            the last batch, as norm layers cannot learn from one (likewise for each process).
        accumulate: how many batches one step of the optimizer takes together.
        optimizer: name of a class of ``torch.optim``; in code also what makes an optimizer of
            groups of parameters, called with ``lr`` and ``weight_decay``.
        optimizer_options: more keywords for it.
        lr: learning rate at its highest.
        weight_decay: of the optimizer.
        loraplus_ratio: learning rate of `lora_B` in units of `lr`, as LoRA+ has it
            (https://arxiv.org/abs/2402.12354, section 4; 16 there); None for one rate.
        lr_schedule: "cosine", "linear", "constant" or "onecycle"; in code also what makes a
            scheduler of an optimizer and the number of steps.
        warmup: share of the steps over which the rate rises from zero.
        clip: largest norm of the gradient; None leaves it.
        label_smoothing: share of the target that is spread over all classes.
        precision: "float32", "bfloat16" or "float16": what autocast computes in.
        compile: train ``torch.compile(net)``.
        device: "auto", or a device of torch.
        parallel: "ddp" or "fsdp", where torchrun started several processes.
        workers: processes that read examples.
        patience: epochs without improvement after which training stops; None never stops.
        watch: what is looked at for that, and for the best epoch: "loss" or a metric's name; None
            is the loss, or for detection the mean average precision.
        metrics: names of metrics, see `gift.training.METRICS`; None takes those of the task.
        keep: what the network has at the end: "best" or "last".
        checkpoint_steps: also write the checkpoint after so many steps within an epoch.
        seed: of all random numbers; None leaves them.
        progress: show progress bars.
        tensorboard: also log for TensorBoard.

    Raises:
        ValueError: naming all that is out of range.
    """

    epochs: int = 10
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str | Callable[..., Any] = "AdamW"
    optimizer_options: dict[str, Any] | None = None
    lr: float = 1e-3
    weight_decay: float = 0.01
    loraplus_ratio: float | None = None
    lr_schedule: str | Callable[..., Any] = "cosine"
    warmup: float = 0.1
    clip: float | None = 1.0
    label_smoothing: float = 0.0
    precision: str = "float32"
    compile: bool = False
    device: str = "auto"
    parallel: str = "ddp"
    workers: int = 0
    patience: int | None = None
    watch: str | None = None
    metrics: tuple[str, ...] | None = None
    keep: str = "best"
    checkpoint_steps: int | None = None
    seed: int | None = 0
    progress: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}, expected {expected}"
            for name, (fits, expected) in _BOUNDS.items()
            if not ((value := getattr(self, name)) is None and name in _MAY_BE_NONE)
            and not fits(value)
        ]
        if problems:
            raise ValueError("; ".join(problems))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Bound = tuple[Callable[[Any], bool], str]
_FROM_1: Bound = (lambda v: type(v) is int and v >= 1, "a whole number of at least 1")
_POSITIVE_OR_NONE: Bound = (lambda v: _is_number(v) and v > 0, "a number above 0, or None")
_BOUNDS: dict[str, Bound] = {
    "epochs": _FROM_1,
    "batch_size": _FROM_1,
    "accumulate": _FROM_1,
    "workers": (lambda v: type(v) is int and v >= 0, "a whole number of at least 0"),
    "patience": _FROM_1,
    "checkpoint_steps": _FROM_1,
    "lr": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "weight_decay": (lambda v: _is_number(v) and v >= 0, "0 or more"),
    "clip": _POSITIVE_OR_NONE,
    "warmup": (lambda v: _is_number(v) and 0 <= v <= 1, "a share from 0 to 1"),
    "label_smoothing": (lambda v: _is_number(v) and 0 <= v < 1, "a share from 0 to below 1"),
    "loraplus_ratio": _POSITIVE_OR_NONE,
    "seed": (lambda v: type(v) is int, "a whole number, or None"),
    "metrics": (lambda v: not isinstance(v, str), "names in a list"),
    "precision": (lambda v: v in PRECISIONS, f"one of {PRECISIONS}"),
    "parallel": (lambda v: v in ("ddp", "fsdp"), "'ddp' or 'fsdp'"),
    "keep": (lambda v: v in ("best", "last"), "'best' or 'last'"),
}
"""What each setting is, and how an error says so."""
_MAY_BE_NONE = ("patience", "checkpoint_steps", "clip", "loraplus_ratio", "seed")


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings with these values.

    Raises:
        TypeError: naming all that are no settings.
        ValueError: for values out of range.
    """
    known = [field.name for field in fields(Settings)]
    problems = [
        f"{name!r} is no setting, closest: {closest(name, known)}"
        for name in given
        if name not in known
    ]
    if problems:
        raise TypeError("; ".join(problems) + f"; there are {known}")
    return Settings(**given)
