"""Atomic file writes: a file is replaced completely or not at all."""

import hashlib
import os
import platform
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8 atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically."""
    replace_file(path, lambda temporary: Path(temporary).write_bytes(content))


def replace_file(path: str | os.PathLike[str], make: Callable[[str], object]) -> None:
    """Let `make` write a temporary file beside `path`, then rename it to `path`.

    Raises:
        IsADirectoryError: for a directory.
        OSError: for a device, a pipe or a socket, or if the file cannot be written, as on a full
            disk; the previous file is unchanged.
    """
    replace_files({path: make})


def replace_files(makes: Mapping[str | os.PathLike[str], Callable[[str], object]]) -> None:
    """Replace several files that belong together.

    Each new file is flushed to the disk before it gets its name, so a crash leaves at least one
    complete file. While several files are exchanged, the last one is absent. A reader that needs
    all of them therefore finds all old ones, all new ones, or that one is missing, but never a mix.

    Args:
        makes: for each path a function that writes the file, called with the name of an empty file.
    """
    ready: dict[Path, str] = {}
    try:
        for path, make in makes.items():
            target = _regular(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            _clean(target)
            ready[target] = _new_file(target)
            _fill(target, ready[target], make)
        with _alone_in({target.parent for target in ready} if len(ready) > 1 else set()):
            _exchange(ready)
    except BaseException:  # reraised below
        for temporary in ready.values():
            with suppress(OSError):
                os.unlink(temporary)
        raise
    if os.name == "posix":
        for folder in {target.parent for target in ready}:
            _flush(str(folder))  # flush the new names, too


def _regular(path: str | os.PathLike[str]) -> Path:
    """Resolve a path, following links; refuse everything except regular files and new paths."""
    target = Path(path).expanduser().resolve()
    mode = _mode(target)
    if mode is None or stat.S_ISREG(mode):
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{target} is a directory, expected the path of a file")
    raise OSError(
        f"{target} is a device, pipe or socket, which a file would replace: expected the path "
        "of a file"
    )


def _mode(target: Path) -> int | None:
    """Type and permissions of a file; None if it does not exist."""
    try:
        return target.stat().st_mode
    except FileNotFoundError:
        return None


def _new_file(target: Path) -> str:
    # Create it here instead of in tempfile, so that the umask decides about the permissions of a
    # new file. A file that is replaced keeps its own.
    name = f"{_name_of_temporaries(target)}{_writer()}-{secrets.token_hex(8)}.tmp"
    temporary = str(target.with_name(name))
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _fill(target: Path, temporary: str, make: Callable[[str], object]) -> None:
    try:
        mode = _mode(target)  # read it now: another writer may replace it
        mode = Path(temporary).stat().st_mode if mode is None else mode
        make(temporary)
        _flush(temporary)
        os.chmod(temporary, mode & 0o777)
    except (OSError, SafetensorError, RuntimeError) as error:  # they name no target
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or str(error).replace(temporary, str(target))
        raise OSError(number, f"{target} was not written, and is unchanged: {reason}") from error


def _exchange(ready: Mapping[Path, str]) -> None:
    """Rename the temporary files; an interrupt waits until all files belong together.

    If not even the first one can be renamed, the file that was removed is restored.
    """
    held: BaseException | None = None
    last = list(ready)[-1]
    content = last.read_bytes() if len(ready) > 1 and last.exists() else None
    is_away = len(ready) == 1
    while True:
        try:
            if not is_away:
                last.unlink(missing_ok=True)
                is_away = True
            for target, temporary in ready.items():
                if os.path.lexists(temporary):
                    os.replace(temporary, target)
            break
        except KeyboardInterrupt as error:
            held = error
        except OSError:
            if content is not None and all(map(os.path.lexists, ready.values())):
                last.write_bytes(content)
            raise
    if held is not None:
        raise held


@contextmanager
def _alone_in(folders: set[Path]) -> Iterator[None]:
    """Context in which no other writer exchanges files that belong together in these folders."""
    if fcntl is None or not folders:
        yield
        return
    with ExitStack() as stack:
        for folder in sorted(folders):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)  # closing releases the lock, as does exiting
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _name_of_temporaries(target: Path) -> str:
    # File names have at most 255 bytes, so cut off the end of a long one.
    return f".{target.name.encode()[:150].decode(errors='ignore')}."


@cache
def _machine() -> str:
    """A key of this machine and container, which distinguishes their processes from others."""
    known = [platform.node()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
                 lambda: os.readlink("/proc/self/ns/pid")):  # fmt: skip
        with suppress(OSError):
            known.append(read())
    return hashlib.sha256(repr(known).encode()).hexdigest()[:12]


def _writer() -> str:
    return f"{_machine()}-{os.getpid()}"


_TEMPORARY = re.compile(r"([0-9a-f]{12})-([0-9]+)-[0-9a-f]{16}\.tmp")


def _clean(target: Path) -> None:
    """Remove temporary files of the same target whose writers were killed."""
    start = _name_of_temporaries(target)
    with suppress(OSError):
        for entry in os.scandir(target.parent):
            found = _TEMPORARY.fullmatch(entry.name.removeprefix(start))
            if not entry.name.startswith(start) or found is None or found[1] != _machine():
                continue
            if not _is_alive(int(found[2])):
                with suppress(OSError):
                    os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # on Windows, os.kill would end the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _flush(path: str) -> None:
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def held_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name for the file that is at a path now, even if another file replaces it meanwhile.

    Code that opens a file by its name several times, as safetensors does, then opens the same file.
    """
    with Path(path).open("rb") as file:
        own = f"/proc/self/fd/{file.fileno()}"
        yield own if os.path.exists(own) else os.fspath(path)
