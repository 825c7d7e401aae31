"""Every operation that changes a network leaves it as it was, or complete: whatever fails within.

Memory runs out at each tensor operation, once or twice in a row, and signals arrive at random
moments. Afterwards a network is compared with what it was before and with what the operation makes
of it: structure, bits, flags and outputs.
"""

import copy
import functools
import gc
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gift
from gift import DeltaBank
from gift.interop import load_diffusers, load_peft, save_diffusers, save_peft
from gift.interop.kohya import load_kohya, save_kohya
from gift.schedules import FreezeUnfreeze, RankAllocator, UnfreezeMilestones
from gift.strategies import (
    AdaLoRALinearFineTuningStrategy,
    DoRAAllFineTuningStrategy,
    FacTLinearFineTuningStrategy,
    GLoRALinearFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    NormFineTuningStrategy,
    PiSSAAllFineTuningStrategy,
)
from tests.common import all_bits, bits, full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.GiftWarning", "ignore::FutureWarning")

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Statistics, a tied weight, a computed one and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.computed(self.tied(self.norm(self.first(x))))))


def base() -> nn.Module:
    torch.manual_seed(3)
    return Net()


def trained(net: nn.Module, strategy: gift.FineTuningStrategy) -> Any:
    """Fine-tuned, with values and gradients as after some training."""
    gift.enable_fine_tuning(net, strategy)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    net(X).sum().backward()
    return net


def lora() -> gift.FineTuningStrategy:
    return gift.merge_strategies([LoRAAllFineTuningStrategy(rank=2), NormFineTuningStrategy()])


def tuned() -> dict[str, Any]:
    return {"net": trained(base(), lora())}


def bank() -> dict[str, Any]:
    net = trained(base(), lora())
    made = DeltaBank(net)
    made.add("a")
    made.activate(None)
    names = {"b": LoRAAllFineTuningStrategy(rank=1), "c": NormFineTuningStrategy(),
             "d": HeadReplacementStrategy(2, "head")}  # fmt: skip
    for name, strategy in names.items():
        trained(net, strategy)
        made.add(name)
        made.activate(None)
    made.activate("a")
    return {"net": net, "bank": made}


def rowed() -> dict[str, Any]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    made = DeltaBank(net)
    for name in "ab":
        trained(net, LoRAAllFineTuningStrategy(rank=2))
        made.add(name)
        made.activate(None)
    made.activate("a")
    return {"net": net, "bank": made}


def with_state(strategy: Callable[[], Any] = lora) -> dict[str, Any]:
    net = trained(base(), strategy())
    state = {k: v + 0.5 if v.is_floating_point() else v + 1 for k, v in net.state_dict().items()}
    return {"net": net, "state": state}


def with_base() -> dict[str, Any]:
    net = trained(base(), DoRAAllFineTuningStrategy(rank=2))
    new = base().state_dict()
    state = {k: v + 0.5 if v.is_floating_point() else v + 1 for k, v in new.items()}
    return {"net": net, "state": state}


def _within(block: Any) -> None:
    with block:
        pass


BLOCKS = ["first", "norm", "computed"]  # of `Net`; "tied" is the first


def scheduled(step: int | None) -> dict[str, Any]:
    """A schedule on a fine-tuned network, with an optimizer and the scheduler of its rates."""
    net = base()
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
    schedule = UnfreezeMilestones((1, 2), 1, head="head", blocks=BLOCKS, train_bn=None)
    made = {"net": net, "schedule": schedule}
    if step is None:
        return made
    schedule.attach(net)
    rate = torch.tensor(0.1)  # in its memory, as captured graphs need it
    made["optimizer"] = torch.optim.AdamW(net.parameters(), lr=rate)
    made["rates"] = torch.optim.lr_scheduler.LambdaLR(made["optimizer"], lambda epoch: 0.9**epoch)
    for epoch in range(step):
        schedule.step(epoch, made["optimizer"])
        net(X).sum().backward()
        made["optimizer"].step()
        made["rates"].step()
    return made


def gone_back(start: dict[str, Any]) -> None:
    start["schedule"].load_state_dict(start["state"])


def to_go_back() -> dict[str, Any]:
    state = scheduled(1)["schedule"].state_dict()
    return scheduled(3) | {"state": state}


class Bigger(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.part = net


def in_bigger() -> dict[str, Any]:
    made = with_state()
    state = {f"part.{name}": value for name, value in made["state"].items()}
    return {"net": made["net"], "state": state}


@functools.cache
def saved_for_others() -> Path:
    """A folder with a fine-tuned network of linear layers, as PEFT and kohya save it."""
    folder = Path(SAVED.name)
    net = trained(linear(), LoRALinearFineTuningStrategy(rank=2))
    save_peft(net, folder / "peft")
    save_kohya(net, folder / "kohya.safetensors")
    save_diffusers(net, folder / "diffusers.safetensors", name="unet")
    return folder


def linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


def with_files() -> dict[str, Any]:
    return {"net": linear(), "folder": saved_for_others()}


def stacked() -> dict[str, Any]:
    """A trained delta on top of a frozen one."""
    net = trained(base(), lora())
    gift.enable_fine_tuning(net, DoRAAllFineTuningStrategy(rank=1), stack=True)
    return {"net": net}


def stacked_file() -> Path:
    path = Path(SAVED.name) / "stacked.safetensors"
    if not path.exists():
        gift.save(stacked()["net"], path)
    return path


def file_of_lora() -> Path:
    path = Path(SAVED.name) / "lora.safetensors"
    if not path.exists():
        net = trained(base(), lora())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 1
        gift.save(net, path)
    return path


def of_linear(strategy: gift.FineTuningStrategy) -> dict[str, Any]:
    net = linear()
    gift.enable_fine_tuning(net, strategy)
    return {"net": net}


def with_ranks() -> dict[str, Any]:
    """AdaLoRA with gradients, and an allocator that prunes in each step."""
    net = trained(linear(), AdaLoRALinearFineTuningStrategy(rank=3))
    ranks = RankAllocator(target_rank=1, warmup_steps=0, final_steps=0, every=1)
    ranks.attach(net, 4)
    ranks.step()
    return {"net": net, "ranks": ranks}


SAVED = tempfile.TemporaryDirectory()
Made = dict[str, Any]
# fmt: off
OPERATIONS: dict[str, tuple[Callable[[], Made], Callable[[Made], Any]]] = {
    "enable": (lambda: {"net": base()}, lambda m: gift.enable_fine_tuning(m["net"], lora())),
    "enable_pissa": (lambda: {"net": base()}, lambda m: gift.enable_fine_tuning(
        m["net"], PiSSAAllFineTuningStrategy(rank=2))),
    "disable": (tuned, lambda m: gift.disable_fine_tuning(m["net"])),
    "merge": (tuned, lambda m: gift.merge(m["net"])),
    "merged": (tuned, lambda m: _within(gift.merged(m["net"]))),
    "disabled": (tuned, lambda m: _within(gift.disabled(m["net"]))),
    "activate": (bank, lambda m: m["bank"].activate("b")),
    "activate_head": (bank, lambda m: m["bank"].activate("d")),
    "activate_none": (bank, lambda m: m["bank"].activate(None)),
    "add": (bank, lambda m: m["bank"].add("new", strategy=LoRAAllFineTuningStrategy(rank=1))),
    "remove": (bank, lambda m: m["bank"].remove("a")),
    "scale": (bank, lambda m: m["bank"].scale("b", 2.0)),
    "scale_active": (bank, lambda m: m["bank"].scale("a", 2.0)),
    "combine": (bank, lambda m: m["bank"].combine({"a": 0.5, "b": 2.0})),
    "rows": (rowed, lambda m: _within(m["bank"].rows(["a", None, "b"]))),
    "load_state_dict": (with_state, lambda m: m["net"].load_state_dict(m["state"])),
    "load_state_dict_assign": (with_state,
                               lambda m: m["net"].load_state_dict(m["state"], assign=True)),
    "load_base": (with_base, lambda m: m["net"].load_state_dict(m["state"])),
    "load_bigger": (in_bigger, lambda m: Bigger(m["net"]).load_state_dict(m["state"])),
    "attach": (lambda: scheduled(None), lambda m: m["schedule"].attach(m["net"])),
    "attach_another": (lambda: scheduled(2), lambda m: FreezeUnfreeze(
        1, head="head", blocks=BLOCKS[:2], train_bn=False).attach(m["net"])),
    "step": (lambda: scheduled(1), lambda m: m["schedule"].step(1, m["optimizer"])),
    "step_two": (lambda: scheduled(1), lambda m: m["schedule"].step(2, m["optimizer"])),
    "detach": (lambda: scheduled(2), lambda m: m["schedule"].detach()),
    "go_back": (to_go_back, gone_back),
    "load_peft": (with_files, lambda m: load_peft(m["net"], m["folder"] / "peft")),
    "load_diffusers": (with_files, lambda m: load_diffusers(
        m["net"], m["folder"] / "diffusers.safetensors")),
    "stack": (tuned, lambda m: gift.enable_fine_tuning(
        m["net"], DoRAAllFineTuningStrategy(rank=1), stack=True)),
    "stack_from_a_file": (tuned, lambda m: gift.load(m["net"], stacked_file(), stack=True)),
    "load": (lambda: {"net": base()}, lambda m: gift.load(m["net"], file_of_lora())),
    "load_onto_an_enabled_network": (tuned, lambda m: gift.load(m["net"], file_of_lora())),
    "disable_stacked": (stacked, lambda m: gift.disable_fine_tuning(m["net"])),
    "merge_stacked": (stacked, lambda m: gift.merge(m["net"])),
    "enable_shared": (lambda: {"net": linear()}, lambda m: gift.enable_fine_tuning(
        m["net"], FacTLinearFineTuningStrategy(rank=2))),
    "enable_with_bias": (lambda: {"net": linear()}, lambda m: gift.enable_fine_tuning(
        m["net"], GLoRALinearFineTuningStrategy(rank=1))),
    "initialise": (lambda: of_linear(LoRALinearFineTuningStrategy(rank=2)),
                   lambda m: gift.initialise(m["net"], [X])),
    "allocate": (with_ranks, lambda m: m["ranks"].step()),
    "load_kohya": (with_files, lambda m: load_kohya(m["net"], m["folder"] / "kohya.safetensors")),
}
# fmt: on


def look(made: Made) -> Any:
    """All that can be seen: structure, bits, flags, outputs; each delta of a bank as well."""
    net = made["net"]
    seen: dict[str, Any] = {
        path: ((cls.__name__, getattr(cls, "_gift_spec", None)), _without_ids(state))
        for path, (cls, state) in full_state(net).items()
    }
    seen["bits"] = all_bits(net)
    seen["kept"] = _kept(net)
    with torch.no_grad():
        twin = copy.deepcopy(net).eval()
        seen["output"] = bits(twin(X))
    if "ranks" in made:
        state = made["ranks"].state_dict()
        averages = [state[name].items() for name in ("sensitivity", "uncertainty")]
        seen["ranks"] = state["step"], [{n: bits(t) for n, t in one} for one in averages]
    if "schedule" in made:
        seen["schedule"] = _schedule(made)
    if "bank" in made:
        own = copy.deepcopy(made["bank"])
        seen["active"], seen["names"] = own.active, own.names
        for name in [*own.names, None]:
            own.activate(name)
            with torch.no_grad():
                seen[f"output of {name}"] = bits(own.net.eval()(X))
            seen[f"bits of {name}"] = all_bits(own.net)
            seen[f"flags of {name}"] = {n: p.requires_grad for n, p in own.net.named_parameters()}
    return seen


def _kept(net: Any) -> Any:
    record = vars(net).get("_gift_network")
    return record and (
        sorted(record.chosen), sorted(record.late), sorted(record.waiting),
        [(name, bits(v)) for _, name, v in record.undo.values],
        [(name, flag) for _, name, flag in record.undo.requires_grad],
    )  # fmt: skip


def _schedule(made: Made) -> Any:
    """What a schedule, and what it changes beside the network, is."""
    schedule, net = made["schedule"], made["net"]
    noted = vars(net).get("_gift_schedule")
    still = noted and len(noted["still"])
    schedule_state = schedule.state_dict() if schedule.is_attached else None
    if "optimizer" not in made:
        return schedule_state, still
    optimizer, rates = made["optimizer"], made["rates"]
    names = {id(p): name for name, p in nn.Module.named_parameters(net)}
    groups = [
        ([names[id(p)] for p in group["params"]], float(group["lr"]), float(group["initial_lr"]))
        for group in optimizer.param_groups
    ]
    hooks = len(optimizer._optimizer_step_pre_hooks)
    return (
        schedule_state,
        still,
        groups,
        hooks,
        [float(r) for r in rates.base_lrs],
        len(rates.lr_lambdas),
    )


def _without_ids(state: dict[str, Any]) -> Any:
    """Tensors of a second network have other identities, and its modules too."""
    return {
        key: [(name, _plain(v)) for name, v in value] if isinstance(value, list) else None
        for key, value in state.items()
        if key in ("_parameters", "_buffers", "_modules", "training")
    }


def _plain(look: Any) -> Any:
    return (look[1], look[3]) if isinstance(look, tuple) and len(look) == 4 else look is not None


class Failing(TorchDispatchMode):
    """Memory runs out at the operations with these numbers."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count - 1 in self.numbers:
            raise torch.OutOfMemoryError(f"operation {self.count - 1}, {func}")
        return func(*args, **(kwargs or {}))


def outcomes(name: str) -> tuple[Any, Any, int]:
    """What there is before and after, and how many operations there are between."""
    make, operate = OPERATIONS[name]
    made = make()
    before = look(made)
    torch.manual_seed(11)
    with Failing() as counting:
        operate(made)
    return before, look(made), counting.count


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_memory_runs_out_at_each_operation(name: str, failures: int) -> None:
    make, operate = OPERATIONS[name]
    before, after, count = outcomes(name)
    corrupted, step = [], 1 if LONG else max(1, count * failures // 6)
    for number in range(0, count, step):
        if number % 20 == 0:
            gc.collect()  # networks of failures before, which others are compared with until then
        made = make()
        torch.manual_seed(11)
        failing = Failing(*range(number, number + failures))
        try:
            with failing:
                operate(made)
        except Exception:  # readers of files may tell it as an error of their own
            if failing.count <= number:
                raise
        if (now := look(made)) not in (before, after):
            corrupted.append((number, difference(now, before)))
    print(f"\nRESULT {name}: {len(corrupted)} of {len(range(0, count, step))} corrupted, {count}")
    assert not corrupted, corrupted[:3]


LONG = os.environ.get("GIFT_FAULTS") == "long"


def difference(one: Any, other: Any) -> list[str]:
    return [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]


class Arrived(BaseException):
    """A signal: as `KeyboardInterrupt`, nothing that code which handles errors expects."""


@contextmanager
def alarms() -> Iterator[None]:
    def raises(*_: Any) -> None:
        raise Arrived

    before = signal.signal(signal.SIGALRM, raises)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not LONG, reason="moments that no run repeats: a lane, GIFT_FAULTS=long")
@pytest.mark.parametrize("name", OPERATIONS)
def test_signals_at_random_moments(name: str) -> None:
    make, operate = OPERATIONS[name]
    before, after, _ = outcomes(name)
    made = make()
    began = time.perf_counter()
    operate(made)
    lasts = time.perf_counter() - began
    moments, corrupted, arrived = random.Random(0), [], 0
    for number in range(500):
        made = make()
        torch.manual_seed(11)
        gc.collect(0 if number % 20 else 2)
        with alarms():
            handler = signal.getsignal(signal.SIGALRM)
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, moments.random() * lasts))
                operate(made)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Arrived:
                arrived += 1
                # It may have come as torch entered or left a block of its own in the test.
                torch.set_grad_enabled(True)
            assert signal.getsignal(signal.SIGALRM) is handler
        if (now := look(made)) not in (before, after):
            corrupted.append(difference(now, before))
    print(f"\nRESULT {name}: {len(corrupted)} of {arrived} corrupted")
    assert not corrupted, corrupted[:3]
