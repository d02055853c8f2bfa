"""Low-rank forms against the dense matrices they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.lowrank import add_gram, inverse_power

SCALES = (1e-12, 1e-6, 1.0, 1e4, 1e8)  # of gradients; values are of second order
FLOAT64_TOLERANCE = 1e-11
FLOAT32_TOLERANCE = 1e-5
SIZES = [(9, 2, 3), (9, 0, 3), (9, 3, 1), (9, 5, 4), (9, 4, 7), (3, 3, 8), (1, 1, 1)]

Form = tuple[Tensor, Tensor]

per_size = pytest.mark.parametrize(("size", "rank", "extra"), SIZES, ids=str)
per_scale = pytest.mark.parametrize("scale", SCALES)


def form(size: int, rank: int, groups: int = 2) -> Form:
    """Orthonormal vectors and descending values."""
    vectors = torch.linalg.qr(torch.randn(groups, size, rank, dtype=torch.float64)).Q
    return vectors, torch.rand(groups, rank, dtype=torch.float64).sort(-1, descending=True).values


def dense(vectors: Tensor, values: Tensor) -> Tensor:
    """U diag(s) U^T in float64."""
    return (vectors.double() * values.double().unsqueeze(-2)) @ vectors.double().mT


def gram(columns: Tensor) -> Tensor:
    return columns.double() @ columns.double().mT


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The difference is a small share of the norm, matrix by matrix."""
    difference = torch.linalg.matrix_norm(actual.double() - expected)
    assert (difference <= tolerance * torch.linalg.matrix_norm(expected)).all()


def assert_is_form(vectors: Tensor, values: Tensor, tolerance: float) -> None:
    """Columns are orthonormal where the value is positive, zero elsewhere; values descend."""
    assert (values >= 0).all()
    assert (values.diff() <= 0).all()
    alive = torch.diag_embed((values > 0).double())
    difference = vectors.double().mT @ vectors.double() - alive
    assert difference.abs().max() <= tolerance


def add_all(before: Form, columns: Tensor) -> Form:
    """The sum with all its vectors."""
    return add_gram(*before, columns, keep=columns.shape[-2])


def check(before: Form, columns: Tensor, *, tolerance: float = FLOAT64_TOLERANCE) -> Form:
    """Adds columns to a form and compares with the dense sum."""
    vectors, values = add_all(before, columns)
    size = columns.shape[-2]
    rank = min(size, before[0].shape[-1] + columns.shape[-1])
    assert vectors.shape == (*columns.shape[:-1], rank)
    assert values.shape == (*columns.shape[:-2], rank)
    assert vectors.dtype == values.dtype == columns.dtype
    assert_close(dense(vectors, values), dense(*before) + gram(columns), tolerance)
    assert_is_form(vectors, values, tolerance)
    return vectors, values


# --- adding ---------------------------------------------------------------------------------------


@per_size
@pytest.mark.parametrize("groups", [1, 4])
def test_the_sum_is_the_dense_sum(size: int, rank: int, extra: int, groups: int) -> None:
    columns = torch.randn(groups, size, extra, dtype=torch.float64)
    check(form(size, rank, groups), columns)


@per_size
def test_vectors_may_be_stored_as_rows(size: int, rank: int, extra: int) -> None:
    vectors, values = form(size, rank)
    columns = torch.randn(2, extra, size, dtype=torch.float64).mT
    check((vectors.mT.contiguous().mT, values), columns)


@per_size
@per_scale
def test_float32_at_every_scale(size: int, rank: int, extra: int, scale: float) -> None:
    vectors, values = form(size, rank)
    before = vectors.float(), (scale**2 * values).float()
    columns = (scale * torch.randn(2, size, extra, dtype=torch.float64)).float()
    check(before, columns, tolerance=FLOAT32_TOLERANCE)


@per_size
@pytest.mark.parametrize("keep", [1, 2, 100])
def test_vectors_that_nobody_wants_are_left_out(
    size: int, rank: int, extra: int, keep: int
) -> None:
    """All eigenvalues are there, and the leading vectors are the same."""
    before, columns = form(size, rank), torch.randn(2, size, extra, dtype=torch.float64)
    vectors, values = add_all(before, columns)
    leading, same_values = add_gram(*before, columns, keep=keep)
    assert torch.equal(same_values, values)
    wanted = vectors[..., :keep]
    assert leading.shape == wanted.shape
    torch.testing.assert_close(leading, wanted, rtol=0.0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 1e3, 1e6])
def test_large_and_small_additions(ratio: float) -> None:
    """What is far below the largest value counts as long as it is above rounding."""
    columns = ratio * torch.randn(3, 9, 2, dtype=torch.float64)
    check(form(9, 3, 3), columns)


@pytest.mark.parametrize("extra", [1, 4])
def test_columns_inside_the_span_add_no_direction(extra: int) -> None:
    vectors, values = form(9, 3)
    columns = vectors @ torch.randn(2, 3, extra, dtype=torch.float64)
    _, found = check((vectors, values), columns)
    assert (found[:, :3] > 0).all()
    assert not found[:, 3:].any()


@pytest.mark.parametrize("extra", [1, 4])
def test_columns_almost_inside_the_span_stay_orthogonal_to_it(extra: int) -> None:
    vectors, values = form(9, 3)
    inside = vectors @ torch.randn(2, 3, extra, dtype=torch.float64)
    nearly = inside + 1e-6 * torch.randn(2, 9, extra, dtype=torch.float64)
    check((vectors, values), nearly)


def test_equal_columns_are_one_direction() -> None:
    column = torch.randn(2, 9, 1, dtype=torch.float64)
    _, found = check(form(9, 2), column.expand(2, 9, 3).contiguous())
    assert ((found > 0).sum(-1) == 3).all()


@per_scale
def test_dead_rows_and_low_rank_stay_dead(scale: float) -> None:
    """A neuron without a gradient has no share in any direction."""
    columns = torch.randn(2, 9, 2, dtype=torch.float64) @ torch.randn(2, 2, 5, dtype=torch.float64)
    columns[:, :3] = 0.0
    zero = torch.zeros(2, 9, 2), torch.zeros(2, 2)
    vectors, values = check(zero, (scale * columns).float(), tolerance=FLOAT32_TOLERANCE)
    assert ((values > 0).sum(-1) == 2).all()
    assert vectors[:, :3].abs().max() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("extra", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_and_zero_are_zero(extra: int, dtype: torch.dtype) -> None:
    zero = torch.zeros(2, 9, 2, dtype=dtype), torch.zeros(2, 2, dtype=dtype)
    vectors, values = add_all(zero, torch.zeros(2, 9, extra, dtype=dtype))
    assert not values.any()
    assert not vectors.any()


@pytest.mark.parametrize("extra", [1, 3, 8])
def test_zero_columns_change_nothing(extra: int) -> None:
    before = form(9, 3)
    _, values = check(before, torch.zeros(2, 9, extra, dtype=torch.float64))
    torch.testing.assert_close(values[:, :3], before[1])
    assert not values[:, 3:].any()


@pytest.mark.parametrize("extra", [1, 2])
def test_matrices_of_a_stack_do_not_mix(extra: int) -> None:
    """One is zero, one inside the span, one general."""
    vectors, values = form(9, 3, 3)
    columns = torch.randn(3, 9, extra, dtype=torch.float64)
    columns[0] = 0.0
    columns[1] = vectors[1] @ torch.randn(3, extra, dtype=torch.float64)
    together = dense(*check((vectors, values), columns))
    for index in range(3):
        one = slice(index, index + 1)
        alone = dense(*add_all((vectors[one], values[one]), columns[one]))
        assert_close(together[one], alone, FLOAT64_TOLERANCE)


@pytest.mark.parametrize("extra", [1, 2])
def test_many_additions_stay_orthonormal(extra: int) -> None:
    """As an optimizer's steps: cut back to the rank, then added to again."""
    vectors, values = torch.zeros(2, 12, 3), torch.zeros(2, 3)
    for _ in range(200):
        vectors, values = add_gram(vectors, 0.9 * values, torch.randn(2, 12, extra), keep=3)
        values = values[..., :3]
    assert_is_form(vectors, values, FLOAT32_TOLERANCE)


# --- powers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("rank", [0, 3, 7])
def test_inverse_power_is_the_dense_one(rank: int, exponent: float) -> None:
    vectors, values = form(7, rank)
    tail = torch.tensor([0.3, 1e-4], dtype=torch.float64)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    matrix = dense(vectors, values) + torch.diag_embed(tail.unsqueeze(-1).expand(2, 7))
    w, u = torch.linalg.eigh(matrix)
    expected = (u * w.pow(-exponent).unsqueeze(-2)) @ u.mT @ x
    assert_close(inverse_power(vectors, values, tail, x, exponent), expected, FLOAT64_TOLERANCE)


@per_scale
def test_inverse_power_in_float32_at_every_scale(scale: float) -> None:
    vectors, values = form(7, 3)
    tail, x = torch.tensor([0.3, 1e-2], dtype=torch.float64), torch.randn(2, 7, 5).double()
    expected = inverse_power(vectors, values, tail, x, 0.5)
    scaled = (vectors, scale**2 * values, scale**2 * tail, scale * x)
    found = inverse_power(*(part.float() for part in scaled), 0.5)
    assert_close(found, expected, 10 * FLOAT32_TOLERANCE)


def test_without_a_tail_there_is_no_power() -> None:
    """Also beside others in the stack, which keep theirs."""
    vectors, values = form(7, 3)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    tail = torch.tensor([0.0, 0.5], dtype=torch.float64)
    found = inverse_power(vectors, values, tail, x, 0.5)
    assert not found[0].any()
    alone = inverse_power(vectors[1:], values[1:], tail[1:], x[1:], 0.5)
    assert_close(found[1:], alone, FLOAT64_TOLERANCE)


def test_zero_columns_of_the_form_are_in_the_tail() -> None:
    vectors, values = form(7, 3)
    padded = torch.nn.functional.pad(vectors, (0, 2))
    values_and_zeros = torch.nn.functional.pad(values, (0, 2))
    tail, x = torch.full((2,), 0.1).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    found = inverse_power(padded, values_and_zeros, tail, x, 0.5)
    assert_close(found, inverse_power(vectors, values, tail, x, 0.5), FLOAT64_TOLERANCE)
