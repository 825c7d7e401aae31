"""Matrix decompositions that are reproducible wherever they are computed.

Deltas that are expressed relative to factors of the frozen weight are saved without these factors,
which are computed again where the delta is loaded. Singular vectors are not unique, though. If
singular values are equal (an orthogonal weight), any rotation of their vectors is valid. If they
are zero (pruned channels), anything in the null space is. Each library, device or number of threads
may choose another. So the work is done in float64, which distinguishes values that differ in a
float32 weight. Where values do not differ, a rule that depends on the matrix alone chooses a basis.
"""

import torch
from torch import Tensor

# Values closer than this, relative to the largest, count as equal. Rounding moves vectors by about
# 1e-15 divided by the distance of their values, so vectors of values further apart are found to
# float32 precision.
_SAME = 1e-9


def in_double(matrix: Tensor) -> Tensor:
    """Return the matrix in float64 or complex128, on the CPU if its device lacks these dtypes."""
    dtype = torch.complex128 if matrix.is_complex() else torch.float64
    return matrix.detach().to("cpu" if matrix.device.type == "mps" else matrix.device, dtype)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the reduced SVD, :math:`W = U \operatorname{diag}(\sigma) V^H`.

    Args:
        matrix: ``(..., rows, columns)``. If it is not finite, as uninitialised memory may be, all
            factors are zero.

    Returns:
        ``U (..., rows, n)``, ``sigma (..., n)`` in descending order, and ``V^H (..., n, columns)``,
        where `n` is the smaller of rows and columns, in float64 or complex128.
    """
    if matrix.is_meta:
        u, sigma, v = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
        return u, sigma, v
    work = in_double(matrix)
    finite = torch.isfinite(work).all()
    u, sigma, vh = torch.linalg.svd(work if finite else torch.zeros_like(work), full_matrices=False)
    if not finite:
        return torch.zeros_like(u), sigma, torch.zeros_like(vh)
    batch = (u.flatten(0, -3), sigma.flatten(0, -2), vh.flatten(0, -3)) if u.ndim > 2 else None
    for one in zip(*batch, strict=True) if batch else [(u, sigma, vh)]:
        _settle(*one)
    return u, sigma, vh


def signed(u: Tensor, sigma: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an SVD whose vectors have settled signs, or phases.

    A pair of singular vectors may be multiplied by any sign. Here the components of all right ones
    along a reference vector are positive.

    Args:
        u: left vectors, as `svd` gives them.
        sigma: singular values.
        vh: right vectors.
    """
    along = vh @ _references(vh.shape[-1], 1, vh)
    phase = torch.where(along == 0, 1, along / along.abs().clamp_min(1e-300))
    return u * phase.mT, sigma, phase.conj() * vh


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the reduced QR decomposition with a nonnegative diagonal of ``R``.

    It is unique if the first columns of the matrix are independent. If a column depends on those
    before it, `Q` has some vector orthogonal to all others in its place.

    Args:
        matrix: ``(..., rows, columns)``. If it is not finite, as uninitialised memory may be, it
            counts as zero.

    Returns:
        ``Q (..., rows, n)`` and ``R (..., n, columns)``, where `n` is the smaller of rows and
        columns, in float64 or complex128.
    """
    work = in_double(matrix)
    if not work.is_meta and not torch.isfinite(work).all():
        work = torch.zeros_like(work)
    q, r = torch.linalg.qr(work)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    phase = torch.where(diagonal == 0, 1, diagonal / diagonal.abs().clamp_min(1e-300))
    return q * phase.unsqueeze(-2), r * phase.conj().unsqueeze(-1)


def _settle(u: Tensor, sigma: Tensor, vh: Tensor) -> None:
    """Choose the singular vectors of equal values, in place."""
    largest = sigma[0]
    rank = int((sigma > _SAME * largest).sum())
    ends = (sigma[:rank].diff() < -_SAME * largest).nonzero().flatten() + 1
    start = 0
    for end in [*ends.tolist(), rank]:
        if end - start > 1:
            # The first vector has a component along the first reference vector, the second has none
            # along that but one along the second, and so on: exactly one basis satisfies this.
            turn = _orthonormal(vh[start:end] @ _references(vh.shape[1], end - start, vh))
            u[:, start:end] = u[:, start:end] @ turn
            vh[start:end] = turn.mH @ vh[start:end]
        start = end
    if rank < len(sigma):
        u[:, rank:] = _completion(u[:, :rank], len(sigma) - rank)
        vh[rank:] = _completion(vh[:rank].mH, len(sigma) - rank).mH


def _completion(basis: Tensor, count: int) -> Tensor:
    """Return `count` more orthonormal columns: reference vectors minus their part in the basis."""
    more = _references(len(basis), count, basis)
    for _ in range(2):  # twice is enough for float64
        more = more - basis @ (basis.mH @ more)
    return _orthonormal(more)


def _orthonormal(columns: Tensor) -> Tensor:
    """Return orthonormal columns whose leading columns span what the given ones do."""
    return qr(columns)[0]


def _references(size: int, count: int, like: Tensor) -> Tensor:
    """Return fixed vectors in general position, as columns."""
    angles = torch.arange(1, size * count + 1, dtype=torch.float64).reshape(size, count)
    return torch.sin(angles.square()).to(like.device, like.dtype)
