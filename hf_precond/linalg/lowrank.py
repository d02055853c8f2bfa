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
        vectors: U ``[..., N, K]``.
        values: s ``[..., K]``.
        columns: C ``[..., N, L]``.
        keep: number of eigenvectors wanted.

    Returns:
        ``[..., N, min(keep, J)]`` and ``[..., J]``, J = min(N, K + L). By an eigendecomposition of
        size J: the matrix itself where K + L >= N, else the small one of the symmetric Brand
        update.

    Raises:
        DecompositionError: if the eigendecomposition fails in float64.
    """
    size, rank, extra = *vectors.shape[-2:], columns.shape[-1]
    if rank + extra >= size:
        whole = (vectors * values.unsqueeze(-2)) @ vectors.mT
        new_values, leading = eigh(whole + columns @ columns.mT)
        new_vectors = leading.flip(-1)[..., :keep]
    else:
        inside, outside, coefs = _split(vectors, columns)
        stacked = torch.cat([inside, coefs], -2)
        old = torch.cat([values, values.new_zeros(*values.shape[:-1], extra)], -1)
        new_values, leading = eigh(stacked @ stacked.mT + torch.diag_embed(old))
        leading = leading.flip(-1)[..., :keep]
        new_vectors = (vectors @ leading[..., :rank, :]).add_(outside @ leading[..., rank:, :])
    new_values = new_values.flip(-1)
    # What is below rounding of the largest is noise, and its vector need not even be of norm one.
    noise = size * torch.finfo(values.dtype).eps * new_values[..., :1]
    alive = new_values > noise
    return new_vectors.mul_(alive[..., None, : new_vectors.shape[-1]]), new_values * alive


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
    lifted = vectors @ (weights.unsqueeze(-1) * (vectors.mT @ x))
    return (x * outer.unsqueeze(-1) + lifted) * alive[..., None, None]


def _split(vectors: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C = U Z + Q R with Q orthonormal and orthogonal to U: returns (Z, Q, R).

    Columns inside the span of U leave nothing but rounding, which must not pass for a direction:
    their rows of R and columns of Q are zero.
    """
    inside = vectors.mT @ columns
    rest = columns - vectors @ inside
    again = vectors.mT @ rest  # one pass loses orthogonality where columns lie nearly in the span
    inside, rest = inside + again, rest - vectors @ again
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
