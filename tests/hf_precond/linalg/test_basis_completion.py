"""Whole orthonormal bases: signs, QR, completion and orthogonal iteration, alike every time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.subspace import (
    complete_basis,
    fix_signs,
    orthogonal_iteration,
    positive_qr,
)
from hf_precond.linalg.svd import thin_svd
from tests.reference import bases as reference

SCALES = (1e-12, 1e-6, 1.0, 1e4, 1e8)  # of gradients; the matrices are of second order
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
TOLERANCE = TOLERANCES[torch.float64]

per_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
per_scale = pytest.mark.parametrize("scale", SCALES)


def random_basis(size: int, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(*batch, size, size, dtype=torch.float64)).Q.to(dtype)


def identity(size: int, groups: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.eye(size, dtype=dtype).repeat(groups, 1, 1)


def kept(groups: int, count: int, number: int) -> Tensor:
    """A mask of the first columns of every group."""
    return (torch.arange(count) < number).expand(groups, count)


def assert_orthonormal(basis: Tensor) -> None:
    gram = basis.double().mT @ basis.double()
    eye = torch.eye(basis.shape[-1], dtype=torch.float64).expand_as(gram)
    tolerance = TOLERANCES[basis.dtype]
    torch.testing.assert_close(gram, eye, rtol=0.0, atol=tolerance)


def assert_completes(columns: Tensor, number: int, previous: Tensor) -> Tensor:
    """The kept columns stay, the rest is orthonormal to them, and a second call says the same."""
    groups, _, count = columns.shape
    keep = kept(groups, count, number)
    before = [part.clone() for part in (columns, keep, previous)]
    basis = complete_basis(columns, keep, previous)
    assert basis.shape == previous.shape
    assert_orthonormal(basis)
    tolerance = TOLERANCES[basis.dtype]
    torch.testing.assert_close(basis[..., :number], columns[..., :number], rtol=0.0, atol=tolerance)
    assert torch.equal(complete_basis(columns, keep, previous), basis)
    for part, old in zip((columns, keep, previous), before, strict=True):
        assert torch.equal(part, old)
    return basis


# --- QR and signs ---------------------------------------------------------------------------------


@per_dtype
def test_positive_qr_keeps_the_direction_of_every_column(dtype: torch.dtype) -> None:
    x = torch.randn(3, 6, 4, dtype=dtype)
    q, diagonal = positive_qr(x)
    assert_orthonormal(q)
    upper = q.mT @ x
    torch.testing.assert_close(upper.diagonal(dim1=-2, dim2=-1), diagonal)
    assert (diagonal >= 0).all()
    torch.testing.assert_close(q @ upper.triu(), x)


def test_orthonormal_columns_are_their_own_qr() -> None:
    """Whatever signs LAPACK's reflections have."""
    basis = random_basis(5, 4) * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    q, diagonal = positive_qr(basis)
    torch.testing.assert_close(q, basis, rtol=0.0, atol=TOLERANCE)
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal))


def test_fix_signs_makes_the_largest_entry_positive() -> None:
    columns = torch.tensor([[[0.1, -3.0, 0.0], [-0.2, 2.0, 0.0]]])
    assert fix_signs(columns).tolist() == [[[-1.0, -1.0, 1.0]]]
    random = torch.randn(3, 6, 4)
    fixed = random * fix_signs(random)
    largest = fixed.gather(-2, fixed.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    assert torch.equal(fix_signs(-random), -fix_signs(random))


# --- completion -----------------------------------------------------------------------------------


@per_dtype
@pytest.mark.parametrize("number", [0, 1, 3, 6])
@pytest.mark.parametrize("count", [6, 4])
def test_completes_to_an_orthonormal_basis(number: int, count: int, dtype: torch.dtype) -> None:
    columns, previous = random_basis(6, 3, dtype=dtype), random_basis(6, 3, dtype=dtype)
    assert_completes(columns[..., :count], min(number, count), previous)


def test_equals_the_reference() -> None:
    columns, previous = random_basis(6, 3), random_basis(6, 3)
    basis = assert_completes(columns, 2, previous)
    for index in range(3):
        expected = reference.complete(columns[index, :, :2], previous[index])
        torch.testing.assert_close(basis[index], expected, rtol=0.0, atol=TOLERANCE)


def test_what_is_not_kept_counts_for_nothing() -> None:
    columns, previous = random_basis(6, 3), random_basis(6, 3)
    noise = columns.clone()
    noise[..., 2:] = torch.randn(3, 6, 4, dtype=torch.float64)
    keep = kept(3, 6, 2)
    expected = complete_basis(columns, keep, previous)
    assert torch.equal(complete_basis(noise, keep, previous), expected)
    noise[..., 2:] = 0.0
    assert torch.equal(complete_basis(noise, keep, previous), expected)


@per_dtype
def test_nothing_kept_is_the_previous_basis(dtype: torch.dtype) -> None:
    previous = random_basis(6, 2, dtype=dtype)
    basis = assert_completes(torch.zeros(2, 6, 4, dtype=dtype), 0, previous)
    torch.testing.assert_close(basis, previous, rtol=0.0, atol=TOLERANCES[dtype])


def test_numbers_of_kept_columns_may_differ_in_a_stack() -> None:
    columns, previous = random_basis(6, 4), random_basis(6, 4)
    keep = torch.arange(6) < torch.tensor([0, 2, 5, 6]).unsqueeze(-1)
    basis = complete_basis(columns, keep, previous)
    assert_orthonormal(basis)
    for index in range(4):
        one = slice(index, index + 1)
        alone = complete_basis(columns[one], keep[one], previous[one])
        torch.testing.assert_close(basis[one], alone, rtol=0.0, atol=TOLERANCE)


@per_dtype
def test_a_dead_coordinate_leaves_its_place_to_the_next(dtype: torch.dtype) -> None:
    """Kept: e_2 and e_3. Of the identity, e_2 and e_3 are taken, e_0 and e_1 come last."""
    columns = identity(4, 2, dtype)[..., [2, 3, 0, 1]]
    basis = assert_completes(columns, 2, identity(4, 2, dtype))
    torch.testing.assert_close(basis, columns)


@per_dtype
@pytest.mark.parametrize("dead", [[0], [5], [0, 1], [1, 3, 4], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("known", ["identity", "previous"])
def test_singular_vectors_of_a_gradient_with_dead_rows(
    dead: list[int], known: str, dtype: torch.dtype
) -> None:
    """Every column of the basis lies in the dead coordinates or in the others, never in both."""
    alive = [index for index in range(6) if index not in dead]
    g = torch.randn(2, 6, 9, dtype=dtype)
    g[:, dead] = 0.0
    left, values, _ = thin_svd(g)
    noise = 9 * torch.finfo(dtype).eps
    number = len(alive)
    assert ((values > noise * values[:, :1]).sum(-1) == number).all()
    previous = identity(6, 2, dtype)
    if known == "previous":
        previous[:, alive] = previous[:, alive][..., [*range(1, 6), 0]]
        previous = positive_qr(previous + 0.1 * torch.eye(6, dtype=dtype))[0]
    basis = assert_completes(left * fix_signs(left), number, previous)
    outside = basis[:, dead][..., :number].abs().max()
    assert outside <= TOLERANCES[dtype]


@per_dtype
def test_a_basis_completes_itself(dtype: torch.dtype) -> None:
    """The same vectors in another order: the worst case, in which every candidate is taken."""
    previous = random_basis(7, 3, dtype=dtype)
    for number in range(8):
        assert_completes(previous.flip(-1), number, previous)


@per_dtype
def test_rounding_does_not_choose(dtype: torch.dtype) -> None:
    """Columns that differ by rounding are completed alike, dead coordinates or not."""
    g = torch.randn(2, 5, 8, dtype=dtype)
    g[:, [1, 4]] = 0.0
    left, _, _ = thin_svd(g)
    left = left * fix_signs(left)
    eps = torch.finfo(dtype).eps
    nearly = left + eps * torch.randn_like(left)
    bases = [
        complete_basis(columns, kept(2, 5, 3), identity(5, 2, dtype)) for columns in (left, nearly)
    ]
    torch.testing.assert_close(*bases, rtol=0.0, atol=100 * eps)


# --- orthogonal iteration -------------------------------------------------------------------------


def psd(size: int, rank: int, groups: int = 2) -> Tensor:
    """Of a rank, with eigenvalues 1, 1/4, 1/16, ..."""
    q = random_basis(size, groups)
    values = torch.where(torch.arange(size) < rank, 0.25 ** torch.arange(size).double(), 0.0)
    return (q * values) @ q.mT


def test_iteration_converges_to_eigenvectors() -> None:
    a, basis = psd(6, 6), random_basis(6, 2)
    for _ in range(60):
        basis = orthogonal_iteration(a, basis)
    assert_orthonormal(basis)
    rotated = basis.mT @ a @ basis
    expected = torch.diag(0.25 ** torch.arange(6).double()).expand(2, 6, 6)
    torch.testing.assert_close(rotated, expected, rtol=0.0, atol=1e-10)


def test_one_step_is_the_q_factor_of_the_product() -> None:
    a, basis = psd(6, 6), random_basis(6, 2)
    found = orthogonal_iteration(a, basis)
    for index in range(2):
        expected = reference.orthogonal_iteration(a[index], basis[index])
        torch.testing.assert_close(found[index], expected, rtol=0.0, atol=1e-9)


@per_scale
@pytest.mark.parametrize("rank", [6, 3, 1])
def test_iteration_in_float32_at_every_scale(rank: int, scale: float) -> None:
    a, basis = psd(6, rank), random_basis(6, 2)
    found = orthogonal_iteration((scale**2 * a).float(), basis.float())
    assert_orthonormal(found)
    plain = orthogonal_iteration(a.float(), basis.float())
    torch.testing.assert_close(found[..., :rank], plain[..., :rank], rtol=0.0, atol=1e-4)


@per_dtype
def test_iteration_keeps_the_basis_of_a_zero_matrix(dtype: torch.dtype) -> None:
    basis = random_basis(6, 2, dtype=dtype)
    a = torch.stack([torch.zeros(6, 6), torch.eye(6)]).to(dtype)
    found = orthogonal_iteration(a, basis)
    assert torch.equal(found[0], basis[0])
    torch.testing.assert_close(found, basis, rtol=0.0, atol=TOLERANCES[dtype])


@per_dtype
def test_iteration_keeps_dead_coordinates_apart(dtype: torch.dtype) -> None:
    g = torch.randn(2, 6, 9, dtype=dtype)
    g[:, 4:] = 0.0
    basis = identity(6, 2, dtype)
    for _ in range(5):
        basis = orthogonal_iteration(g @ g.mT, basis)
        assert_orthonormal(basis)
    torch.testing.assert_close(basis[:, 4:, 4:], identity(2, 2, dtype))
    assert basis[:, 4:, :4].abs().max() <= TOLERANCES[dtype]
