"""The container: one safetensors file that is written atomically and validated on reading.

Besides the tensors, its metadata has two texts: ``gift``, a header of plain data as JSON, and
``sha256``, the digest of the header. The header has a digest of each tensor, so any change of a
file is detected.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gift.errors import DeltaFileError, refuse
from gift.files.digests import digests
from gift.support.atomic_files import held_file, replace_file
from gift.support.interrupts import held_interrupts

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file atomically: at any moment, a reader finds the old file or the new one.

    Args:
        path: path of the file; its folder is created if necessary.
        header: plain data.
        tensors: tensors by name.
    """
    # safetensors has no complex128, so it is stored as pairs of float64.
    pairs = [name for name, tensor in tensors.items() if tensor.dtype is torch.complex128]
    own = {name: _alone(tensor) for name, tensor in tensors.items()}
    full = {"format_version": FORMAT_VERSION, **header, "pairs": pairs, "tensors": digests(own)}
    own |= {name: torch.view_as_real(own[name]) for name in pairs}
    text = json.dumps(full, allow_nan=False, separators=(",", ":"))
    metadata = {"format": "pt", "gift": text, "sha256": _sha256(text)}
    replace_file(path, lambda temporary: save_file(own, temporary, metadata))


def _alone(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, in memory that it does not share."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    return tensor.clone() if tensor.untyped_storage().nbytes() != size else tensor


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and tensors of any safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        DeltaFileError: if it is not a safetensors file, or is truncated.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with held_file(path) as same, safe_open(same, framework="pt") as file:
            names = file.keys()
            return file.metadata() or {}, {name: _tensor(file, name) for name in names}
    except Exception as error:  # malicious files can raise anything
        problem = f"it is not a complete safetensors file ({type(error).__name__}: {error})"
        raise DeltaFileError(f"{path} cannot be read", [problem]) from error


def _tensor(file: Any, name: str) -> Tensor:
    # A signal that arrives inside safetensors would be reported as an error of the file.
    with held_interrupts():
        tensor: Tensor = file.get_tensor(name)
        return tensor


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and tensors of a file, exactly as they were written.

    Raises:
        FileNotFoundError: if there is no such file.
        DeltaFileError: if it is not a file of gift, is damaged, or has a newer format.
    """
    metadata, tensors = read_tensors(path)
    header, problems = _header(metadata)
    if not problems:
        _join_pairs(header, tensors)
        problems = _damage(header, tensors)
    refuse(DeltaFileError, f"{path} cannot be read", problems)
    return header, tensors


def _header(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    text = metadata.get("gift")
    if text is None:
        return {}, [
            "it is a safetensors file that gift did not write (load_peft, load_diffusers and "
            "load_kohya read those of others)"
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
            # Cloned, because memory of the file is only aligned for float64, half of a complex
            # number, and torch would crash.
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
