"""Large products of two matrices, by the quicker of the libraries that torch has on a processor."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gift.private.torch import by_onednn, has_onednn, is_batched, is_followed

MANY = 2**20  # multiplications, below which starting the other library takes longer
PLAIN = (Tensor, nn.Parameter)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, rounded otherwise than by torch: for gradients, not for what a layer gives.

    Args:
        a: a matrix.
        b: another one, not a thin one: for those there is `gift.kernels.products`.
    """
    return by_onednn(a, b) if _is_for_onednn(a, b) else a @ b


@lru_cache(maxsize=1)
def prefers_onednn() -> bool:
    """Whether oneDNN is the quicker one, as it is on processors of AMD with AVX-512.

    There it takes 0.75 to 0.95 of the time of MKL, which torch takes for all products of 32 bits:
    see ``benchmarks/gemm.py``.
    """
    if not (torch.backends.mkl.is_available() and has_onednn()):
        return False
    # Older versions of torch do not tell.
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(told.get("avx512_f")) and str(told.get("cpu_name")).startswith("AMD")


def _is_for_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether the product is large, and nobody follows it who knows torch's own alone."""
    return (
        not torch.compiler.is_compiling()
        and type(a) in PLAIN
        and type(b) in PLAIN
        and a.dtype is torch.float32
        and a.is_cpu
        and a.shape[0] * b.numel() >= MANY
        and prefers_onednn()
        and a.is_contiguous()
        and not torch.is_grad_enabled()
        and bool(torch.backends.mkldnn.enabled)
        and not is_followed()
        and not is_batched(a)
    )
