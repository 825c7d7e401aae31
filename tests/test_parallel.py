"""Tensor parallelism with two gloo processes on this machine, see `_parallel_worker`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate

from gift.core.weights.parallel import spread_parameters
from gift.errors import AdaptationError
from gift.layers.layouts import raw_layout
from gift.methods import LoRA
from tests._parallel_worker import SCENARIOS, play
from tests.two_processes import check_report, play_in_two


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes wrote how each scenario went."""
    return play_in_two(play, tmp_path_factory.mktemp("played"), 60, 400)


NOT_BY_OLD = {
    "low_precision": "forgets the mask of words that were looked up twice in 16 bits",
    "no_more_is_communicated": "CommDebugMode fails in the backward pass, of the base as well",
    "disabling_what_was_made_parallel_gives_the_parallel_base[before]": "unfreezes embeddings",
}
"""What ``parallelize_module`` of torch 2.6 does that keeps a scenario from being played."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(name: str, played: Path) -> None:
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)
    for start, reason in NOT_BY_OLD.items() if old else ():
        if name.startswith(start):
            pytest.skip(f"torch 2.6 {reason}")
    check_report(name, played)


def test_a_quantised_weight_is_not_spread() -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 32)
    quantisation.quantize_(layer, quantisation.Int8WeightOnlyConfig())
    spread: Any = SimpleNamespace(placements=(Replicate(),), to_local=lambda: layer.weight)
    layout = raw_layout((32, 64))
    with pytest.raises(AdaptationError, match="quantised and tensor parallelism spreads it"):
        spread_parameters(LoRA(rank=2), layout, spread, {})
