"""The garbage collector waits while a network is changed, and then is as it was."""

import gc
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from torch import nn

import gift
from gift.factories import mc_type
from gift.strategies import Cap, FineTuningStrategy, LoRAAllFineTuningStrategy


@pytest.fixture(params=[True, False])
def collects(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the collector runs as the test begins."""
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.enable()


@pytest.mark.parametrize("error", [None, ValueError, MemoryError, KeyboardInterrupt])
def test_the_collector_is_as_before(collects: bool, error: type[BaseException] | None) -> None:
    seen = []

    def act(*place: object) -> None:
        seen.append(gc.isenabled())
        if error is not None:
            raise error("from the action")

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with nullcontext() if error is None else pytest.raises(error):
        gift.enable_fine_tuning(net, FineTuningStrategy([Cap(mc_type(nn.Linear), act, {})]))
    assert seen  # the action ran
    assert True not in seen
    assert gc.isenabled() is collects


def test_the_collector_runs_within_contexts_of_users(collects: bool) -> None:
    net = nn.Linear(64, 64)
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy())
    for context in (gift.merged, gift.disabled):
        with context(net):
            assert gc.isenabled() is collects
    assert gc.isenabled() is collects
