"""What two processes do in `test_training_processes`: train together, as one does alone."""

import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import Dataset

import gift
from gift.schedules import UnfreezeMilestones
from gift.strategies import HeadReplacementStrategy, merge_strategies
from gift.strategies.lora import LoRAAllFineTuningStrategy
from gift.training import Callback, finetune, loop

QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "tensorboard": False}
ALONE = {"RANK": "0", "WORLD_SIZE": "1"}


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 24),
        nn.LayerNorm(24),
        nn.Tanh(),
        nn.Linear(24, 12),
        nn.Tanh(),
        nn.Linear(12, 3),
    ).double()


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 3),
    ).double()  # fmt: skip


def transformer() -> nn.Module:
    """Blocks that are gathered one after the other; the head is tied to nothing."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.Linear(2, 8), nn.TransformerEncoder(layer, 2), nn.Flatten(),
        nn.Linear(24, 3),
    ).double()  # fmt: skip


def data(number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(number, 6, dtype=torch.float64, generator=draw)
    return inputs, inputs[:, :3].argmax(1)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def trained(make: Callable[[], nn.Module], folder: Path | None, **settings: Any) -> tuple[Any, Any]:
    """A network that was trained, and the result."""
    net = make()
    # Statistics of half a batch are others.
    strategy = merge_strategies(
        [
            HeadReplacementStrategy(num_classes=3),
            LoRAAllFineTuningStrategy(rank=2, freeze_statistics=make is convolutional),
        ]
    )
    options: dict[str, Any] = {
        "epochs": 3, "batch_size": 8, "lr": 0.05, "keep": "last", "metrics": ("accuracy",),
    } | settings  # fmt: skip
    examples = options.pop("examples", 37)
    schedule = options.pop("schedule", lambda: None)()
    train = options.pop("train", None) or data(examples)
    result = finetune(
        net, train, data(17), old=data(11), strategy=strategy, schedule=schedule,
        folder=folder, **options, **QUIET,
    )  # fmt: skip
    return net, result


def whole(net: nn.Module) -> dict[str, Tensor]:
    """All that is trained, of a network that may be spread over processes."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()
        for name, value in net.state_dict().items()
    }


def same_as_alone(make: Callable[[], nn.Module], folder: Path, **settings: Any) -> None:
    with environment(ALONE):
        alone, expected = trained(make, None, **settings)
    together, result = trained(make, folder / "together", **settings)
    assert_close(whole(together), whole(alone), rtol=1e-9, atol=1e-12)
    for row, other in zip(result.history, expected.history, strict=True):
        assert_close({**row, "seconds": 0}, {**other, "seconds": 0}, rtol=1e-6, atol=1e-9)
    assert_close([row["loss"] for row in result.steps], [row["loss"] for row in expected.steps])
    assert_close(result.after, expected.after)
    assert_close(result.old_after, expected.old_after)
    assert result.confusion == expected.confusion
    fresh = make()
    gift.load(fresh, folder / "together" / "last.safetensors")
    assert_close(dict(fresh.state_dict()), whole(alone), rtol=1e-9, atol=1e-12)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Examples that are other ones whenever they are read."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        inputs, labels = data(37)
        return inputs[place] + 0.1 * torch.randn(6) + random.random(), labels[place]


def goes_on(folder: Path, parallel: str, together_again: bool) -> None:
    """A run that was killed goes on in both processes, or in one alone.

    Where both go on, it draws random numbers, and ends where it would have ended.
    """
    settings = {"parallel": parallel, "checkpoint_steps": 2, "batch_size": 8}
    if together_again:
        settings |= {"train": Noisy()}
        alone, _ = trained(perceptron, None, **settings)
    else:
        with environment(ALONE):
            alone, _ = trained(perceptron, None, **settings)
    plain_step, steps = loop.train_step, []

    class Killed(BaseException):
        pass

    def step(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 8:
            raise Killed
        return plain_step(*args)

    loop.train_step = step
    try:
        trained(perceptron, folder / "killed", **settings)
    except Killed:
        pass
    finally:
        loop.train_step = plain_step
    if together_again:
        net, result = trained(perceptron, folder / "killed", **settings)
    else:
        dist.barrier()
        if dist.get_rank() == 1:
            dist.barrier()
            return
        with environment(ALONE):
            net, result = trained(perceptron, folder / "killed", **settings)
        dist.barrier()
    assert len(steps) == 8
    assert len(result.steps) == 15
    assert_close(whole(net), whole(alone), rtol=1e-9, atol=1e-12)


def stops_together(folder: Path, parallel: str, ranks: tuple[int, ...]) -> None:
    """SIGTERM to one process, or to both at different steps: both write a checkpoint and end.

    The same call goes on, draws the same random numbers, and ends where it would have ended.
    """
    settings = {"parallel": parallel, "batch_size": 8, "train": Noisy()}
    alone, _ = trained(perceptron, None, **settings)

    class Terminated(Callback):
        def on_step_end(self, run: Any, row: Any) -> None:
            if dist.get_rank() in ranks and row["step"] == 8 - dist.get_rank():
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        trained(perceptron, folder / "stopped", callbacks=[Terminated()], **settings)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    net, result = trained(perceptron, folder / "stopped", **settings)
    assert len(result.steps) == 15
    assert_close(whole(net), whole(alone), rtol=1e-9, atol=1e-12)


def milestones() -> UnfreezeMilestones:
    return UnfreezeMilestones(unfreeze_milestones=(1, 2), num_layers=1, head="5")


SCENARIOS: dict[str, Callable[[Path], None]] = (
    {
        f"{parallel}, {name}": (
            lambda folder, parallel=parallel, make=make, settings=settings: same_as_alone(
                make, folder, parallel=parallel, **settings
            )
        )
        for parallel in ("ddp", "fsdp")
        for name, make, settings in [
            ("plain", perceptron, {"metrics": None}),
            ("convolutional", convolutional, {}),
            ("transformer", transformer, {}),
            ("batches together", perceptron, {"accumulate": 2, "clip": 0.1}),
            ("one example left", perceptron, {"examples": 33}),
            ("one at a time", perceptron, {"examples": 9, "batch_size": 1}),
            ("schedule", perceptron, {"schedule": milestones}),
            ("momentum", perceptron, {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}}),
        ]
    }
    | {
        f"{parallel}, killed, {'both' if both else 'one'} go on": (
            lambda folder, parallel=parallel, both=both: goes_on(folder, parallel, both)
        )
        for parallel in ("ddp", "fsdp")
        for both in (True, False)
    }
    | {
        f"{parallel}, SIGTERM to {ranks}": (
            lambda folder, parallel=parallel, ranks=ranks: stops_together(folder, parallel, ranks)
        )
        for parallel, ranks in [("ddp", (0,)), ("ddp", (1,)), ("fsdp", (1,)), ("fsdp", (0, 1))]
    }
)


def play(rank: int, folder: Path, seconds: int) -> None:
    """Play all scenarios, and write how each went: nothing, or what went wrong."""
    torch.set_num_threads(1)
    loop.write_report = lambda *_: None  # which takes longer than the runs
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        own = folder / f"scenario{number}"
        try:
            scenario(own)
            report = ""
        except BaseException:
            report = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(report)
        dist.barrier()
    dist.destroy_process_group()
