"""Dense forms, and the order of positive semidefinite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-10  # smallest allowed eigenvalue, relative to the larger matrix


def assert_below(lower: Tensor, upper: Tensor, what: str) -> None:
    """lower <= upper for stacked symmetric matrices [..., N, N]."""
    scale = torch.linalg.matrix_norm(upper, ord=2).amax()
    smallest = torch.linalg.eigvalsh(upper - lower).amin()
    assert smallest >= -TOLERANCE * scale, f"{what}: eigenvalue {smallest:.3e} at scale {scale:.3e}"


def low_rank(vectors: Tensor, values: Tensor) -> Tensor:
    """U diag(s) U^T of U [..., N, K] and s [..., K]."""
    return (vectors * values.unsqueeze(-2)) @ vectors.mT


def times_identity(mass: Tensor, size: int) -> Tensor:
    """rho I of rho [...]."""
    return mass[..., None, None] * torch.eye(size, dtype=mass.dtype)


def spectrum(dense: Tensor) -> Tensor:
    """Eigenvalues [..., N], largest first."""
    return torch.linalg.eigvalsh(dense).flip(-1).clamp(min=0)


def trace(dense: Tensor) -> Tensor:
    """Sum of the diagonal, [...]."""
    return dense.diagonal(dim1=-2, dim2=-1).sum(-1)


def inverse_power(dense: Tensor, exponent: float) -> Tensor:
    """A^(-exponent) of symmetric positive definite matrices [..., N, N]."""
    values, vectors = torch.linalg.eigh(dense)
    return low_rank(vectors, values.pow(-exponent))


def tail_bound(dense: Tensor, rank: int) -> Tensor:
    """min over p < rank of sum_{j > p} sigma_j / (rank - p), [...]."""
    sigma = spectrum(dense)
    bounds = [sigma[..., p:].sum(-1) / (rank - p) for p in range(rank)]
    return torch.stack(bounds).amin(0)
