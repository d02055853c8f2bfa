"""Inverse roots and inverses of stacked symmetric positive semidefinite matrices.

Two ways to the same matrix: an eigendecomposition, exact for every exponent, and a coupled Newton
iteration of matrix products alone, which GPUs run at full speed (Iannazzo 2006; used for Shampoo by
Anil et al. 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError, eigh, eigvalsh

ROOT_METHODS = ("eigh", "newton")
# From a smallest eigenvalue of 1e-7 of the largest, Newton needs 17 steps up and 5 to converge.
_NEWTON_ITERS = 30
_SQUARINGS = 12


def inverse_root(
    a_NN: Tensor,
    exponent: float,
    ridge: Tensor,
    *,
    relative: bool = False,
    method: str = "eigh",
) -> Tensor:
    """Returns ``(A + ridge I)^(-exponent)`` of matrices ``[..., N, N]``.

    Args:
        exponent: positive; ``"newton"`` needs one over a whole number.
        ridge: ``[...]``, added to every eigenvalue; outside float64 at least 1e-6 of the largest,
            below which eigenvalues are rounding. Where it is zero the result is zero.
        relative: whether ``ridge`` is a share of the largest eigenvalue.

    Raises:
        DecompositionError: if the eigendecomposition fails in float64, too.
    """
    if method == "newton":
        largest = largest_eigenvalue(a_NN, method=method)
    else:
        values, vectors = eigh(a_NN)
        largest = values[..., -1].clamp(min=0)
        # Below this they are rounding, another one on every processor, which a small ridge beside
        # them would let through.
        noise = a_NN.shape[-1] * torch.finfo(a_NN.dtype).eps * largest
        values = torch.where(values > noise.unsqueeze(-1), values, torch.zeros_like(values))
    ridge = ridge * largest if relative else ridge
    alive = ridge > 0
    if a_NN.dtype != torch.float64:
        ridge = torch.maximum(ridge, 1e-6 * largest)
    shift = torch.where(alive, ridge, torch.ones_like(ridge)).unsqueeze(-1)
    if method == "newton":
        shifted = a_NN + torch.diag_embed(shift.expand(a_NN.shape[:-1]))
        root = _newton_inverse_root(shifted, exponent)
    else:
        root = (vectors * (values + shift).pow(-exponent).unsqueeze(-2)) @ vectors.mT
    return root * alive[..., None, None]


def root_order(exponent: float) -> int | None:
    """Returns p where ``exponent`` is 1/p for a whole number p, else None."""
    order = round(1 / exponent)
    return order if abs(order * exponent - 1) < 1e-9 else None


def largest_eigenvalue(a_NN: Tensor, *, method: str = "eigh") -> Tensor:
    """Returns the largest eigenvalue ``[...]`` of positive semidefinite matrices.

    ``"newton"`` takes matrix products only: the Rayleigh quotient of A^(2^12), below the true value
    by less than one part in 4096 / ln N, and that only where many eigenvalues crowd at the top.

    Raises:
        DecompositionError: if the eigendecomposition fails in float64, too.
    """
    if method == "eigh":
        return eigvalsh(a_NN)[..., -1].clamp(min=0)
    norm = _norm(a_NN)
    power = a_NN / torch.where(norm > 0, norm, torch.ones_like(norm))
    for _ in range(_SQUARINGS):
        power = power @ power
        power = power / _trace(power)[..., None, None].clamp(min=torch.finfo(power.dtype).tiny)
    return (power * a_NN).sum((-2, -1)).clamp(min=0)


def positive_inverse(a_NN: Tensor) -> Tensor:
    """Returns the inverses of positive definite matrices by Cholesky factors, retried in float64.

    Raises:
        DecompositionError: if a matrix is not positive definite in float64 either.
    """
    for dtype in dict.fromkeys((a_NN.dtype, torch.float64)):
        factor, info = torch.linalg.cholesky_ex(a_NN.to(dtype))
        if not bool((info != 0).any()):
            return torch.cholesky_inverse(factor).to(a_NN.dtype)
    raise DecompositionError(f"Cholesky of {tuple(a_NN.shape)} failed in float64")


def _newton_inverse_root(a_NN: Tensor, exponent: float) -> Tensor:
    """Coupled Newton: M -> I while X -> A^(-1/p), with M = X^p A in exact arithmetic throughout."""
    order = root_order(exponent)
    assert order is not None, "options are checked where the algorithm is built"
    eye = torch.eye(a_NN.shape[-1], dtype=a_NN.dtype, device=a_NN.device)
    scale = (1 + order) / (2 * _norm(a_NN))
    power, root = a_NN * scale, eye * scale**exponent
    for _ in range(_NEWTON_ITERS):
        step = ((1 + order) * eye - power) / order
        power = torch.linalg.matrix_power(step, order) @ power
        root = root @ step
    return root


def _norm(a_NN: Tensor) -> Tensor:
    """Frobenius norms ``[..., 1, 1]``; squares of gradients' squares leave the range of float32."""
    peak = a_NN.abs().amax((-2, -1), keepdim=True)
    unit = torch.where(peak > 0, peak, torch.ones_like(peak))
    return peak * torch.linalg.matrix_norm(a_NN / unit, keepdim=True)


def _trace(a_NN: Tensor) -> Tensor:
    return a_NN.diagonal(dim1=-2, dim2=-1).sum(-1)
