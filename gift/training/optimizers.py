"""Parameter groups, optimizers and learning rate schedules."""

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from gift.core.delta import named_deltas
from gift.core.trained import named_trainable
from gift.errors import TrainingError, closest
from gift.training.settings import Settled


def make_optimizer(net: nn.Module, settings: Settled) -> Optimizer:
    """Create the optimizer for the trained parameters.

    Raises:
        TrainingError: if nothing is trained, or there is no such optimizer.
    """
    make: Any = settings.optimizer
    if isinstance(make, str):
        make = getattr(torch.optim, make, None)
        if not (isinstance(make, type) and issubclass(make, Optimizer)):
            names = [n for n, o in vars(torch.optim).items() if isinstance(o, type)]
            close = closest(settings.optimizer, names)
            raise TrainingError(
                f"torch.optim has no optimizer {settings.optimizer!r}, closest: {close}"
            )
    options = dict(settings.optimizer_options or {})
    if isinstance(make, type) and "weight_decay" in inspect.signature(make).parameters:
        options.setdefault("weight_decay", settings.weight_decay)
    return make(
        parameter_groups(net, settings.lr, settings.loraplus_ratio), lr=settings.lr, **options
    )


def parameter_groups(
    net: nn.Module, lr: float, loraplus_ratio: float | None = None
) -> list[dict[str, Any]]:
    r"""Group the trained parameters: one group, and with a ratio a second one for `lora_B` (LoRA+).

    LoRA+ (https://arxiv.org/abs/2402.12354, section 4): :math:`\eta_B = \lambda \eta_A`.

    Args:
        net: the network.
        lr: the learning rate.
        loraplus_ratio: ratio of the learning rate of `lora_B` to `lr`, the paper's
            :math:`\lambda`.

    Raises:
        TrainingError: if nothing is trained, or there is no `lora_B`.
    """
    trained = [parameter for _, parameter in named_trainable(net)]
    if not trained:
        raise TrainingError(
            "nothing is trained: give a strategy, or call enable_fine_tuning with one before"
        )
    if loraplus_ratio is None:
        return [{"params": trained, "lr": lr}]
    if loraplus_ratio <= 0:
        raise TrainingError(f"loraplus_ratio is {loraplus_ratio}, expected more than 0")
    outer = {
        id(tensor)
        for module, _, delta in named_deltas(net)
        if not delta.of_base
        for key, tensor in delta.tensors(module).items()
        if key == "lora_B"
    }
    if not outer:
        raise TrainingError("loraplus_ratio needs a strategy with lora_B, such as those of LoRA")
    rest = [p for p in trained if id(p) not in outer]
    raised = [p for p in trained if id(p) in outer]
    groups = [{"params": rest, "lr": lr}, {"params": raised, "lr": lr * loraplus_ratio}]
    return [group for group in groups if group["params"]]


def make_rates(optimizer: Optimizer, settings: Settled, steps: int) -> LRScheduler:
    """Create the learning rate schedule for a number of steps.

    Raises:
        TrainingError: if there is no schedule of that name.
    """
    if not isinstance(settings.lr_schedule, str):
        return settings.lr_schedule(optimizer, steps)
    if settings.lr_schedule == "onecycle":
        highest = [group["lr"] for group in optimizer.param_groups]
        known = optimizer.defaults
        # torch divides by zero if the warm-up is a single step.
        warmup = settings.warmup + 1e-9 * (settings.warmup * max(steps, 2) == 1)
        # OneCycleLR cycles momentum only if the optimizer has one.
        return OneCycleLR(
            optimizer,
            highest,
            total_steps=max(steps, 2),
            pct_start=warmup,
            cycle_momentum=bool(known.get("betas") or known.get("momentum")),
        )
    shape = SHAPES.get(settings.lr_schedule)
    if shape is None:
        raise TrainingError(
            f"lr_schedule is {settings.lr_schedule!r}, expected one of {[*SHAPES, 'onecycle']}"
        )
    return LambdaLR(optimizer, partial(_rate, shape, round(steps * settings.warmup), steps))


def continue_rates(rates: LRScheduler, state: dict[str, Any]) -> None:
    """Let a schedule that was made for another number of steps continue at the step of a state.

    The schedules of gift then follow their curve for the new number of steps; one of the user's own
    continues with its state as it is.
    """
    if isinstance(rates, OneCycleLR):  # whose state has the number of steps
        state = {name: state[name] for name in ("last_epoch", "base_lrs")}
    rates.load_state_dict(state)
    if isinstance(rates, LambdaLR | OneCycleLR):
        rates.last_epoch -= 1
        with warnings.catch_warnings():
            # The optimizer stepped in the run that is resumed, which torch does not know.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            rates.step()


SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""Factor of the learning rate by the share of finished steps, after the warm-up."""


def _rate(shape: Callable[[float], float], warmup: int, steps: int, step: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return shape(min(1.0, (step - warmup) / max(1, steps - warmup)))
