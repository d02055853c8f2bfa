"""Orthonormal bases of stacked subspaces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_precond.linalg.eigen import DecompositionError, eigh

# A unit vector with less than this outside a span lies in it.
_NEW_DIRECTION = 1e-6
# Rows a column from which a matrix is tall.
_TALL = 4


def orthonormal(y_BK: Tensor) -> Tensor:
    """Returns an orthonormal basis of the range of ``y`` ``[..., B, K]``, K <= B, by QR.

    Raises:
        DecompositionError: if the QR decomposition fails in float64, too.
    """
    return _qr(y_BK)[0]


def random_basis(
    size: int, rank: int, *, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns a seeded orthonormal ``[size, rank]``: the Q of a Gaussian.

    Drawn and factored in float64 on the CPU, so that every dtype, device and process starts alike.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return orthonormal(gaussian).to(dtype=dtype, device=device)


def extended_basis(basis_BK: Tensor, width: int, *, seed: int) -> Tensor:
    """Returns an orthonormal basis of more columns, of which the first are those of ``basis``.

    Raises:
        DecompositionError: if the QR decomposition fails in float64, too.
    """
    *stack, size, rank = basis_BK.shape
    new = random_basis(size, width - rank, seed=seed, dtype=basis_BK.dtype, device=basis_BK.device)
    return positive_qr(torch.cat([basis_BK, new.expand(*stack, *new.shape)], -1))[0]


def top_ritz_basis(y_BL: Tensor, ay_BL: Tensor) -> Tensor:
    """Rotates an orthonormal basis to Ritz vectors, largest Ritz value first.

    Args:
        y_BL: orthonormal ``[..., B, L]``.
        ay_BL: ``A @ y`` for a symmetric A.

    Raises:
        DecompositionError: if the eigendecomposition fails in float64, too.
    """
    projected = y_BL.mT @ ay_BL
    _, vectors = eigh((projected + projected.mT) / 2)
    return y_BL @ vectors.flip(-1)


def positive_qr(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (Q, diagonal of R), the diagonal not negative: columns keep their direction.

    Raises:
        DecompositionError: if the QR decomposition fails in float64, too.
    """
    q_NK, r_KK = _qr(x_NK)
    diagonal = r_KK.diagonal(dim1=-2, dim2=-1)
    return torch.where((diagonal < 0).unsqueeze(-2), -q_NK, q_NK), diagonal.abs()


def cholesky_qr(x_NK: Tensor) -> Tensor:
    """Returns the Q of :func:`positive_qr` for full column rank, by Cholesky factors of X^T X.

    Products, a K x K factorisation and triangular solves, each of a whole stack at once, where
    Householder reflections are a chain of small steps for every matrix. The factor of X^T X is
    taken in float64 and twice (Yamamoto et al. 2015), for condition numbers up to 1e8; a float32
    matrix whose weakest direction has been shifted by a millionth is below that. What is float64
    already has no wider format to go to, and few rows gain nothing: reflections for those.

    Raises:
        DecompositionError: where reflections are used, as :func:`positive_qr`.
    """
    rows, columns = x_NK.shape[-2:]
    if x_NK.dtype == torch.float64 or rows < _TALL * columns:
        return positive_qr(x_NK)[0]
    q = x_NK.double()
    for _ in range(2):
        gram = q.mT @ q
        # More than what rounding can make negative; the second pass takes off what it adds.
        gram.diagonal(dim1=-2, dim2=-1).mul_(1 + 1e-14 * columns)
        factor = torch.linalg.cholesky_ex(gram).L
        q = torch.linalg.solve_triangular(factor.mT, q, upper=True, left=False)
    return q.to(x_NK.dtype)


def _qr(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (Q, R), retried once in float64.

    Unlike eigenvectors and singular vectors, Q is a product of reflections: where the solver ends,
    its columns are orthonormal, so nobody checks them.
    """
    for dtype in dict.fromkeys((x_NK.dtype, torch.float64)):
        try:
            factors = torch.linalg.qr(x_NK.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        return factors.Q.to(x_NK.dtype), factors.R.to(x_NK.dtype)
    raise DecompositionError(f"QR of {tuple(x_NK.shape)} failed in float64")


def complete_basis(columns: Tensor, keep: Tensor, previous: Tensor) -> Tensor:
    """Completes columns to an orthonormal basis from a previous one, the same way every time.

    LAPACK's choice of vectors for a null space is arbitrary. Here they are the previous basis'
    columns, from the index of the first one missing on and then from the beginning, each projected
    off what is there already. A column that lies in that span leaves its place to the next one: a
    dead neuron would otherwise leave the choice to rounding. (One host sync a call.)

    Args:
        columns: ``[G, N, K]``, orthonormal where kept; the kept ones come first.
        keep: ``[G, K]``.
        previous: orthonormal ``[G, N, N]``.
    """
    count = columns.shape[-1]
    known = torch.where(keep.unsqueeze(-2), columns, previous[..., :count])
    basis, lengths = positive_qr(torch.cat([known, previous[..., count:]], -1))
    for index in (lengths <= _NEW_DIRECTION).any(-1).nonzero().flatten().tolist():
        kept = columns[index][:, keep[index]]
        basis[index] = _complete_one(kept, previous[index])
    return basis


def _complete_one(columns: Tensor, previous: Tensor) -> Tensor:
    """:func:`complete_basis` of one matrix, column by column."""
    size, count = columns.shape
    basis = torch.zeros_like(previous)
    basis[:, :count] = positive_qr(columns)[0]
    for candidate in [*range(count, size), *range(count)]:
        if count == size:
            break
        rest = previous[:, candidate]
        for _ in range(2):  # one pass would leave rounding of what it took off
            rest = rest - basis[:, :count] @ (basis[:, :count].T @ rest)
        length = rest.norm()
        if length > _NEW_DIRECTION:
            basis[:, count] = rest / length
            count += 1
    return basis


def fix_signs(columns: Tensor) -> Tensor:
    """Returns the signs ``[..., 1, K]`` that make each column's largest entry positive."""
    largest = columns.abs().argmax(-2, keepdim=True)
    signs = columns.gather(-2, largest).sign()
    return torch.where(signs == 0, torch.ones_like(signs), signs)


def singular_iteration(x_NB: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration for the leading singular vectors of both sides.

    left <- qr(x right), right <- qr(x^T left): two products with x, and the same right basis as
    that of an iteration on x^T x, which would take them for one side alone. So it begins on the
    right, or on the left where that basis is the smaller one: with fewer columns it is whole and
    sees all of x, with fewer rows it makes transposing x change nothing.

    Shifted by a millionth, or what is zero would leave its part of a basis to rounding. Where
    nothing of x is inside, the bases stay.

    Args:
        left: ``[..., N, L]``.
        right: ``[..., B, K]``.
    """
    if (left.shape[-1], left.shape[-2]) < (right.shape[-1], right.shape[-2]):
        right, left = singular_iteration(x_NB.mT, right, left)
        return left, right
    seen, more = times_thin(x_NB, right), left.shape[-1] - right.shape[-1]
    left, moved = _towards(F.pad(seen, (0, more)) if more else seen, left)
    across = times_thin(x_NB.mT, left[..., : right.shape[-1]])
    return left, torch.where(moved, _towards(across, right)[0], right)


def _towards(product: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The orthonormal basis of a product, and where there is one; else the basis from before."""
    size = product.square().sum((-2, -1), keepdim=True).sqrt_()
    found = size > 0
    shift = 1e-8 if basis.dtype == torch.float64 else 1e-6
    unit = torch.where(found, size, torch.ones_like(size))
    turned = cholesky_qr((product / unit).add_(basis, alpha=shift))
    return torch.where(found, turned, basis), found


def times_thin(x_NB: Tensor, y_BK: Tensor) -> Tensor:
    """Returns x @ y, K much smaller than N and B.

    On CPUs a transposed x takes half as long again: then it is y^T that is multiplied, from the
    left, and the product comes out transposed in memory.
    """
    if x_NB.stride(-1) == 1:
        return x_NB @ y_BK
    return (y_BK.mT @ x_NB.mT).mT


def orthogonal_iteration(a_NN: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration on a symmetric matrix, from a previous basis.

    The shift by a multiple of the trace changes no eigenvector; without it a matrix of low rank
    would leave the rest of the basis to rounding. A zero matrix keeps the basis.
    """
    trace = a_NN.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    shift = trace * (1e-8 if a_NN.dtype == torch.float64 else 1e-6)
    # In units of the trace, or products of tiny gradients would leave the range of float32.
    unit = torch.where(trace > 0, trace, torch.ones_like(trace))
    product = (a_NN / unit) @ basis + (shift / unit) * basis
    return torch.where(trace > 0, positive_qr(product)[0], basis)
