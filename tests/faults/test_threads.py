"""Threads compute with a network while others change it: each call is of one network, whole."""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
import gift.support.threads
from gift import DeltaBank
from gift.private.torch import calls
from gift.strategies import LoRAAllFineTuningStrategy
from tests.common import all_bits, enabled, full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.GiftWarning")

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def network() -> Any:
    torch.manual_seed(2)
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(12)])


def banked() -> tuple[Any, DeltaBank]:
    net = network()
    bank = DeltaBank(net)
    for name in "ab":
        enabled(net)
        bank.add(name)
        bank.activate(None)
    bank.activate("a")
    return net, bank


@contextmanager
def computing(net: Any, outputs: list[Tensor], number: int = 3) -> Iterator[None]:
    """Within it, so many threads call the network; each of their outputs is one of these."""
    ended, wrong, calls = threading.Event(), [], []

    def work() -> None:
        try:
            with torch.no_grad():
                while not ended.is_set():
                    output = net(X)
                    calls.append(1)
                    if not any(torch.allclose(output, one, atol=1e-5) for one in outputs):
                        wrong.append(output)
        except BaseException as error:  # of a thread, told in the test
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not wrong, (len(wrong), len(calls), wrong[0])
    assert calls


def _within(block: Any) -> None:
    with block:
        time.sleep(0.001)


SWITCHES: dict[str, Callable[[Any, DeltaBank], Any]] = {
    "merged": lambda net, bank: _within(gift.merged(net)),
    "disabled": lambda net, bank: _within(gift.disabled(net)),
    "activate": lambda net, bank: bank.activate("b" if bank.active == "a" else "a"),
    "deactivate": lambda net, bank: bank.activate(None if bank.active else "a"),
    "scale": lambda net, bank: (bank.scale("b", 2.0), bank.scale("b", 0.5)),
    "combine": lambda net, bank: (bank.combine({"a": 1.0, "b": 2.0}), bank.remove("combined")),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_each_call_is_of_one_network(name: str) -> None:
    """Of `a`, of `b`, or of the base, which is what there is between; never of parts of two."""
    net, bank = banked()
    outputs = []
    with torch.no_grad():
        for delta in (None, "b", "a"):
            bank.activate(delta)
            outputs.append(net(X))
    before = all_bits(net)
    with computing(net, outputs):
        for _ in range(40):
            SWITCHES[name](net, bank)
    bank.activate("a")
    assert all_bits(net) == before
    assert "_compiled_call_impl" not in vars(net)


@pytest.mark.parametrize("act", [gift.merge, gift.disable_fine_tuning])
def test_deltas_are_taken_off_for_good(act: Any) -> None:
    for _ in range(5):
        net = enabled(network())
        with torch.no_grad():
            outputs = [net(X), network()(X)][: 1 if act is gift.merge else 2]
        with computing(net, outputs):
            time.sleep(0.002)
            act(net)
            time.sleep(0.002)


def test_threads_switch_one_network_in_turn() -> None:
    net, bank = banked()
    before = all_bits(net)

    def work(number: int) -> None:
        for turn in range(15):
            bank.activate(("a", "b", None)[(number + turn) % 3])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    bank.activate("a")
    assert all_bits(net) == before


def test_two_threads_in_rows_leave_the_network_free() -> None:
    """One computes; the other is refused, or comes afterwards and is right as well."""
    net, bank = banked()
    expected = []
    with torch.no_grad():
        for name in ("a", "b", None, "a"):
            bank.activate(name)
            expected.append(net(X)[len(expected)])
    before, refused = full_state(net), []

    def work(_: int) -> int:
        right = 0
        for _ in range(15):
            try:
                with bank.rows(["a", "b", None, "a"]), torch.no_grad():
                    torch.testing.assert_close(net(X), torch.stack(expected))
                right += 1
            except RuntimeError as error:
                refused.append(str(error))
        return right

    with ThreadPoolExecutor(3) as pool:
        right = sum(pool.map(work, range(3)))
    assert right
    assert {"computing rows" in why for why in refused} <= {True}
    assert full_state(net) == before
    with bank.rows(["a", "b", None, "a"]), torch.no_grad():
        torch.testing.assert_close(net(X), torch.stack(expected))


def test_another_thread_cannot_compute_rows() -> None:
    net, bank = banked()
    with bank.rows(["a", "b", None, "a"]), ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match="rows for another thread"):
            pool.submit(net, X).result()
        net(X)


@pytest.mark.parametrize("within", [gift.merged, gift.disabled])
def test_threads_compute_within_a_block(within: Any) -> None:
    net = enabled(network())
    with within(net), ThreadPoolExecutor(3) as pool:
        expected = net(X)
        assert all(torch.equal(output, expected) for output in pool.map(net, [X] * 20))


def test_threads_enable_networks_of_their_own() -> None:
    def work(_: int) -> bool:
        x = torch.randn(2, 16)
        for _ in range(5):
            net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
            base = copy.deepcopy(net)
            expected = base(x)
            gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
            assert torch.equal(net(x), expected)
            net(x).sum().backward()
            torch.optim.SGD(net.parameters(), 0.1).step()
            with gift.disabled(net):
                assert torch.equal(net(x), expected)
            gift.disable_fine_tuning(net)
            assert all_bits(net) == all_bits(base)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


class Slow(nn.Module):
    """Begins a forward pass, and goes on when it is let; calls itself, as generation does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def generate(self, x: Tensor) -> Tensor:
        self.begun.set()
        assert self.go_on.wait(20)
        return self(self(x))

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError


def test_a_change_waits_for_the_method_that_began_before_and_lets_its_calls_through() -> None:
    net = enabled(Slow())
    expected = net(net(X)).detach()
    with ThreadPoolExecutor(2) as pool:
        generated = pool.submit(net.generate, X)
        assert net.begun.wait(20)
        change = pool.submit(gift.disable_fine_tuning, net)
        time.sleep(0.05)
        assert not change.done()
        net.go_on.set()
        assert torch.equal(generated.result(20), expected)
        change.result(20)
    assert not any("lora" in name for name, _ in net.named_parameters())


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gift.support.threads, "LONGEST", 0.05)
    net = enabled(Slow())
    with ThreadPoolExecutor(1) as pool:
        generated = pool.submit(net.generate, X)
        assert net.begun.wait(20)
        before = full_state(net)
        for act in (gift.disable_fine_tuning, gift.merge, lambda n: gift.merged(n).__enter__()):
            with pytest.raises(RuntimeError, match="has been computing with it for"):
                act(net)
        assert full_state(net) == before
        net.go_on.set()
        generated.result(20)
        gift.disable_fine_tuning(net)


def test_a_block_ends_although_another_thread_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = enabled(Slow())
    before = full_state(net)
    with ThreadPoolExecutor(1) as pool:
        block = gift.disabled(net)
        block.__enter__()
        generated = pool.submit(net.generate, X)
        assert net.begun.wait(20)
        monkeypatch.setattr(gift.support.threads, "LONGEST", 0.05)
        with pytest.raises(RuntimeError, match="was still computing"):
            block.__exit__(None, None, None)
        assert full_state(net) == before
        net.go_on.set()
        generated.result(20)


@pytest.mark.parametrize("place", [True, False])
def test_a_call_that_torch_compiled_is_kept(place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that place in torch a change waits for others, and holds nobody back."""
    if not place:
        monkeypatch.setattr(calls, "_COMPILED_CALL", "gone")
    net = enabled(network())
    net.compile(backend="eager")
    expected, compiled = net(X).detach(), net._compiled_call_impl
    ended = threading.Event()
    waiting = threading.Thread(target=ended.wait)
    waiting.start()
    try:
        with gift.merged(net):
            torch.testing.assert_close(net(X).detach(), expected, rtol=1e-4, atol=1e-4)
        with gift.disabled(net):
            pass
    finally:
        ended.set()
        waiting.join()
    assert net._compiled_call_impl is compiled
    assert torch.equal(net(X), expected)
