"""Inverse roots and inverses against their definitions, at every scale that gradients have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError
from hf_precond.linalg.roots import (
    ROOT_METHODS,
    inverse_root,
    largest_eigenvalue,
    positive_inverse,
    root_order,
)

SCALES = (1e-12, 1e-6, 1.0, 1e4, 1e8)  # of gradients; the matrices are of second order
EXPONENTS = (1.0, 0.5, 1 / 3, 0.25, 1 / 6, 0.125)
FLOAT64_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-4
NEWTON_SQUARINGS = 12

per_method = pytest.mark.parametrize("method", ROOT_METHODS)
per_scale = pytest.mark.parametrize("scale", SCALES)


def gram(rows: int, columns: int, *batch: int, dead: int = 0) -> Tensor:
    """G G^T in float64, of rank at most ``columns``, the first rows of G zero."""
    g = torch.randn(*batch, rows, columns, dtype=torch.float64)
    g[..., :dead, :] = 0.0
    return g @ g.mT


def dense_inverse_root(a: Tensor, exponent: float, ridge: Tensor) -> Tensor:
    """(A + ridge I)^(-exponent) in float64."""
    values, vectors = torch.linalg.eigh(a.double())
    powers = (values.clamp(min=0) + ridge.double().unsqueeze(-1)) ** -exponent
    return (vectors * powers.unsqueeze(-2)) @ vectors.mT


def largest(a: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(a.double())[..., -1]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The difference is a small share of the norm, matrix by matrix."""
    difference = torch.linalg.matrix_norm(actual.double() - expected)
    assert bool((difference <= tolerance * torch.linalg.matrix_norm(expected)).all())


# --- inverse roots --------------------------------------------------------------------------------


@per_method
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_its_power_undoes_the_matrix(method: str, exponent: float) -> None:
    """X^p (A + ridge I) = I: the definition, without any decomposition."""
    a, ridge = gram(6, 9, 3), torch.tensor([1e-3, 0.1, 10.0], dtype=torch.float64)
    root = inverse_root(a, exponent, ridge, method=method)
    damped = a + torch.diag_embed(ridge.unsqueeze(-1).expand(3, 6))
    product = torch.linalg.matrix_power(root, round(1 / exponent)) @ damped
    eye = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    assert_close(product, eye, FLOAT64_TOLERANCE)
    assert_close(root, root.mT, FLOAT64_TOLERANCE)


@per_method
@per_scale
@pytest.mark.parametrize("exponent", [0.5, 0.25])
def test_float32_equals_the_dense_definition(method: str, scale: float, exponent: float) -> None:
    a = scale**2 * gram(8, 12, 2)
    ridge = 1e-3 * largest(a)
    root = inverse_root(a.float(), exponent, ridge.float(), method=method)
    assert root.dtype == torch.float32
    assert_close(root, dense_inverse_root(a, exponent, ridge), FLOAT32_TOLERANCE)


@per_method
@per_scale
def test_rank_deficient_with_dead_rows(method: str, scale: float) -> None:
    """A dead row's entry is the ridge's power, and nothing else is in its row or column."""
    a = scale**2 * gram(8, 3, 2, dead=2)
    ridge = 1e-4 * largest(a)
    root = inverse_root(a.float(), 0.5, ridge.float(), method=method)
    assert_close(root, dense_inverse_root(a, 0.5, ridge), 10 * FLOAT32_TOLERANCE)
    dead = torch.diag_embed((ridge**-0.5).unsqueeze(-1).expand(2, 2))
    assert_close(root[:, :2, :2], dead, FLOAT32_TOLERANCE)
    assert (root[:, :2, 2:].abs() <= FLOAT32_TOLERANCE * ridge[:, None, None] ** -0.5).all()


@per_method
def test_the_ridge_in_float32_is_not_below_rounding(method: str) -> None:
    """1e-6 of the largest eigenvalue, whatever is asked; float64 takes it as it is."""
    a, tiny = gram(8, 3), torch.tensor(1e-12, dtype=torch.float64)
    root = inverse_root(a.float(), 0.5, tiny.float(), method=method)
    floored = dense_inverse_root(a, 0.5, 1e-6 * largest(a))
    assert_close(root, floored, 5e-2)  # the null space is rounding beside a floor of 1e-6
    exact = inverse_root(a, 0.5, 1e-9 * largest(a), method="eigh")
    assert_close(exact, dense_inverse_root(a, 0.5, 1e-9 * largest(a)), 1e-6)


@per_method
@per_scale
def test_the_ridge_may_be_a_share_of_the_largest_eigenvalue(method: str, scale: float) -> None:
    """Where that is zero there is no root."""
    a = scale**2 * gram(8, 12, 2)
    a[1] = 0.0
    share = torch.full((2,), 1e-2)
    root = inverse_root(a.float(), 0.5, share, relative=True, method=method)
    assert_close(root[0], dense_inverse_root(a[0], 0.5, 1e-2 * largest(a[0])), 1e-3)
    assert not root[1].any()


@pytest.mark.parametrize("exponent", [0.5, 0.25])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_newton_equals_eigh(exponent: float, condition: float) -> None:
    a = gram(16, 16, 2)
    ridge = largest(a) / condition
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-2)):
        newton, eigh = (
            inverse_root(a.to(dtype), exponent, ridge.to(dtype), method=method)
            for method in ("newton", "eigh")
        )
        assert_close(newton, eigh.double(), tolerance)


@per_method
def test_a_zero_matrix_is_a_multiple_of_the_identity(method: str) -> None:
    zero, ridge = torch.zeros(2, 5, 5), torch.tensor([1e-4, 16.0])
    root = inverse_root(zero, 0.25, ridge, method=method)
    eye = torch.eye(5, dtype=torch.float64)
    assert_close(root, torch.stack([10 * eye, 0.5 * eye]), FLOAT32_TOLERANCE)


@per_method
def test_without_a_ridge_there_is_no_root(method: str) -> None:
    """Also beside others in the stack, which keep theirs."""
    a = torch.cat([torch.zeros(1, 5, 5, dtype=torch.float64), gram(5, 7, 2)]).float()
    ridge = torch.tensor([0.0, 0.1, 0.0])
    root = inverse_root(a, 0.5, ridge, method=method)
    assert root.isfinite().all()
    assert not root[[0, 2]].any()
    assert_close(root[1], dense_inverse_root(a[1], 0.5, ridge[1]), FLOAT32_TOLERANCE)


@per_method
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_stacks_equal_single_matrices(method: str, batch: tuple[int, ...]) -> None:
    a = gram(5, 7, *batch)
    ridge = torch.rand(batch, dtype=torch.float64) + 0.1
    stacked = inverse_root(a, 0.25, ridge, method=method)
    assert stacked.shape == a.shape
    for one, part, own in zip(
        a.view(-1, 5, 5), stacked.view(-1, 5, 5), ridge.view(-1), strict=True
    ):
        assert_close(part, inverse_root(one, 0.25, own, method=method), FLOAT64_TOLERANCE)


@per_method
def test_one_by_one_matrices(method: str) -> None:
    root = inverse_root(torch.full((2, 1, 1), 15.0), 0.25, torch.ones(2), method=method)
    torch.testing.assert_close(root, torch.full((2, 1, 1), 0.5))


@pytest.mark.parametrize(
    ("exponent", "order"), [(1.0, 1), (0.5, 2), (1 / 3, 3), (0.25, 4), (1 / 6, 6)]
)
def test_root_order(exponent: float, order: int) -> None:
    assert root_order(exponent) == order


@pytest.mark.parametrize("exponent", [0.3, 0.7, 2.0, 0.2501])
def test_other_exponents_have_no_order(exponent: float) -> None:
    assert root_order(exponent) is None


def test_eigh_takes_any_exponent() -> None:
    a, ridge = gram(5, 7), torch.tensor(0.1, dtype=torch.float64)
    assert_close(inverse_root(a, 0.3, ridge), dense_inverse_root(a, 0.3, ridge), FLOAT64_TOLERANCE)


# --- the largest eigenvalue -----------------------------------------------------------------------


@per_method
@per_scale
def test_largest_eigenvalue(method: str, scale: float) -> None:
    a = scale**2 * gram(12, 5, 4, dead=3)
    found = largest_eigenvalue(a.float(), method=method)
    torch.testing.assert_close(found.double(), largest(a), rtol=1 / 4000, atol=0.0)


@per_method
@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_wide_matrices_stay_in_range(method: str, scale: float) -> None:
    """The squares of all entries together leave float32's range before any entry does."""
    a = scale**2 * gram(256, 256)
    found = largest_eigenvalue(a.float(), method=method)
    torch.testing.assert_close(found.double(), largest(a), rtol=1 / 700, atol=0.0)
    ridge = 1e-2 * largest(a)
    root = inverse_root(a.float(), 0.25, ridge.float(), method=method)
    assert_close(root, dense_inverse_root(a, 0.25, ridge), FLOAT32_TOLERANCE)


@per_method
def test_largest_eigenvalue_of_zero_is_zero(method: str) -> None:
    a = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    assert largest_eigenvalue(a, method=method).tolist() == pytest.approx([0.0, 1.0], rel=1e-6)


def test_rounding_below_zero_is_no_eigenvalue() -> None:
    assert largest_eigenvalue(torch.full((1, 1), -1e-9)).item() == 0.0


def crowded(size: int, gap: float) -> Tensor:
    """The largest eigenvalue is one, and all others lie a gap below."""
    values = torch.full((size,), 1.0 - gap, dtype=torch.float64)
    values[0] = 1.0
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return (q * values) @ q.T


@pytest.mark.parametrize("size", [2, 8, 64])
def test_by_products_it_is_low_by_no_more_than_the_crowd_allows(size: int) -> None:
    """ln(N) / 2^12 at most, where all N eigenvalues crowd just below the largest."""
    for gap in (0.0, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 0.5):
        found = largest_eigenvalue(crowded(size, gap), method="newton").item()
        assert 1.0 - math.log(size) / 2**NEWTON_SQUARINGS <= found <= 1.0 + 1e-12, gap


@per_method
def test_a_matrix_that_is_not_finite_is_no_number(method: str) -> None:
    broken = torch.full((2, 3, 3), torch.nan)
    if method == "eigh":
        with pytest.raises(DecompositionError, match=r"\(2, 3, 3\)"):
            largest_eigenvalue(broken)
    else:
        assert largest_eigenvalue(broken, method=method).isnan().all()


# --- inverses -------------------------------------------------------------------------------------


@per_scale
def test_positive_inverse_equals_the_dense_inverse(scale: float) -> None:
    a = gram(8, 12, 2)
    a = scale**2 * (a + 1e-2 * torch.diag_embed(largest(a).unsqueeze(-1).expand(2, 8)))
    found = positive_inverse(a.float())
    assert found.dtype == torch.float32
    assert_close(found, torch.linalg.inv(a), FLOAT32_TOLERANCE)


def nearly_singular() -> Tensor:
    """[[1, b], [b, fl(b^2)]]: the second pivot is zero in float32 and 6e-8 in float64."""
    b = torch.tensor(1.0 + 2049 * 2.0**-23)
    return torch.stack([torch.stack([torch.ones(()), b]), torch.stack([b, b * b])])


def test_an_inverse_that_float32_cannot_find_is_found_in_float64() -> None:
    a = torch.stack([nearly_singular(), torch.eye(2)])
    found = positive_inverse(a)
    assert found.dtype == torch.float32
    assert_close(found, torch.linalg.inv(a.double()), 1e-3)


def test_a_failure_in_float32_is_retried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    solver, tried = torch.linalg.cholesky_ex, []

    def picky(a: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(a.dtype)
        factor, info = solver(a)
        return factor, info + (a.dtype == torch.float32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", picky)
    a = gram(4, 9, 3).float()
    assert_close(positive_inverse(a), torch.linalg.inv(a.double()), FLOAT32_TOLERANCE)
    assert tried == [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("entry", [-1.0, 0.0, torch.nan])
def test_what_is_not_positive_definite_raises(entry: float, dtype: torch.dtype) -> None:
    """Whatever else is in the stack: the shell then tries parameter by parameter."""
    a = torch.eye(3, dtype=dtype).repeat(2, 1, 1)
    a[1, 2, 2] = entry
    with pytest.raises(DecompositionError, match=r"\(2, 3, 3\).*float64"):
        positive_inverse(a)
