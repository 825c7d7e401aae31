"""One thread for each worker, and the same random numbers in every test."""

import gc
import os
import zlib
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-device",
        default="cuda",
        choices=["cuda", "cpu"],
        help="where tests/gpu run; cpu tries whether they hold as code",
    )


def pytest_collection_finish() -> None:
    # What torch, transformers and the tests themselves have made by now stays until the end. To go
    # through it again and again for garbage takes a fifth of the time of the tests.
    gc.collect()
    gc.freeze()


@pytest.fixture
def dynamo() -> Iterator[None]:
    """What was compiled before is forgotten, and what the test compiles after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seed() -> None:
    # `torch.manual_seed` formats a stack trace for each kind of device that has not been used yet.
    (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(0)


# Half of the tests of these files compute their layers, which are small, as large ones are.
# Tests that compare with what another process or a fixture of the module did are in other files.
AS_BOTH = {
    f"test_{name}.py"
    for name in ("bank", "bank_rows", "disabled", "every_method", "lora", "matrix", "merging",
                 "stacking", "state", "ties", "torch_features", "unilora")
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_large(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked ``as_large`` compute all layers as large ones are computed."""
    from gift.kernels import little

    half = request.path.name in AS_BOTH and zlib.crc32(request.node.nodeid.encode()) % 2
    before = little.LITTLE
    if half or request.node.get_closest_marker("as_large") is not None:
        little.LITTLE = 0
    yield
    little.LITTLE = before


@pytest.fixture
def double() -> Iterator[None]:
    """Models in float64: old versions of transformers make their masks of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
