"""The container: one safetensors file that is written whole or not at all, and read with suspicion.

Beside the tensors stand two texts: ``gift``, a header of plain data as JSON, and ``sha256``, its
digest. The header has the digest of each tensor, so whatever is changed in a file is found.
"""

import hashlib
import json
import os
import platform
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gift.files.digests import digests
from gift.interrupts import held_interrupts

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1


class DeltaFileError(ValueError):
    """A file cannot be used for a network, or a network not be written; all reasons are named."""

    def __init__(self, what: str, problems: list[str]) -> None:
        super().__init__("\n  ".join([f"{what}:", *problems]))
        self.problems = problems


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file; at any moment, a reader finds the old one or the new one.

    Args:
        path: of the file; its folder is made if there is none.
        header: plain data.
        tensors: by name.
    """
    # safetensors has no complex128: pairs of float64 stand for it.
    pairs = [name for name, tensor in tensors.items() if tensor.dtype is torch.complex128]
    own = {name: _alone(tensor) for name, tensor in tensors.items()}
    full = {"format_version": FORMAT_VERSION, **header, "pairs": pairs, "tensors": digests(own)}
    own |= {name: torch.view_as_real(own[name]) for name in pairs}
    text = json.dumps(full, allow_nan=False, separators=(",", ":"))
    metadata = {"format": "pt", "gift": text, "sha256": _sha256(text)}
    replace_file(path, lambda temporary: save_file(own, temporary, metadata))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, whole or not at all."""
    replace_file(path, lambda temporary: Path(temporary).write_bytes(content))


def replace_file(path: str | os.PathLike[str], make: Callable[[str], object]) -> None:
    """Let `make` write a temporary file beside `path`, and put that in its place.

    Raises:
        IsADirectoryError: for a directory.
        OSError: for a device, a pipe or a socket, or if the file cannot be written, as on a full
            disk; the file that was there is as it was.
    """
    replace_files({path: make})


def replace_files(makes: Mapping[str | os.PathLike[str], Callable[[str], object]]) -> None:
    """Put several new files in the places of old ones, which belong together.

    What was written is on the disk before it gets its name, so that no crash leaves less than one
    whole file. Of several files the last is away while the others are exchanged: a reader that
    needs all of them finds the old ones, the new ones, or that one is missing, and never a mix.

    Args:
        makes: for each path what writes it, called with the name of an empty file.
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
    except BaseException:  # which is raised again
        for temporary in ready.values():
            with suppress(OSError):
                os.unlink(temporary)
        raise
    if os.name == "posix":
        for folder in {target.parent for target in ready}:
            _flush(str(folder))  # the names


def _regular(path: str | os.PathLike[str]) -> Path:
    """The file at a path, of a link that to which it leads; refuses all but files."""
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
    """What kind of file there is and who may use it; None where there is none."""
    try:
        return target.stat().st_mode
    except FileNotFoundError:
        return None


def _new_file(target: Path) -> str:
    # Made here, so that the system says which permissions a new file has; an old one keeps its own.
    name = f"{_name_of_temporaries(target)}{_writer()}-{secrets.token_hex(8)}.tmp"
    temporary = str(target.with_name(name))
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _fill(target: Path, temporary: str, make: Callable[[str], object]) -> None:
    try:
        mode = _mode(target)  # another writer may exchange it meanwhile
        mode = Path(temporary).stat().st_mode if mode is None else mode
        make(temporary)
        _flush(temporary)
        os.chmod(temporary, mode & 0o777)
    except (OSError, SafetensorError, RuntimeError) as error:  # which name another file, or none
        number = getattr(error, "errno", None)
        told = getattr(error, "strerror", None) or str(error).replace(temporary, str(target))
        raise OSError(
            number, f"{target} was not written, what was there is as it was: {told}"
        ) from error


def _exchange(ready: Mapping[Path, str]) -> None:
    """Give the temporary files their names; an interrupt waits until they belong together.

    Where not even the first can be given its name, the file that was away comes back.
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
    """Let no other writer exchange files that belong together meanwhile."""
    if fcntl is None or not folders:
        yield
        return
    with ExitStack() as stack:
        for folder in sorted(folders):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)  # which gives the lock back, as does the end of all
            with suppress(OSError):  # where the system of files has no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _name_of_temporaries(target: Path) -> str:
    # Names have at most 255 bytes: the end of a long one is left out.
    return f".{target.name.encode()[:150].decode(errors='ignore')}."


@cache
def _machine() -> str:
    """What tells processes of this machine, and of this container, from others."""
    known = [platform.node()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
                 lambda: os.readlink("/proc/self/ns/pid")):  # fmt: skip
        with suppress(OSError):
            known.append(read())
    return _sha256(repr(known))[:12]


def _writer() -> str:
    return f"{_machine()}-{os.getpid()}"


_TEMPORARY = re.compile(r"([0-9a-f]{12})-([0-9]+)-[0-9a-f]{16}\.tmp")


def _clean(target: Path) -> None:
    """Remove what writers of the same file left that were killed."""
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
        return True  # where asking would end it
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
    """A name of the file that is at a path now, whoever puts another one there meanwhile.

    What opens a file by its name several times, as safetensors does, then opens the same one.
    """
    with Path(path).open("rb") as file:
        own = f"/proc/self/fd/{file.fileno()}"
        yield own if os.path.exists(own) else os.fspath(path)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, with memory that no other has."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    return tensor.clone() if tensor.untyped_storage().nbytes() != size else tensor


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The texts and tensors of any safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        DeltaFileError: if it is no such file, or is cut off.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with held_file(path) as same, safe_open(same, framework="pt") as file:
            names = file.keys()
            return file.metadata() or {}, {name: _tensor(file, name) for name in names}
    except Exception as error:  # whatever hostile bytes provoke
        problem = f"it is no whole safetensors file ({type(error).__name__}: {error})"
        raise DeltaFileError(f"{path} cannot be read", [problem]) from error


def _tensor(file: Any, name: str) -> Tensor:
    # A signal that arrives within safetensors would become an error of the file.
    with held_interrupts():
        return file.get_tensor(name)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, each as it was written.

    Raises:
        FileNotFoundError: if there is no such file.
        DeltaFileError: if it is no such file, is damaged, or of a newer format.
    """
    metadata, tensors = read_tensors(path)
    header, problems = _header(metadata)
    if not problems:
        _join_pairs(header, tensors)
        problems = _damage(header, tensors)
    if problems:
        raise DeltaFileError(f"{path} cannot be read", problems)
    return header, tensors


def _header(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    text = metadata.get("gift")
    if text is None:
        return {}, [
            "it is a safetensors file that gift did not write (load_peft and load_kohya read those "
            "of others)"
        ]
    if metadata.get("sha256") != _sha256(text):
        return {}, ["its header is damaged: it does not have the digest that was written"]
    try:
        header = json.loads(text)
        version = header["format_version"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        return {}, [f"its header makes no sense ({type(error).__name__}: {error})"]
    if type(version) is not int or version < 1:
        return {}, [f"its header makes no sense (format version {str(version)[:40]})"]
    if version > FORMAT_VERSION:
        return {}, [
            f"it has format version {version}, this gift knows {FORMAT_VERSION}: update gift"
        ]
    return header, []


def _join_pairs(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    pairs = header.get("pairs")
    for name in pairs if isinstance(pairs, list) else ():
        pair = tensors.get(name) if isinstance(name, str) else None
        if pair is not None and pair.dtype is torch.float64 and pair.shape[-1:] == (2,):
            # In memory of its own: that of the file has the alignment of a half, and torch would
            # crash.
            tensors[name] = torch.view_as_complex(pair.clone())


def _damage(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    written = header.get("tensors")
    if not isinstance(written, dict):
        return ["its header has no digests of tensors"]
    found = digests(tensors)
    damaged = sorted(name for name in found if name in written and written[name] != found[name])
    missing, unknown = sorted({*written} - {*found}), sorted({*found} - {*written})
    lists = (
        ("damaged, as they do not have the digests that were written", damaged),
        ("lost", missing),
        ("not written by gift", unknown),
    )
    return [f"{len(names)} tensors are {what}: {names}" for what, names in lists if names]
