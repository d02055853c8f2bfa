"""Orthonormal bases of stacked subspaces."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(y_BK: Tensor) -> Tensor:
    """Returns an orthonormal basis of the range of ``y`` ``[..., B, K]``, K <= B, by QR."""
    return torch.linalg.qr(y_BK).Q


def random_basis(
    size: int, rank: int, *, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns a seeded orthonormal ``[size, rank]``: the Q of a Gaussian.

    Drawn and factored in float64 on the CPU, so that every dtype, device and process starts alike.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return orthonormal(gaussian).to(dtype=dtype, device=device)


def top_ritz_basis(y_BL: Tensor, ay_BL: Tensor) -> Tensor:
    """Rotates an orthonormal basis to Ritz vectors, largest Ritz value first.

    Args:
        y_BL: orthonormal ``[..., B, L]``.
        ay_BL: ``A @ y`` for a symmetric A.
    """
    projected = y_BL.mT @ ay_BL
    _, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    return y_BL @ vectors.flip(-1)
