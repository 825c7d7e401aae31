"""Digests of tensors: whether two have the same dtype, shape and bits."""

import ctypes
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from gift.core.undo.copy_on_write import parts_of
from gift.support.tensors import dtype_name

_FEW = 2**20  # numbers that are hashed before threads are made


def digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and every bit, wherever the tensor is."""
    hashed = hashlib.sha256(f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)} ".encode())
    for part in parts_of(tensor.detach()):
        with torch.no_grad():
            data = part.resolve_conj().resolve_neg().cpu().contiguous()
        if size := data.numel() * data.element_size():
            # The memory itself: a large tensor is neither copied nor does it need numpy.
            hashed.update((ctypes.c_char * size).from_address(data.data_ptr()))
    return hashed.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digests of several tensors, on all cores where that is worth it."""
    if sum(tensor.numel() for tensor in tensors.values()) < _FEW:
        return {name: digest(tensor) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
