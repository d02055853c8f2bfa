"""Low-rank forms U diag(s) U^T of stacked positive semidefinite matrices.

Columns of U are orthonormal where their value is positive and zero where it is zero, so that
U U^T always is the projector onto the form's range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.linalg.eigen import eigh
from hf_precond.linalg.svd import thin_svd


def add_gram(
    vectors: Tensor, values: Tensor, columns: Tensor, *, keep: int
) -> tuple[Tensor, Tensor]:
    """Returns the leading eigenvectors and all eigenvalues, descending, of U diag(s) U^T + C C^T.

    Args:
        vectors: U ``[G, N, K]``; fastest as the transpose of rows ``[G, K, N]``.
        values: s ``[G, K]``.
        columns: C ``[G, N, L]``.
        keep: number of eigenvectors wanted.

    Returns:
        ``[G, N, min(keep, J)]`` and ``[G, J]``, J = min(N, K + L). By an eigendecomposition of
        size J: the matrix itself where K + L >= N, else the small one of the symmetric Brand
        update.

    Raises:
        DecompositionError: if the eigendecomposition fails in float64.
    """
    size, rank, extra = *vectors.shape[-2:], columns.shape[-1]
    if rank + extra >= size:
        whole = (vectors * values.unsqueeze(-2)) @ vectors.mT
        new_values, new_vectors = eigh(whole + columns @ columns.mT)
        new_values, new_vectors = new_values.flip(-1), new_vectors.flip(-1)[..., :keep]
        alive = _above_noise(new_values, size)
        return new_vectors * alive[..., None, : new_vectors.shape[-1]], new_values * alive
    inside, outside, coefs = _split(vectors, columns)
    stacked = torch.cat([inside, coefs], -2)
    old = torch.cat([values, values.new_zeros(*values.shape[:-1], extra)], -1)
    new_values, small = eigh(stacked @ stacked.mT + torch.diag_embed(old))
    new_values = new_values.flip(-1)
    alive = _above_noise(new_values, size)
    small = (small.flip(-1) * alive.unsqueeze(-2))[..., :keep].mT
    # As rows: thin matrices multiply and pass memory faster the long way.
    rows = torch.baddbmm(small[..., rank:] @ outside.mT, small[..., :rank], vectors.mT)
    return rows.mT, new_values * alive


def inverse_power(
    vectors: Tensor, values: Tensor, tail: Tensor, x: Tensor, exponent: float
) -> Tensor:
    """Returns (U diag(s) U^T + c I)^(-exponent) x for ``x`` ``[..., N, L]``; zero where c = 0.

    Args:
        tail: c ``[...]``.
    """
    alive = tail > 0
    shift = torch.where(alive, tail, torch.ones_like(tail)).unsqueeze(-1)
    outer = shift.pow(-exponent)
    weights = (values + shift).pow(-exponent) - outer
    inside = (weights * alive.unsqueeze(-1)).unsqueeze(-1) * (vectors.mT @ x)
    return torch.baddbmm(
        (x * (outer * alive.unsqueeze(-1)).unsqueeze(-1)).mT, inside.mT, vectors.mT
    ).mT


def _above_noise(values: Tensor, size: int) -> Tensor:
    """Which of the descending eigenvalues are no rounding of the largest."""
    return values > size * torch.finfo(values.dtype).eps * values[..., :1]


def _split(vectors: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C = U Z + Q R with Q orthonormal and orthogonal to U: returns (Z, Q, R).

    Columns inside the span of U leave nothing but rounding, which must not pass for a direction:
    their rows of R and columns of Q are zero.
    """
    rows = vectors.mT
    inside = rows @ columns
    rest = torch.baddbmm(columns.mT, inside.mT, rows, alpha=-1).mT
    again = rows @ rest  # one pass loses orthogonality where columns lie nearly in the span
    inside, rest = inside + again, torch.baddbmm(rest.mT, again.mT, rows, alpha=-1).mT
    noise = columns.shape[-2] * torch.finfo(columns.dtype).eps
    floor = noise * torch.linalg.matrix_norm(columns).unsqueeze(-1)
    if columns.shape[-1] == 1:
        size = torch.linalg.vector_norm(rest, dim=-2)
        alive = size > floor
        unit = rest / torch.where(alive, size, torch.full_like(size, torch.inf)).unsqueeze(-2)
        return inside, unit, (size * alive).unsqueeze(-1)
    # Not QR: without pivoting a dependent column takes a direction from those after it.
    outside, sizes, mix = thin_svd(rest)
    alive = sizes > floor
    return inside, outside * alive.unsqueeze(-2), (sizes * alive).unsqueeze(-1) * mix.mT
