"""The settings of training: every setting of `finetune`, with its default."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from gift.errors import closest

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """Settings of `gift.training.finetune` and of the ``training`` section of a job file.

    Args:
        epochs: number of passes over the training examples; None makes at least 3 (for language
            models 1), and as many as 64 steps need, but at most 10 (5).
        batch_size: number of examples in a batch, over all processes. A single remaining example
            joins the last batch, because norm layers cannot learn from one (likewise for each
            process).
        accumulate: number of batches whose gradients one optimizer step accumulates.
        optimizer: name of a class of ``torch.optim``; in code also a function that makes an
            optimizer from parameter groups, called with ``lr`` and ``weight_decay``.
        optimizer_options: further keyword arguments of the optimizer.
        lr: peak learning rate; None is 1e-3, for networks of transformers 5e-4, or 1e-4 (5e-5) if
            more than half of the parameters of a network of a million or more are trained, as in
            full fine-tuning of a pretrained one.
        weight_decay: weight decay of the optimizer.
        loraplus_ratio: ratio of the learning rate of `lora_B` to `lr`, as in LoRA+
            (https://arxiv.org/abs/2402.12354, section 4, which uses 16); None for a single
            learning rate.
        lr_schedule: "cosine", "linear", "constant" or "onecycle"; in code also a function that
            makes a scheduler from an optimizer and the number of steps.
        warmup: share of the steps over which the learning rate rises from zero.
        clip: maximum norm of the gradient; None does not clip it.
        label_smoothing: share of the target that is spread over all classes.
        precision: "float32", "bfloat16" or "float16", the precision of autocast.
        compile: train ``torch.compile(net)``.
        device: "auto", or a torch device.
        parallel: "ddp" or "fsdp", if torchrun started several processes.
        workers: number of processes that load examples.
        patience: early stopping after this many epochs without improvement; None disables it.
        watch: metric for early stopping and for the best epoch, "loss" or a metric's name; None is
            the loss, or for detection the mean average precision.
        metrics: names of metrics, see `gift.training.METRICS`; None selects those of the task.
        keep: weights that the network has at the end, "best" or "last".
        checkpoint_steps: also write a checkpoint every this many optimizer steps.
        skip_damaged: read each example once before the training, and leave out those that cannot be
            read; ``damaged.txt`` in the folder lists them. Otherwise the first of them is an error.
        balance: for classes that are not equally frequent: "weights" weighs the loss of each class
            in training, "sampler" draws examples so that classes are equally frequent; None does
            neither.
        curriculum: learn from easy examples first: difficulty by "length", or by the "loss" of the
            network at the start; in code also a function of an example. During the first half of
            the epochs the share of the easiest examples grows from a fifth to all; None does not.
        distill_weight: with a teacher, the weight of the loss of its soft targets; that of the
            targets is the rest.
        distill_temperature: temperature of the probabilities of both networks.
        distill_layers: with a teacher, paths of layers of the network, each with that of the layer
            of the teacher whose hidden states it learns.
        distill_hidden_weight: weight of the loss of hidden states, which is added.
        contrastive_loss: for contrastive training, the name of a loss of pytorch-metric-learning.
        seed: seed of all random number generators; None does not seed them.
        progress: print a line for each epoch; in terminals and notebooks also show progress bars.
        tensorboard: also log for TensorBoard.
        track: experiment trackers that also get all values: "wandb", "mlflow", "trackio" and the
            others of accelerate; in code also its `GeneralTracker` objects. None uses none.

    Raises:
        ValueError: naming all settings that are out of range.
    """

    epochs: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str | Callable[..., Any] = "AdamW"
    optimizer_options: dict[str, Any] | None = None
    lr: float | None = None
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
    skip_damaged: bool = False
    balance: str | None = None
    curriculum: str | Callable[..., float] | None = None
    distill_weight: float = 0.5
    distill_temperature: float = 2.0
    distill_layers: dict[str, str] | None = None
    distill_hidden_weight: float = 1.0
    contrastive_loss: str = "NTXentLoss"
    seed: int | None = 0
    progress: bool = True
    tensorboard: bool = True
    track: tuple[Any, ...] | None = None

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
    "track": (lambda v: isinstance(v, tuple | list), "names in a list"),
    "precision": (lambda v: v in PRECISIONS, f"one of {PRECISIONS}"),
    "parallel": (lambda v: v in ("ddp", "fsdp"), "'ddp' or 'fsdp'"),
    "balance": (lambda v: v in ("weights", "sampler"), "'weights' or 'sampler'"),
    "curriculum": (
        lambda v: callable(v) or v in ("length", "loss"),
        "'length', 'loss' or a function",
    ),
    "distill_weight": (lambda v: _is_number(v) and 0 <= v <= 1, "a share from 0 to 1"),
    "distill_temperature": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "distill_hidden_weight": (lambda v: _is_number(v) and v >= 0, "0 or more"),
    "keep": (lambda v: v in ("best", "last"), "'best' or 'last'"),
}
"""The valid range of each setting, and how errors describe it.

pydantic comes with the extra `cli` alone, while `finetune` also works from code without it.
"""
_MAY_BE_NONE = (
    "epochs", "lr", "balance", "curriculum", "patience", "checkpoint_steps", "clip",
    "loraplus_ratio", "seed", "track",
)  # fmt: skip


STEPS = 64
"""Number of optimizer steps that a training should have, if few epochs are enough for them."""
_EPOCHS = {"language": (1, 5)}
_FEW_PARAMETERS = 1_000_000


@dataclass(frozen=True)
class Settled(Settings):
    """Settings whose epochs and learning rate are numbers; see `settled`."""

    epochs: int = 10
    lr: float = 1e-3


def settled(
    settings: Settings,
    task: str,
    steps: int,
    trained: int,
    total: int,
    is_transformer: bool = False,
) -> Settled:
    """Return the settings with numbers for epochs and learning rate, by the size of the data.

    Args:
        settings: settings as given.
        task: name of the task.
        steps: number of optimizer steps of an epoch.
        trained: number of trained parameters.
        total: number of all parameters.
        is_transformer: whether the network is one of transformers.

    Example:
        >>> found = settled(Settings(), "classification", steps=13, trained=10_000, total=2_000_000)
        >>> found.epochs, found.lr
        (5, 0.001)
        >>> settled(Settings(), "classification", steps=2000, trained=9, total=9).epochs
        3
    """
    least, most = _EPOCHS.get(task, (3, 10))
    epochs = min(max(-(-STEPS // max(steps, 1)), least), most)
    is_whole = total >= _FEW_PARAMETERS and trained > total / 2
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    if settings.epochs is None:
        given["epochs"] = epochs
    if settings.lr is None:
        given["lr"] = (1e-4 if is_whole else 1e-3) / (2 if is_transformer else 1)
    return Settled(**given)


def defaults() -> dict[str, Any]:
    """Return the default of each setting that has a simple one."""
    return {field.name: field.default for field in fields(Settings) if field.default is not MISSING}


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Return the settings with these values.

    Raises:
        TypeError: naming all names that are not settings.
        ValueError: if values are out of range.
    """
    known = [field.name for field in fields(Settings)]
    problems = [
        f"{name!r} is not a setting, closest: {closest(name, known)}"
        for name in given
        if name not in known
    ]
    if problems:
        raise TypeError("; ".join(problems) + f"; there are {known}")
    return Settings(**given)
