"""Orthogonalisation of stacked matrices by matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def newton_schulz(
    x_MB: Tensor,
    *,
    steps: int,
    coefficients: tuple[float, ...],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Brings all singular values of matrices ``[..., M, B]`` near one (Jordan et al. 2024, Muon).

    The quintic iteration X <- a X + (b A + c A^2) X, A = X X^T, from X of Frobenius norm one.
    ``torch.optim.Muon`` has the same for one matrix, in bf16; this one takes stacks and any dtype.

    Args:
        coefficients: (a, b, c).
        eps: norms below this are taken as this.
        dtype: precision of the products; the result has that of ``x_MB``.
    """
    a, b, c = coefficients
    wide = x_MB.shape[-2] <= x_MB.shape[-1]
    stack = x_MB.reshape(-1, *x_MB.shape[-2:])
    norm = torch.linalg.matrix_norm(stack, keepdim=True)
    x = (stack / norm.clamp(min=eps)).to(dtype)
    x = x if wide else x.mT
    for _ in range(steps):
        gram = x @ x.mT
        # Fused: in bf16 a sum of separately rounded products has twice the error.
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x if wide else x.mT).reshape(x_MB.shape).to(x_MB.dtype)
