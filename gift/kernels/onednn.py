"""Large matrix products on a CPU, by the faster of torch's libraries."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gift.private.torch.operations import by_onednn, has_onednn
from gift.private.torch.tracing import is_batched, is_followed

MANY = 2**20  # multiplications, below which starting the other library takes longer
PLAIN = (Tensor, nn.Parameter)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b`` with other rounding than torch's: for gradients, not for a layer's output.

    Args:
        a: a matrix.
        b: another one. For thin matrices see `gift.kernels.products`.
    """
    return by_onednn(a, b) if _is_for_onednn(a, b) else a @ b


@lru_cache(maxsize=1)
def prefers_onednn() -> bool:
    """Whether oneDNN is faster than MKL, as it is on AMD processors with AVX-512.

    There it takes 0.75 to 0.95 of the time of MKL, which torch uses for all float32 products: see
    ``benchmarks/gemm.py``.
    """
    if not (torch.backends.mkl.is_available() and has_onednn()):
        return False
    # Older versions of torch do not report capabilities.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_f")) and str(capabilities.get("cpu_name")).startswith(
        "AMD"
    )


def _is_for_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether the product is large and plain: no tracer, transform or tensor subclass sees it."""
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
