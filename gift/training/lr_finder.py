"""`find_lr`: a learning rate range test, which tries all learning rates once."""

import base64
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from gift.errors import NotFiniteError
from gift.schedules import Schedule
from gift.strategies import FineTuningStrategy
from gift.support.atomic_files import write_bytes
from gift.support.progress import bar, hidden
from gift.training.distributed import Processes
from gift.training.loading import windows
from gift.training.loop import make_model, start_schedule, train_step
from gift.training.randomness import kept_random
from gift.training.report.plots import LIGHT, Theme, panel, render
from gift.training.run import TrainingRun
from gift.training.settings import settings_of
from gift.training.setup import prepare
from gift.training.tasks import Loss

SMOOTHING = 0.9
DIVERGED = 4.0


@dataclass(frozen=True)
class LearningRates:
    """Result of `find_lr`.

    Args:
        rates: learning rates that were tried, increasing.
        losses: loss at each rate, before the step with that rate.
        smoothed: bias-corrected exponential moving average of the losses over about ten steps.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def suggestion(self) -> float | None:
        """The learning rate at which the loss fell most steeply; None if it never fell.

        It is at most a tenth of the rate with the lowest loss, because training diverges beyond
        that one. A one-sided moving average lags behind, so the slopes are computed from a
        two-sided average.
        """
        least = self.smoothed.index(min(self.smoothed))
        both = smooth(self.smoothed[: least + 1][::-1])[::-1]
        slopes = {r: b - a for r, a, b in zip(self.rates[1:], both, both[2:], strict=False)}
        steepest = min(slopes, key=slopes.__getitem__, default=None)
        if steepest is None or slopes[steepest] > -1e-6 * abs(both[0]):  # only rounding
            return None
        return min(steepest, self.rates[least] / 10)

    def plot(self, path: str | Path) -> None:
        """Write a PNG plot of losses over learning rates, with the suggestion."""
        write_bytes(path, render(_draw, self, LIGHT) or b"")

    def _repr_html_(self) -> str:
        drawn = base64.b64encode(render(_draw, self, LIGHT) or b"").decode()
        return f'<div>{self}</div><img alt="{self}" src="data:image/png;base64,{drawn}">'

    def __str__(self) -> str:
        tried = f"{len(self.rates)} rates from {self.rates[0]:.3g} to {self.rates[-1]:.3g}"
        found = self.suggestion
        outcome = "the loss never fell" if found is None else f"{found:.2g} is suggested"
        return f"{tried}: {outcome}"


def find_lr(
    net: nn.Module,
    train: Any,
    *,
    strategy: FineTuningStrategy | None = None,
    schedule: Schedule | None = None,
    task: str | None = None,
    loss: Loss | None = None,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    **settings: Any,
) -> LearningRates:
    """Train a copy of the network while the learning rate rises exponentially.

    This is the range test of https://arxiv.org/abs/1506.01186, section 3.3. It stops when the loss
    is four times its minimum, or not finite. The network is not changed, and random states are
    restored afterwards. Frozen parameters of an enabled network are not copied.

    Args:
        net: the network, plain or already enabled.
        train: training examples, as for `finetune`.
        strategy: strategy to enable on the copy.
        schedule: schedule, applied as in the first epoch.
        task: as for `finetune`.
        loss: as for `finetune`.
        lowest: the first learning rate. Parameter groups keep their ratios.
        highest: the last learning rate.
        steps: number of learning rates to try.
        settings: fields of `Settings`; those for learning rates, epochs and validation have no
            effect here.

    Raises:
        ValueError: if the rates do not rise from above zero, or there are fewer than three.
        TrainingError: if network, examples and settings do not fit each other, or the loss is not
            finite at the lowest rate.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift.training import find_lr
        >>> _ = torch.manual_seed(0)
        >>> inputs = torch.randn(256, 16)
        >>> labels = (inputs[:, 0] > 0).long()
        >>> found = find_lr(nn.Linear(16, 2), (inputs, labels), device="cpu", progress=False)
        >>> 1e-4 < found.suggestion < 1
        True
    """
    if not 0 < lowest < highest < math.inf or steps < 3:
        raise ValueError(
            f"the rates go from {lowest} to {highest} in {steps} steps, expected them to rise from "
            "above zero in three or more"
        )
    chosen = replace(
        settings_of(settings), lr_schedule="constant", warmup=0.0, patience=None, watch=None
    )
    order = train.generator if isinstance(train, DataLoader) else None
    processes = Processes(chosen)
    with kept_random(order), hidden(not chosen.progress or not processes.first):
        # Without a strategy or a schedule, frozen parameters stay frozen and can be shared.
        twin = _copied(net, sharing=strategy is None and schedule is None)
        run = prepare(
            twin,
            train,
            settings=chosen,
            processes=processes,
            strategy=strategy,
            schedule=copy.deepcopy(schedule),
            task=task,
            loss=loss,
        )
        rates = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
        losses = list(_sweep(run, rates))
    return LearningRates(rates[: len(losses)], losses, smooth(losses))


def _sweep(run: TrainingRun, rates: list[float]) -> Iterator[float]:
    """Yield the loss at each learning rate until it has diverged."""
    start_schedule(run)
    make_model(run)
    losses: list[float] = []
    for rate, window in zip(bar(rates, "learning rates"), _forever(run), strict=False):
        for group in run.optimizer.param_groups:
            group.setdefault("at_1", group["lr"] / run.settings.lr)
            group["lr"] = group["at_1"] * rate
        try:
            mean, *_ = train_step(run, window)
        except NotFiniteError:
            if not losses:
                raise
            return
        losses.append(mean)
        yield mean
        run.steps_done += 1
        smoothed = smooth(losses)
        if smoothed[-1] > DIVERGED * min(smoothed):
            return


def _forever(run: TrainingRun) -> Iterator[Any]:
    """Yield the batches of each step, epoch after epoch."""
    while True:
        yield from windows(run.train.of(run.epoch), run.settings.accumulate)
        run.epoch, run.steps_done = run.epoch + 1, 0


def smooth(values: list[float]) -> list[float]:
    """Return the bias-corrected exponential moving average of the values."""
    mean, means = 0.0, []
    for number, value in enumerate(values, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        means.append(mean / (1 - SMOOTHING**number))
    return means


def _copied(net: nn.Module, sharing: bool) -> nn.Module:
    """Return a trainable copy; with `sharing`, it shares the memory of frozen parameters."""
    memo: dict[int, Any] = {}
    for _, parameter in net.named_parameters():
        if sharing and not parameter.requires_grad and type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            memo[id(parameter)].__dict__.update(parameter.__dict__)
    return copy.deepcopy(net, memo)


def _draw(found: LearningRates, theme: Theme) -> Any:
    figure, axes = panel("learning rate", "loss")
    axes.set_xscale("log")
    colour, mark = theme.colours[:2]
    axes.plot(found.rates, found.losses, color=colour, alpha=0.35, linewidth=1, label="each step")
    axes.plot(found.rates, found.smoothed, color=colour, label="smoothed")
    least = found.smoothed.index(min(found.smoothed))
    shown = [*found.smoothed[: least + 1], *found.losses[: least + 1]]  # points before it diverges
    low, high = min(shown), max(shown)
    if high > low:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
    if (rate := found.suggestion) is not None:
        axes.axvline(rate, color=mark, linestyle="--", label=f"suggested: {rate:.2g}")
    axes.legend()
    return figure
