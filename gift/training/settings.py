"""How a network is trained: every setting of `finetune`, with its default."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

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
        whole = {name: 1 for name in ("epochs", "batch_size", "accumulate")}
        may_be_none = ("patience", "checkpoint_steps")
        whole |= {"workers": 0, "patience": 1, "checkpoint_steps": 1}
        problems = [
            f"{name} is {value!r}, expected a whole number of at least {least}"
            for name, least in whole.items()
            if not ((value := getattr(self, name)) is None and name in may_be_none)
            and (type(value) is not int or value < least)
        ]
        ranges = {
            "lr": (_is_number(self.lr) and self.lr > 0, "a number above 0"),
            "weight_decay": (_is_number(self.weight_decay) and self.weight_decay >= 0, "0 or more"),
            "clip": (
                self.clip is None or (_is_number(self.clip) and self.clip > 0),
                "a number above 0, or None",
            ),
            "warmup": (_is_number(self.warmup) and 0 <= self.warmup <= 1, "a share from 0 to 1"),
            "label_smoothing": (
                _is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1,
                "a share from 0 to below 1",
            ),
            "loraplus_ratio": (
                self.loraplus_ratio is None
                or (_is_number(self.loraplus_ratio) and self.loraplus_ratio > 0),
                "a number above 0, or None",
            ),
            "seed": (self.seed is None or type(self.seed) is int, "a whole number, or None"),
            "metrics": (not isinstance(self.metrics, str), "names in a list"),
            "precision": (self.precision in PRECISIONS, f"one of {PRECISIONS}"),
            "parallel": (self.parallel in ("ddp", "fsdp"), "'ddp' or 'fsdp'"),
            "keep": (self.keep in ("best", "last"), "'best' or 'last'"),
        }
        problems += [
            f"{name} is {getattr(self, name)!r}, expected {expected}"
            for name, (fits, expected) in ranges.items()
            if not fits
        ]
        if problems:
            raise ValueError("; ".join(problems))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings with these values.

    Raises:
        TypeError: naming all that are no settings.
        ValueError: for values out of range.
    """
    known = [field.name for field in fields(Settings)]
    problems = [
        f"{name!r} is no setting, closest: {get_close_matches(name, known, n=3)}"
        for name in given
        if name not in known
    ]
    if problems:
        raise TypeError("; ".join(problems) + f"; there are {known}")
    return Settings(**given)
