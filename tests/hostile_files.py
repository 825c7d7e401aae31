"""Files that nobody should trust, made of a good one; for tests and for `benchmarks/fuzz.py`."""

import contextlib
import faulthandler
import functools
import inspect
import io
import json
import random
import resource
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import gift
from gift import DeltaFileError, FineTuningStrategy, enable_fine_tuning, merge_strategies
from gift.factories import ma_adapt
from gift.files import container
from gift.files.digests import digests
from gift.strategies import (
    BottleneckFineTuningStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    VeRALinearFineTuningStrategy,
)
from gift.support.recipes import REGISTRY
from tests.common import full_state

Header = dict[str, Any]
Tensors = dict[str, Tensor]


def assembled(header: Any, tensors: Tensors) -> bytes:
    """A file with that header and those tensors, in which all digests are right."""
    own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if isinstance(header, dict) and isinstance(header.get("tensors"), dict):
        header = header | {"tensors": digests(own)}
    text = json.dumps(header)
    return save(own, {"format": "pt", "gift": text, "sha256": sha256(text.encode()).hexdigest()})


def rewritten(path: Path, change: Callable[[Header, Tensors], Any]) -> None:
    """Change what a good file says, and sign it anew."""
    header, tensors = container.read(path)
    change(header, tensors)
    path.write_bytes(assembled(header, tensors))


def damaged(good: bytes, other: bytes) -> bool:
    """Whether a file says anything else than the good one, beside what has no meaning."""

    def content(data: bytes) -> Any:
        head, payload = split(data)
        own = {"gift", "sha256", "dtype", "shape", "data_offsets"}
        return {n: {k: e[k] for k in own & {*e}} for n, e in head.items()}, payload

    try:
        return content(good) != content(other)
    except Exception:  # it says nothing at all
        return True


# --- bytes ---------------------------------------------------------------------------------------

Draw = random.Random
NUMBERS = (0, 1, 7, 8, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def truncated(good: bytes, draw: Draw) -> bytes:
    return good[: draw.randrange(len(good))]


def flipped(good: bytes, draw: Draw) -> bytes:
    data = bytearray(good)
    for _ in range(draw.choice((1, 1, 2, 16))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def spliced(good: bytes, draw: Draw) -> bytes:
    """A part removed, repeated, moved, or other bytes in its place."""
    start, stop = sorted(draw.randrange(len(good)) for _ in range(2))
    stop = min(stop, start + draw.choice((1, 4, 64, 4096)))
    other = draw.randrange(len(good))
    part = draw.choice((b"", draw.randbytes(stop - start), good[start:stop] * 2, good[other:][:64]))
    return good[:start] + part + good[stop:]


def with_numbers(good: bytes, draw: Draw) -> bytes:
    """A large number where there may be a size."""
    data, place = bytearray(good), draw.choice((0, 0, 8 * draw.randrange(len(good) // 8)))
    data[place : place + 8] = struct.pack("<Q", draw.choice(NUMBERS))
    return bytes(data)


def split(good: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + struct.unpack("<Q", good[:8])[0]
    return json.loads(good[8:end]), good[end:]


def container_of(text: str, payload: bytes) -> bytes:
    data = text.encode(errors="replace")
    return struct.pack("<Q", len(data)) + data + payload


def other_container(good: bytes, draw: Draw) -> bytes:
    """The safetensors header itself, with nonsense in its shapes, offsets and types."""
    head, payload = split(good)
    for _ in range(draw.choice((1, 1, 3))):
        entry = head[draw.choice(list(head))]
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            mutate(head, draw)
            return container_of(json.dumps(head), payload)
        value: Any = draw.choice((*NUMBERS, -1, 10**30, 1.5, None, "1", [], NAN))
        key = draw.choice(("shape", "data_offsets", "dtype"))
        if key == "dtype":
            entry[key] = draw.choice(("F64", "F4", "BOOL", "C64", "F8_E4M3", "X", "", value))
        else:
            spot = draw.randrange(len(entry[key]) + 1)
            entry[key][spot : spot + draw.choice((0, 1, 1))] = [value] * draw.choice((1, 1, 40))
    text = json.dumps(head)
    if draw.random() < 0.2:  # a key twice
        name = draw.choice(list(head))
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(head[name])}}}"
    return container_of(text, payload)


def nested(good: bytes, draw: Draw) -> bytes:
    depth = draw.choice((50, 126, 127, 128, 500, 990, 1000, 5000, 100_000))
    left, right = draw.choice((("[", "]"), ('{"a":', "}"), ('{"__metadata__":', "}")))
    return container_of(left * depth + "1" + right * depth, b"")


# --- files whose digests are right ---------------------------------------------------------------

NAN = float("nan")
WORDS = (
    "", "weight", "0", "0.weight", "4", "lora", "rank", "name", "init_paras", "regex", "*",
    "float32", "float8_e4m3fn", "float4_e2m1fn_x2", "__class__", "__init__", "os.system", "\0",
    "\x1b[2J", "\ud7ff", "a" * 5000, ".", "..", "*" * 40, "[" * 40, "(a+)+$",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 10**6, 2**31, 2**63, 10**12, 10**400, -(10**30), 0.0, -0.0,
    0.5, 1e308, 1e-320, NAN, float("inf"), *WORDS, [], {}, [[]], [1, 2], {"a": 1}, {"": None},
)  # fmt: skip


def value(draw: Draw) -> Any:
    """Any value; or a thing that files can name, with arguments that it may have."""
    if draw.random() < 0.6:
        return draw.choice(VALUES)
    return thing(draw, 3)


def thing(draw: Draw, depth: int) -> Any:
    name = draw.choice(sorted(REGISTRY))
    parameters = inspect.signature(REGISTRY[name]).parameters
    paras: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty or draw.random() < 0.3:
            several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            paras["*" if several else key] = argument(key, draw, depth)
    return {"name": name, "init_paras": paras}


def argument(key: str, draw: Draw, depth: int) -> Any:
    if depth and key.endswith("caps"):
        return [[thing(draw, depth - 1) for _ in range(2)] for _ in range(draw.randrange(3))]
    if depth and key in ("strategies", "checks", "names", "paths"):
        return [thing(draw, depth - 1) if key < "n" else "4" for _ in range(draw.randrange(3))]
    if depth and key in ("strategy", "after", "at", "head"):
        return thing(draw, depth - 1)
    if key in ("rank", "size", "num_classes", "num_virtual_tokens", "number", "block_size"):
        return draw.choice((1, 2, 2, 4, 10**6, 10**9, 10**12, 2**62, 10**30))
    return draw.choice(VALUES)


def places(data: Any, depth: int = 0) -> Any:
    """All containers in plain data with their keys."""
    keys = data.keys() if isinstance(data, dict) else range(len(data) if type(data) is list else 0)
    for key in list(keys):
        yield data, key
        if depth < 12:
            yield from places(data[key], depth + 1)


def mutate(data: Any, draw: Draw) -> None:
    """Replace, remove, repeat or swap something in plain data."""
    found = list(places(data))
    holder, key = draw.choice(found)
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(WORDS)] = holder[key]
    elif kind == 2:
        other, place = draw.choice(found)
        if isinstance(other, dict) == (place in other) or isinstance(other, list):
            holder[key] = json.loads(json.dumps(other[place]))
    elif kind == 3:
        holder[key] = [holder[key]]
    else:
        holder[key] = value(draw)


def other_tensor(tensor: Tensor, draw: Draw) -> Tensor:
    dtype = draw.choice((torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.complex64))
    shape = draw.choice(((), (0,), (1, 1, 1, 1, 1, 1, 1, 1), (2**20, 0), (3, 5)))
    return draw.choice(
        (tensor.flatten(), tensor.to(dtype), tensor / 0, torch.ones(shape), tensor[:0])
    )


def other_header(header: Header, tensors: Tensors, draw: Draw) -> Any:
    """What a file says, with nonsense in it."""
    header, tensors = json.loads(json.dumps(header)), dict(tensors)
    if draw.random() < 0.35:
        header["strategy"] = thing(draw, 3)
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        kind = draw.randrange(8)
        try:
            if kind < 6:
                mutate(header, draw)
            elif kind == 6 and tensors:
                name = draw.choice(sorted(tensors))
                tensors[name] = other_tensor(tensors[name], draw)
            else:
                tensors.pop(draw.choice(sorted(tensors)), None)
        except (IndexError, KeyError):  # nothing is left
            break
    return assembled(header, tensors)


BYTES = (truncated, flipped, spliced, with_numbers, other_container, nested)


class Hostile:
    """An endless source of files, the same for the same seed.

    Args:
        good: files of `gift.save`.
        seed: of the draws.
        consistent: the share of files whose digests are right.
    """

    def __init__(self, good: list[Path], seed: int, consistent: float) -> None:
        self.good = [(path.read_bytes(), *container.read(path)) for path in good]
        self.draw = Draw(seed)
        self.consistent = consistent

    def next(self) -> tuple[str, bytes, bool]:
        """The kind of a file, its bytes, and whether it may be loaded."""
        data, header, tensors = self.draw.choice(self.good)
        if self.draw.random() < self.consistent:
            return "signed nonsense", other_header(header, tensors, self.draw), True
        kind = self.draw.choice(BYTES)
        made = kind(data, self.draw)
        return kind.__name__, made, not damaged(data, made)


# --- trying them ---------------------------------------------------------------------------------


def plain_network() -> nn.Module:
    """Small, with a number of classes that a new head changes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.LSTM(6, 4), nn.Linear(4, 6)
    )
    net.config = SimpleNamespace(num_labels=6)
    return net


STRATEGIES: tuple[FineTuningStrategy, ...] = (
    LoRAAllFineTuningStrategy(rank=2),
    merge_strategies([HeadReplacementStrategy(3), FullFineTuningStrategy()]),
    merge_strategies([BottleneckFineTuningStrategy(2, after="4"), VeRALinearFineTuningStrategy()]),
    FineTuningStrategy([(lambda *place: place[2] in "04", ma_adapt("lokr"))]),
)


def tuned_network(strategy: FineTuningStrategy) -> nn.Module:
    net = plain_network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enable_fine_tuning(net, strategy)
    net[1](torch.randn(4, 6, 2, 2))
    return net


def good_files(folder: Path) -> list[Path]:
    paths = [folder / f"good-{n}.safetensors" for n in range(len(STRATEGIES))]
    for path, strategy in zip(paths, STRATEGIES, strict=True):
        gift.save(tuned_network(strategy), path)
    return paths


def attempt(path: Path, net: nn.Module, check_base: bool) -> str:
    """Load a file and look at it; what came of it."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            str(gift.inspect(path))
            gift.load(net, path, check_base=check_base)
        except DeltaFileError:
            return "refused"
        except Exception:
            return traceback.format_exc()
    return "loaded"


def try_many(
    folder: Path, seed: int, count: int, consistent: float, seconds: int
) -> dict[str, Any]:
    """Try `count` files on networks; this process is killed where one of them takes too long."""
    source = Hostile(good_files(folder), seed, consistent)
    makers = [plain_network, *(functools.partial(tuned_network, s) for s in STRATEGIES[:1])]
    nets = [make() for make in makers]
    full_states = [full_state(net) for net in nets]
    outcomes, memory, start = Counter[str](), peak_memory(), time.perf_counter()
    wrong: list[dict[str, str]] = []
    path = folder / "hostile.safetensors"
    for number in range(count):
        kind, data, harmless = source.next()
        path.write_bytes(data)
        which = number % len(nets)
        faulthandler.dump_traceback_later(seconds, exit=True)
        outcome = attempt(path, nets[which], source.draw.random() < 0.5)
        finite = all(torch.isfinite(p).all() for p in nets[which].parameters())
        if outcome == "loaded" and harmless and finite:
            nets[which] = makers[which]()
            full_states[which] = full_state(nets[which])
        elif outcome != "refused" or full_state(nets[which]) != full_states[which]:
            keep = folder / f"wrong-{seed}-{number}"
            keep.write_bytes(data)
            nets[which] = makers[which]()
            full_states[which] = full_state(nets[which])
            wrong.append({"kind": kind, "file": str(keep), "what": outcome})
            outcome = "wrong"
        outcomes[f"{kind}: {outcome}"] += 1
    faulthandler.cancel_dump_traceback_later()
    return {
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
        "seconds": round(time.perf_counter() - start, 1),
        "memory_mb": round(peak_memory() - memory, 1),
    }


def peak_memory() -> float:
    """In MB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, *numbers = sys.argv[1:]
    seed, count, consistent, seconds = (float(number) for number in numbers)
    result = try_many(Path(place), int(seed), int(count), consistent, int(seconds))
    (Path(place) / "result.json").write_text(json.dumps(result), encoding="utf-8")
