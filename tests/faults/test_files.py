"""Files: whole or not at all, two that belong together at once, and nothing else is replaced."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gift
from gift.errors import DeltaFileError
from gift.interop import load_peft, save_peft
from gift.strategies import LoRAAllFineTuningStrategy
from gift.support import atomic_files
from gift.support.atomic_files import replace_files, write_bytes, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and limits of posix")


def tuned(value: float = 1.0, rank: int = 2, alpha: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16))
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=rank, lora_alpha=alpha))
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    return net


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16))


WRITERS: dict[str, Any] = {
    "save": lambda path: gift.save(tuned(), path),
    "text": lambda path: write_text(path, "new"),
    "strategy": lambda path: LoRAAllFineTuningStrategy().save_init_paras(path),
}


@posix
@pytest.mark.parametrize("name", WRITERS)
def test_only_files_are_replaced(name: str, tmp_path: Path) -> None:
    """A device, a pipe, a socket and a directory are refused, also at the end of a link."""
    os.mkfifo(tmp_path / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # names of sockets are short
    listening.bind("socket")
    os.chdir(here)
    (tmp_path / "folder").mkdir()
    for kind in ("pipe", "socket", "folder"):
        (tmp_path / f"to {kind}").symlink_to(tmp_path / kind)
    (tmp_path / "to a device").symlink_to("/dev/null")
    found = sorted(tmp_path.iterdir())
    modes = [path.lstat().st_mode for path in found]
    for path in (*found, Path("/dev/null")):
        with pytest.raises(OSError, match=r"is a (device, pipe or socket|directory)"):
            WRITERS[name](path)
    listening.close()
    assert sorted(tmp_path.iterdir()) == found
    assert [path.lstat().st_mode for path in found] == modes
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def in_a_child(act: Callable[[], Any]) -> tuple[int, str]:
    """The exit code of a process that does this, and what it gives as text; a fork is quick."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(act()).encode())
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        output = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def write_to_a_full_disk(kind: str, path: Path) -> str:
    """What is said where no file may be larger than 4 kB."""
    import resource

    large = nn.Sequential(nn.Linear(300, 300))
    gift.enable_fine_tuning(large, LoRAAllFineTuningStrategy(rank=64))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        if kind == "save":
            gift.save(large, path)
        elif kind == "peft":
            save_peft(large, path.parent)
        elif kind == "checkpoint":
            atomic_files.replace_file(path, lambda name: torch.save(large.state_dict(), name))
        else:
            write_text(path, "x" * 100_000)
    except OSError as error:
        return str(error)
    return "written"


@posix
@pytest.mark.parametrize("kind", ["save", "text", "checkpoint", "peft"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(kind: str, tmp_path: Path) -> None:
    """A limit on the sizes of files stands for the disk."""
    path = tmp_path / (WEIGHTS if kind == "peft" else "file")
    if kind == "peft":
        save_peft(tuned(), tmp_path)
    else:
        path.write_bytes(b"old")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    _, output = in_a_child(lambda: write_to_a_full_disk(kind, path))
    assert f"{path} was not written, and is unchanged" in output
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def save_until_killed(net: nn.Module, folder: Path, place: int) -> str:
    """Save, and be killed before the step of that number, if there are as many."""
    count = 0

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == place:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "chmod", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    Path.unlink = dying(Path.unlink)  # type: ignore[method-assign]
    save_peft(net, folder)
    return "done"


@posix
def test_a_writer_of_two_files_may_be_killed_at_any_step(tmp_path: Path) -> None:
    """A reader finds the old two, the new two, or an error; and the next one cleans up."""
    x = torch.randn(3, 16)
    old, new = tuned(1.0), tuned(2.0, rank=3, alpha=12.0)
    seen, place = set(), 0
    while True:
        folder = tmp_path / str(place)
        save_peft(old, folder)
        code, output = in_a_child(lambda: save_until_killed(new, folder, place))  # noqa: B023
        if output == "done":
            break
        assert code == -signal.SIGKILL, output
        net = base()
        try:
            load_peft(net, folder)
        except DeltaFileError:
            assert not (folder / CONFIG).exists()  # so that PEFT does not load it either
            seen.add("refused")
        else:
            fits = [
                name for name, one in (("old", old), ("new", new)) if torch.equal(net(x), one(x))
            ]
            assert fits, "a mix was loaded"
            seen.add(fits[0])
        save_peft(old, folder)
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
        place += 1
    assert place >= 6
    assert seen == {"old", "refused", "new"}


def test_files_of_two_writers_are_never_loaded_together(tmp_path: Path) -> None:
    """Also where somebody else put them there."""
    save_peft(tuned(1.0, alpha=2.0), tmp_path / "a")
    save_peft(tuned(1.0, alpha=20.0), tmp_path / "b")
    (tmp_path / "a" / CONFIG).write_bytes((tmp_path / "b" / CONFIG).read_bytes())
    with pytest.raises(DeltaFileError, match=f"{CONFIG} is not the one that was written with"):
        load_peft(base(), tmp_path / "a")


def test_what_says_nothing_of_the_weights_may_be_changed(tmp_path: Path) -> None:
    save_peft(tuned(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"base_model_name_or_path": "mine"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    load_peft(base(), tmp_path)
    others = load_file(tmp_path / WEIGHTS)
    from safetensors.torch import save_file

    save_file(others, tmp_path / WEIGHTS)  # as others write it, without a digest
    load_peft(base(), tmp_path)


def test_readers_that_race_writers_see_whole_files(tmp_path: Path) -> None:
    """Two writers and a reader: each file that is read is one that was written."""
    path, folder, stop = tmp_path / "x.safetensors", tmp_path / "peft", threading.Event()
    nets = [tuned(1.0, rank=1), tuned(2.0, rank=4)]
    x = torch.randn(3, 16)
    gift.save(nets[0], path)
    save_peft(nets[0], folder)
    failed: list[BaseException] = []
    refused: list[str] = []

    def write(net: nn.Module) -> None:
        try:
            while not stop.is_set():
                gift.save(net, path)
                save_peft(net, folder)
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(net,)) for net in nets]
    for writer in writers:
        writer.start()
    try:
        for _ in range(15):
            net = base()
            gift.load(net, path)
            assert any(torch.equal(net(x), one(x)) for one in nets)
            net = base()
            try:
                load_peft(net, folder)
            except DeltaFileError as error:
                refused.append(str(error))
            else:
                assert any(torch.equal(net(x), one(x)) for one in nets)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert not failed
    assert all(f"has no {CONFIG}" in text or "not the one" in text for text in refused)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peft", "x.safetensors"]


@posix
def test_leftovers_of_dead_writers_of_the_same_file_alone_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    machine = atomic_files._machine()
    token = "0123456789abcdef"
    kept = [
        f".x.txt.{machine}-{os.getpid()}-{token}.tmp",  # alive
        f".x.txt.{'0' * 12}-{dead.pid}-{token}.tmp",  # of another machine
        f".y.txt.{machine}-{dead.pid}-{token}.tmp",  # of another file
        f".x.txt.{machine}-{dead.pid}-{token}.bak", ".x.txt.tmp", "x.txt.tmp", ".x.txt.swp",
        f".x.txt.{token}.tmp",
    ]  # fmt: skip
    gone = f".x.txt.{machine}-{dead.pid}-{token}.tmp"
    for name in (*kept, gone):
        (tmp_path / name).write_text("part")
    write_text(tmp_path / "x.txt", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "x.txt"])


def test_long_names_and_old_permissions(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 120)
    write_bytes(path, b"one")
    path.chmod(0o640)
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o640


def test_if_one_of_several_cannot_be_written_none_is(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("old")

    def fail(path: str) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        replace_files({tmp_path / "a": lambda path: Path(path).write_text("new"),
                       tmp_path / "b": fail})  # fmt: skip
    assert [p.read_text() for p in sorted(tmp_path.iterdir())] == ["old", "old"]


def test_an_interrupt_between_two_files_waits(tmp_path: Path, monkeypatch: Any) -> None:
    real, calls = os.replace, []

    def replace(one: str, other: Path) -> None:
        calls.append(other)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        real(one, other)

    monkeypatch.setattr(os, "replace", replace)
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        replace_files({tmp_path / n: lambda path: Path(path).write_text("new") for n in "ab"})
    assert [p.read_text() for p in sorted(tmp_path.iterdir())] == ["new", "new"]
