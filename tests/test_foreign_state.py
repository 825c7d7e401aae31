"""What authors keep in their modules is theirs: gift neither writes nor copies what it did not
change, and gives back what actions changed, whatever interrupts it.
"""

import sys
import types
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift.core.undo.snapshot import Snapshot
from gift.strategies import LoRAAllFineTuningStrategy

from .common import bits


class Refuses(OrderedDict[Any, Any]):
    """A dictionary that refuses to be written once it is made, as `FrozenDict` of diffusers."""

    def __init__(self, *args: Any) -> None:
        for key, value in dict(*args).items():
            self[key] = value
        self.closed = True

    def __setitem__(self, key: Any, value: Any) -> None:
        if getattr(self, "closed", False):
            raise TypeError("closed")
        super().__setitem__(key, value)

    def _refused(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "closed", False):
            raise TypeError("closed")
        raise AttributeError

    clear = update = pop = setdefault = __delitem__ = move_to_end = copy = _refused
    __eq__ = __bool__ = keys = items = _refused  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Stubborn(list[Any]):
    """A list none of whose methods may be called by anybody."""

    def _refused(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("stubborn")

    clear = extend = append = copy = __iter__ = __len__ = __eq__ = _refused  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Counting(dict[Any, Any]):
    """A dictionary that counts how often it is written."""

    writes = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.writes += 1
        super().__setitem__(key, value)


class Net(nn.Module):
    """Attributes of many kinds, some of which refuse to be written or compared."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.config = Refuses({"a": 1, "b": torch.zeros(2)})
        self.parts = Stubborn([torch.zeros(1), torch.zeros(1)])
        self.counting = Counting(a=1)
        self.user = UserDict({"a": 1})
        self.proxy = types.MappingProxyType({"a": 1})
        self.default: Any = defaultdict(list, a=[1])
        self.counter = Counter("abc")
        self.queue = deque([1, 2, 3], maxlen=3)
        self.ordered = OrderedDict(a=1, b=2)
        self.tensors = {"x": torch.zeros(2), 3: torch.ones(2)}
        self.set = {"a", ("b", 1)}
        self.weak = weakref.WeakValueDictionary({"inner": self.inner})
        self.reference = weakref.ref(self.inner)
        self.shared: dict[str, Any] = {"one": 1}
        self.inner[0].shared = self.shared
        self.nothing: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Slotted(Net):
    __slots__ = ("empty", "mark")

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "mark", 1)


class Closed(Net):
    """A module that refuses to have attributes set or removed once it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["closed"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("closed") and name != "training":
            raise TypeError("closed")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise TypeError("closed")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("any_"):
            return name
        return super().__getattr__(name)


def _held(net: Any) -> dict[str, Any]:
    """What its containers hold, by the methods of the built-in classes."""
    return {
        "config": list(OrderedDict.items(net.config)),
        "parts": list(list.__iter__(net.parts)),
        "writes": net.counting.writes,
        **{name: list(getattr(net, name).items()) for name in ("user", "default", "ordered")},
        **{name: list(getattr(net, name).items()) for name in ("counter", "tensors", "shared")},
        "queue": (list(net.queue), net.queue.maxlen),
        "set": set(net.set),
        "weak": dict(net.weak),
        "attributes": list(vars(net)),
        "objects": [id(value) for value in vars(net).values()],
        "training": [(name, m.training) for name, m in net.named_modules()],
        "types": [type(m) for m in net.modules()],
    }


@pytest.mark.parametrize("kind", [Net, Slotted, Closed])
def test_containers_of_the_author_come_through_every_operation(kind: Any) -> None:
    torch.manual_seed(0)
    net, x = kind(), torch.randn(3, 4)
    held, looks = _held(net), _look(net)
    gift.plan_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    assert _same(_held(net), held)
    assert _look(net) == looks
    with pytest.raises(ValueError, match="no cap"):
        gift.enable_fine_tuning(net, gift.FineTuningStrategy([(lambda *_: False, print)]))
    assert _look(net) == looks
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    nn.init.normal_(net.inner[0].lora_B)
    tuned = net.eval()(x)
    with gift.merged(net):
        torch.testing.assert_close(net(x), tuned)
    assert torch.equal(net(x), tuned)
    with gift.disabled(net):
        pass
    assert torch.equal(net(x), tuned)
    net.train()
    gift.disable_fine_tuning(net)
    assert _same(_held(net), held)
    assert _look(net) == looks


def _look(net: nn.Module) -> Any:
    """Classes, attributes by identity, torch's own containers, and all of the tensors."""
    own = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_load_state_dict_post_hooks")
    tensors = [t for m in net.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    return (
        [(type(m), {name: id(value) for name, value in vars(m).items()}) for m in net.modules()],
        [[(k, id(v)) for k, v in vars(m)[key].items()] for m in net.modules() for key in own],
        [
            (
                bits(t),
                t.requires_grad,
                id(t.grad),
                t.dtype,
                None if t.grad is None else bits(t.grad),
            )
            for t in tensors
            if t is not None
        ],
    )


def _same(one: Any, other: Any) -> bool:
    """The same objects; tensors do not compare."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _spoil(net: Any) -> None:
    """What an action of a user may do to a network."""
    OrderedDict.__setitem__(net.config, "a", 2)
    OrderedDict.__setitem__(net.config, "c", 3)
    list.append(net.parts, 3)
    dict.pop(net.counting, "a")
    net.default["new"].append(1)
    net.counter.update("xyz")
    net.queue.extend([4, 5])
    net.ordered.move_to_end("a")
    net.tensors["x"] = torch.ones(2)
    net.tensors = {**net.tensors, "y": 1}
    net.set.discard("a")
    net.set.add("z")
    net.shared["two"] = 2
    net.nothing["now"] = 1
    if isinstance(net, Slotted):
        object.__setattr__(net, "mark", 2)
        object.__setattr__(net, "empty", 3)
    net.inner[0].double()
    net.inner[0].weight.grad = torch.ones(4, 4, dtype=torch.float64)
    net.inner[0].bias.requires_grad_(False)
    net.inner[1].running_mean.data = torch.ones(7)
    net.inner[1] = nn.Identity()
    net.inner[2].register_forward_hook(print)
    net.inner[2].weight = nn.Parameter(torch.ones(2, 4))
    net.inner.eval()
    del net.reference


@pytest.mark.parametrize("kind", [Net, Slotted])
def test_rolling_back_restores_what_actions_changed(kind: Any) -> None:
    net = kind()
    net.inner[0].weight.grad = torch.zeros(4, 4)
    held, looks = _held(net), _look(net)

    def spoil(parent: Any, *place: Any) -> None:
        _spoil(net)
        raise RuntimeError("spoiled")

    with pytest.raises(RuntimeError, match="spoiled"):
        gift.enable_fine_tuning(net, gift.FineTuningStrategy([(lambda *_: True, spoil)]))
    assert _same(_held(net), held)
    assert _look(net) == looks
    assert getattr(net, "mark", 1) == 1
    assert not hasattr(net, "empty")


class _Interrupt(BaseException):
    pass


@contextmanager
def _interrupted(at: int, files: tuple[str, ...]) -> Iterator[list[int]]:
    """Within it, an exception at the given line of those that run in the files."""
    count = [0]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            count[0] += 1
            if count[0] == at:
                raise _Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def test_rolling_back_is_completed_when_it_is_interrupted_at_any_line() -> None:
    net = Slotted()
    net.inner[0].weight.grad = torch.zeros(4, 4)
    held, looks = _held(net), _look(net)
    files = (
        "gift/core/undo/snapshot.py",
        "gift/core/undo/undo.py",
        "gift/core/undo/containers.py",
        "gift/core/dynamic_class.py",
        "gift/support/tensors.py",
    )

    def attempt(at: int) -> int:
        snapshot = Snapshot(net)
        with snapshot.values:
            _spoil(net)
            with torch.no_grad():
                net.inner[2].bias.zero_()
        with _interrupted(at, files) as count:
            if at:
                with pytest.raises(_Interrupt):
                    snapshot.rollback()
            else:
                snapshot.rollback()
        assert _same(_held(net), held), at
        assert _look(net) == looks, at
        return count[0]

    lines = attempt(0)
    assert lines > 300
    # The first lines are those of `rollback` itself, before anything was done; the last ones, of
    # its return.
    for at in range(5, lines, 7):
        attempt(at)


def test_a_network_that_was_made_for_inference_only() -> None:
    """Its tensors may be trained nowhere, but deltas beside them can be used and taken off."""
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    looks, x = _look(net), torch.randn(3, 4)
    with torch.inference_mode():
        base = net(x)
    with pytest.raises(ValueError, match="no cap"):
        gift.enable_fine_tuning(net, gift.FineTuningStrategy([(lambda *_: False, print)]))
    assert _look(net) == looks
    gift.plan_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    assert _look(net) == looks
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    nn.init.normal_(net[0].lora_B)
    weight = net[0]._parameters["weight"] + net[0].lora_B @ net[0].lora_A
    with torch.inference_mode():
        tuned = net(x)
        hidden = net[1](nn.functional.linear(x, weight, net[0].bias))
        torch.testing.assert_close(tuned, net[2](hidden))
        with gift.merged(net):
            torch.testing.assert_close(net(x), tuned)
        with gift.disabled(net):
            torch.testing.assert_close(net(x), base, rtol=0, atol=0)
        torch.testing.assert_close(net(x), tuned, rtol=0, atol=0)
    gift.disable_fine_tuning(net)
    assert _look(net) == looks


def test_attributes_that_a_class_computes_are_left_alone() -> None:
    """A property over what stands in ``__dict__``, and one module's state in another's."""

    class Proxied(nn.Linear):
        @property
        def notes(self) -> Any:
            return list(OrderedDict.items(self.__dict__["notes"]))

    net = nn.Sequential(Proxied(4, 4), nn.Linear(4, 4))
    net[0].__dict__["notes"] = Refuses({"a": 1})
    net[1].other = net[0].__dict__  # type: ignore[assignment]
    looks = [list(vars(m)) for m in net.modules()]
    gift.plan_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    assert [list(vars(m)) for m in net.modules()] == looks
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    gift.disable_fine_tuning(net)
    assert [list(vars(m)) for m in net.modules()] == looks
    assert net[1].other is vars(net[0])
