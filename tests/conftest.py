"""One thread for each worker, and the same random numbers in every test."""

import contextlib
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


@pytest.fixture(scope="module", autouse=True)
def _as_large_in_half_of_the_files(request: pytest.FixtureRequest) -> Iterator[None]:
    """In half of the files layers, which are small, are computed as large ones are."""
    with _computing(as_large=_is_odd(request.path.name)):
        yield


@pytest.fixture(autouse=True)
def _as_large(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked ``as_large`` do so in any file, and half of those marked ``as_both``."""
    marks = {mark.name for mark in request.node.iter_markers()} & {"as_large", "as_both"}
    large = "as_large" in marks or _is_odd(request.node.nodeid)
    with _computing(large) if marks else contextlib.nullcontext():
        yield


def _is_odd(text: str) -> bool:
    return zlib.crc32(text.encode()) % 2 == 1


@contextlib.contextmanager
def _computing(as_large: bool) -> Iterator[None]:
    from gift.kernels import little

    before = little.LITTLE
    little.LITTLE = 0 if as_large else 2**21
    yield
    little.LITTLE = before


@pytest.fixture
def double() -> Iterator[None]:
    """Models in float64: old versions of transformers make their masks of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
