"""Leading eigenpairs of stacked positive semidefinite matrices by random projection.

Halko, Martinsson and Tropp (2011), as Puiu (2022) uses it for Kronecker factors: a Gaussian sketch,
power iterations that are orthonormalised after each product (their powers alone would leave
float32's range), and a small decomposition inside the subspace they found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.linalg.eigen import eigh
from hf_precond.linalg.subspace import orthonormal
from hf_precond.linalg.svd import thin_svd

METHODS = ("rsvd", "srevd")


def leading_eigenpairs(
    a_NN: Tensor, rank: int, *, oversampling: int, power_iterations: int, seed: int, method: str
) -> tuple[Tensor, Tensor]:
    """Returns vectors ``[G, N, rank]`` and descending values ``[G, rank]`` of ``a`` ``[G, N, N]``.

    Args:
        rank: at most N. Where rank + oversampling >= N nothing is left to chance and an
            eigendecomposition takes over.
        method: ``"rsvd"`` takes the right singular vectors of Q^T A (RS-KFAC), ``"srevd"`` the
            eigenvectors of Q^T A Q lifted by Q (SRE-KFAC): cheaper, and less accurate.

    Raises:
        DecompositionError: if a decomposition fails in float64, too.
    """
    size = a_NN.shape[-1]
    width = min(size, rank + oversampling)
    if width == size:
        values, vectors = eigh(a_NN)
        return vectors.flip(-1)[..., :rank], values.flip(-1)[..., :rank].clamp(min=0)
    unit = largest_entry(a_NN)
    basis = orthonormal(a_NN @ gaussian(size, width, seed=seed, like=a_NN) / unit)
    for _ in range(power_iterations):
        basis = orthonormal(a_NN @ basis / unit)
    product = a_NN @ basis / unit
    if method == "rsvd":
        vectors, values, _ = thin_svd(product)
    else:
        small = basis.mT @ product
        values, inner = eigh((small + small.mT) / 2)
        values, vectors = values.flip(-1), basis @ inner.flip(-1)
    return vectors[..., :rank], values[..., :rank].clamp(min=0) * unit.squeeze(-1)


def gaussian(rows: int, columns: int, *, seed: int, like: Tensor) -> Tensor:
    """A seeded Gaussian, drawn in float64 on the CPU: the same for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return drawn.to(dtype=like.dtype, device=like.device)


def largest_entry(a_NN: Tensor) -> Tensor:
    """Largest entry ``[..., 1, 1]``, one for zero matrices: a unit to compute in.

    It lies on the diagonal of a positive semidefinite matrix.
    """
    peak = a_NN.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    return torch.where(peak > 0, peak, torch.ones_like(peak))
