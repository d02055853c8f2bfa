"""Singular value decompositions of stacked matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError, is_orthonormal


def thin_svd(a_SL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (U, S, V) of matrices ``[..., S, L]``: A = U diag(S) V^T, S descending.

    A decomposition that fails, or whose vectors are not orthonormal, is repeated once in float64.

    Raises:
        DecompositionError: if float64 fails too.
    """
    for dtype in dict.fromkeys((a_SL.dtype, torch.float64)):
        try:
            factors = torch.linalg.svd(a_SL.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:
            continue
        left, values, right = (factor.to(a_SL.dtype) for factor in factors)
        if is_orthonormal(left) and is_orthonormal(right.mT):
            return left, values, right.mT
    raise DecompositionError(f"svd of {tuple(a_SL.shape)} failed in float64")
