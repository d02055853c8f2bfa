from __future__ import annotations

import torch

from hf_precond.linalg.subspace import orthonormal, random_basis, top_ritz_basis

TOLERANCE = 1e-12
CPU = torch.device("cpu")


def assert_orthonormal(q: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    eye = torch.eye(q.shape[-1], dtype=q.dtype).expand(*q.shape[:-2], -1, -1)
    torch.testing.assert_close(q.mT @ q, eye, rtol=tolerance, atol=tolerance)


def test_orthonormal_spans_the_same_space() -> None:
    y = torch.randn(3, 7, 4, dtype=torch.float64)
    q = orthonormal(y)
    assert_orthonormal(q)
    torch.testing.assert_close(q @ (q.mT @ y), y, rtol=TOLERANCE, atol=TOLERANCE)


def test_random_basis_depends_on_the_seed_alone() -> None:
    first = random_basis(6, 3, seed=1, dtype=torch.float64, device=CPU)
    torch.manual_seed(99)
    assert torch.equal(random_basis(6, 3, seed=1, dtype=torch.float64, device=CPU), first)
    half = random_basis(6, 3, seed=1, dtype=torch.float32, device=CPU)
    assert torch.equal(half, first.float())
    assert not torch.equal(random_basis(6, 3, seed=2, dtype=torch.float64, device=CPU), first)
    assert_orthonormal(first)


def test_ritz_vectors_are_ordered_and_diagonalise_within_the_subspace() -> None:
    a = torch.randn(2, 6, 6, dtype=torch.float64)
    a = a @ a.mT
    y = orthonormal(torch.randn(2, 6, 3, dtype=torch.float64))
    ritz = top_ritz_basis(y, a @ y)
    assert_orthonormal(ritz)
    projected = ritz.mT @ a @ ritz
    values = projected.diagonal(dim1=-2, dim2=-1)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(
        projected, torch.diag_embed(values), rtol=TOLERANCE, atol=TOLERANCE * 100
    )
    torch.testing.assert_close(y @ (y.mT @ ritz), ritz, rtol=TOLERANCE, atol=TOLERANCE)
