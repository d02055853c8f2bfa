"""Newton-Schulz: the polynomial of the singular values, whatever the shape, scale or stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.newton_schulz import newton_schulz

MUON = (3.4445, -4.7750, 2.0315)
CUBIC = (1.5, -0.5, 0.0)  # converges to one, slowly
SCALES = (1e-12, 1e-6, 1.0, 1e4, 1e8)
SHAPES = [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1), (1, 1)]
FLOAT64_TOLERANCE = 1e-11
FLOAT32_TOLERANCE = 1e-4

per_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def orthogonalised(x: Tensor, **options: Any) -> Tensor:
    """As Muon calls it, in the precision of the matrices."""
    defaults = {"steps": 5, "coefficients": MUON, "eps": 1e-20, "dtype": x.dtype}
    return newton_schulz(x, **{**defaults, **options})


def by_singular_values(
    x: Tensor, *, steps: int = 5, coefficients: tuple[float, ...] = MUON
) -> Tensor:
    """U p(...p(S / |S|)) V^T in float64, p(s) = a s + b s^3 + c s^5."""
    a, b, c = coefficients
    left, s, right = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (left * s.unsqueeze(-2)) @ right


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The difference is a small share of the norm, matrix by matrix."""
    difference = torch.linalg.matrix_norm(actual.double() - expected.double())
    assert (difference <= tolerance * torch.linalg.matrix_norm(expected.double())).all()


@per_shape
@pytest.mark.parametrize("steps", [0, 1, 5, 9])
@pytest.mark.parametrize("coefficients", [MUON, CUBIC], ids=["muon", "cubic"])
def test_it_is_a_polynomial_of_the_singular_values(
    shape: tuple[int, int], steps: int, coefficients: tuple[float, ...]
) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64)
    expected = by_singular_values(x, steps=steps, coefficients=coefficients)
    found = orthogonalised(x, steps=steps, coefficients=coefficients)
    assert_close(found, expected, FLOAT64_TOLERANCE)


@per_shape
@pytest.mark.parametrize("scale", SCALES)
def test_float32_at_every_scale(shape: tuple[int, int], scale: float) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64)
    found = orthogonalised((scale * x).float())
    assert found.dtype == torch.float32
    assert_close(found, by_singular_values(x), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("condition", [1e0, 1e1, 1e2])
def test_singular_values_come_near_one(condition: float) -> None:
    """Muon's coefficients leave them between 0.68 and 1.14 where none is below a hundredth."""
    q, _ = torch.linalg.qr(torch.randn(2, 8, 8, dtype=torch.float64))
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), 8, dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonalised((q[0] * values) @ q[1].mT))
    assert 0.68 < found.min() <= found.max() < 1.14


def test_the_cubic_converges_to_the_polar_factor() -> None:
    x = torch.randn(4, 7, dtype=torch.float64)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    assert_close(orthogonalised(x, steps=40, coefficients=CUBIC), left @ right, FLOAT64_TOLERANCE)


@per_shape
def test_transposed_in_transposed_out(shape: tuple[int, int]) -> None:
    x = torch.randn(2, *shape, dtype=torch.float64)
    assert_close(orthogonalised(x.mT).mT, orthogonalised(x), FLOAT64_TOLERANCE)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_stacks_equal_single_matrices(batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, 4, 6, dtype=torch.float64)
    stacked = orthogonalised(x)
    assert stacked.shape == x.shape
    for one, part in zip(x.view(-1, 4, 6), stacked.view(-1, 4, 6), strict=True):
        assert_close(part, orthogonalised(one), FLOAT64_TOLERANCE)


def test_scales_in_a_stack_do_not_mix() -> None:
    x = torch.randn(3, 4, 6)
    scales = torch.tensor([1e-12, 1.0, 1e8])[:, None, None]
    assert_close(orthogonalised(scales * x), orthogonalised(x), FLOAT32_TOLERANCE)


def test_zero_stays_zero() -> None:
    x = torch.randn(3, 4, 6)
    x[1] = 0.0
    found = orthogonalised(x)
    assert not found[1].any()
    assert_close(found[[0, 2]], orthogonalised(x[[0, 2]]), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("steps", [1, 5])
def test_rank_deficient_with_dead_rows(steps: int) -> None:
    """A null space stays one."""
    x = torch.randn(2, 6, 2, dtype=torch.float64) @ torch.randn(2, 2, 9, dtype=torch.float64)
    x[:, :2] = 0.0
    found = orthogonalised(x, steps=steps)
    assert_close(found, by_singular_values(x, steps=steps), FLOAT64_TOLERANCE)
    assert not found[:, :2].any()


def test_norms_below_eps_are_taken_as_eps() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    tiny = 1e-9 * x / x.norm()
    found = orthogonalised(tiny, eps=1e-7, steps=1)
    assert_close(found, MUON[0] * tiny / 1e-7, 1e-3)


def test_products_in_bfloat16_give_back_the_own_precision() -> None:
    x = torch.randn(2, 8, 12)
    found = orthogonalised(x, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    assert_close(found, orthogonalised(x), 0.1)


def test_the_matrices_given_stay_as_they_are() -> None:
    x = torch.randn(2, 8, 5)
    before = x.clone()
    orthogonalised(x)
    assert torch.equal(x, before)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@per_shape
def test_equals_torch(shape: tuple[int, int]) -> None:
    """A step of torch.optim.Muon without momentum: its own iteration, always in bfloat16."""
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = x.float()
    muon = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    muon.step()
    step = -weight.detach() / max(1.0, shape[0] / shape[1]) ** 0.5
    assert_close(orthogonalised(x), step, 0.1)
    assert_close(orthogonalised(x, dtype=torch.bfloat16), step, 0.15)
