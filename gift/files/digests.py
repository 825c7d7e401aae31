"""Digests of tensors, which are equal if dtype, shape and bits are equal."""

import ctypes
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from gift.core.undo.copy_on_write import parts_of
from gift.support.progress import slow
from gift.support.tensors import dtype_name

_FEW = 2**20  # number of elements below which hashing uses no threads


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and every bit, on any device."""
    hashed = hashlib.sha256(f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)} ".encode())
    for part in parts_of(tensor.detach()):
        with torch.no_grad():
            data = part.resolve_conj().resolve_neg().cpu().contiguous()
        if size := data.numel() * data.element_size():
            # Hash the memory itself, so that a large tensor is not copied and numpy is not needed.
            hashed.update((ctypes.c_char * size).from_address(data.data_ptr()))
    return hashed.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digests of several tensors, on all cores if that is worth it."""
    if sum(tensor.numel() for tensor in tensors.values()) < _FEW:
        return {name: digest(tensor) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        found = slow(pool.map(digest, tensors.values()), "hashing", len(tensors))
        return dict(zip(tensors, found, strict=True))
