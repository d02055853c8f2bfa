from __future__ import annotations

from math import log10

import pytest
import torch

from hf_precond.linalg.subspace import (
    cholesky_qr,
    orthonormal,
    positive_qr,
    random_basis,
    singular_iteration,
    times_thin,
    top_ritz_basis,
)

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


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e10])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_cholesky_qr_is_qr_with_a_positive_diagonal(condition: float, rank: int) -> None:
    left = orthonormal(torch.randn(2, 160, rank, dtype=torch.float64))
    right = orthonormal(torch.randn(2, rank, rank, dtype=torch.float64))
    x = (left * torch.logspace(0, -log10(condition), rank, dtype=torch.float64)) @ right.mT
    x = x.float()
    q = cholesky_qr(x)
    assert q.dtype == torch.float32
    assert_orthonormal(q, 1e-6)
    upper = q.double().mT @ x.double()
    torch.testing.assert_close(upper.tril(-1), torch.zeros_like(upper), rtol=0, atol=1e-7)
    assert (upper.diagonal(dim1=-2, dim2=-1) > 0).all()
    if condition <= 1e3:
        torch.testing.assert_close(q.double(), positive_qr(x.double())[0], rtol=0, atol=1e-6)


def test_cholesky_qr_does_not_mind_columns_of_different_size() -> None:
    x = torch.randn(3, 200, 6) * torch.tensor([1e8, 1.0, 1e-6, 1e4, 1e-2, 1e2])
    assert_orthonormal(cholesky_qr(x), 1e-6)


@pytest.mark.parametrize("shape", [(2, 160, 8), (2, 9, 8)], ids=["tall", "square"])
def test_cholesky_qr_takes_reflections_for_float64_and_few_rows(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(cholesky_qr(x), positive_qr(x)[0])
    few = torch.randn(2, 9, 8)
    assert torch.equal(cholesky_qr(few), positive_qr(few)[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_times_thin_is_a_product(transposed: bool) -> None:
    x = torch.randn(2, 12, 30, dtype=torch.float64)
    x = x.mT if transposed else x
    y = torch.randn(2, x.shape[-1], 3, dtype=torch.float64)
    torch.testing.assert_close(times_thin(x, y), x @ y, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("size", "columns"), [((80, 90), (3, 3)), ((3, 90), (3, 5)), ((80, 4), (6, 4))], ids=str
)
def test_singular_iteration_finds_the_leading_directions_of_both_sides(
    size: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> None:
    number = min(6, *size)
    sides = [orthonormal(torch.randn(1, rows, number, dtype=torch.float64)) for rows in size]
    values = torch.tensor([9.0, 8.0, 7.0, 0.5, 0.2, 0.1], dtype=torch.float64)[:number]
    x = ((sides[0] * values) @ sides[1].mT).to(dtype)
    left, right = (
        random_basis(rows, width, seed=0, dtype=dtype, device=CPU).expand(1, rows, width)
        for rows, width in zip(size, columns, strict=True)
    )
    for _ in range(10):
        left, right = singular_iteration(x, left, right)
    for basis, side in zip((left, right), sides, strict=True):
        assert_orthonormal(basis, 1e-6)
        inside = (basis.mT @ side[..., :3].to(dtype)).square().sum()
        torch.testing.assert_close(inside, torch.tensor(3.0, dtype=dtype), rtol=1e-5, atol=0)
    kept = singular_iteration(torch.zeros_like(x), left, right)
    assert torch.equal(kept[0], left)
    assert torch.equal(kept[1], right)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_singular_iteration_of_low_rank_in_float32_stays_orthonormal(
    rank: int, sign: float
) -> None:
    x = torch.randn(4, 160, rank) @ torch.randn(4, rank, 200) * 1e-3
    left, right = (
        random_basis(size, 24, seed=0, dtype=x.dtype, device=CPU).expand(4, size, 24)
        for size in (160, 200)
    )
    for scale in (1.0, sign, 1.0, sign):
        left, right = singular_iteration(scale * x, left, right)
        for basis in (left, right):
            assert_orthonormal(basis, 1e-5)


def test_singular_iteration_goes_the_way_of_an_iteration_on_the_gram_matrix() -> None:
    x = torch.randn(2, 30, 20, dtype=torch.float64)
    left, right = (orthonormal(torch.randn(2, n, 4, dtype=torch.float64)) for n in (30, 20))
    _, found = singular_iteration(x, left, right)
    expected = positive_qr(x.mT @ (x @ right))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
