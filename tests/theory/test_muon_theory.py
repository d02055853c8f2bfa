"""The laws of Muon, checked in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.muon import Muon
from tests.driving import (
    assert_apart,
    assert_near,
    descend,
    directions,
    random_matrices,
    random_rotation,
    replay,
)

STEPS = 8
BETA1 = 0.9
EXACT_TOL = 1e-10
# Jordan's quintic is steep at zero and does not converge: five steps bring a singular value from
# this share of the Frobenius norm on into this interval, and no nearer to one.
SMALLEST_SHARE = 0.005
NEAR_ONE = (0.68, 1.16)
CUBIC: dict[str, Any] = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 60}

SHAPES = [(5, 8), (8, 5), (6, 6), (1, 7), (32, 96)]
Shape = tuple[int, int]


def orthogonalized(x: Tensor, **options: Any) -> Tensor:
    """The direction of one matrix."""
    return directions(Muon(**{"adjust_lr_fn": "none", **options}), x.view(1, 1, *x.shape))[0, 0]


def polar(x: Tensor) -> Tensor:
    """U V^T of X = U S V^T."""
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    return left @ right


def with_spectrum(shape: Shape, values: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(random_matrices(*shape), full_matrices=False)
    return (left * values) @ right


def assert_all_near_one(x: Tensor) -> None:
    values = torch.linalg.svdvals(x)
    assert NEAR_ONE[0] <= values.min(), values
    assert values.max() <= NEAR_ONE[1], values


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_near_one(shape: Shape) -> None:
    x = random_matrices(*shape)
    assert torch.linalg.svdvals(x / x.norm())[-1] >= SMALLEST_SHARE
    assert_all_near_one(orthogonalized(x))


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_five_steps_reach_from_a_small_share_of_the_norm_to_near_one(shape: Shape) -> None:
    """A spectrum that falls geometrically, its last value the smallest share."""
    values = torch.logspace(0.0, -2.0, 23, dtype=torch.float64)
    smallest = torch.tensor([SMALLEST_SHARE], dtype=torch.float64)
    values = torch.cat([values * ((1 - SMALLEST_SHARE**2) ** 0.5 / values.norm()), smallest])
    assert_all_near_one(orthogonalized(with_spectrum(shape, values)))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay(shape: Shape) -> None:
    """U^T NS(X) V is diagonal: only singular values move."""
    x = random_matrices(*shape)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    turned = left.T @ orthogonalized(x) @ right.T
    assert_near(turned, torch.diag(turned.diagonal()), EXACT_TOL)
    assert (turned.diagonal() > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_converging_iteration_ends_at_the_orthogonal_factor(shape: Shape) -> None:
    """The cubic Newton-Schulz iteration, until it stands still."""
    x = random_matrices(*shape)
    assert_near(orthogonalized(x, **CUBIC), polar(x), EXACT_TOL)


@pytest.mark.parametrize("shape", SHAPES)
def test_equivariant_under_rotations_and_blind_to_the_scale(shape: Shape) -> None:
    x = random_matrices(*shape)
    left, right = random_rotation(shape[0], seed=1), random_rotation(shape[1], seed=2)
    assert_near(orthogonalized(left @ x @ right), left @ orthogonalized(x) @ right, EXACT_TOL)
    for scale in (1e-12, 1e8):
        assert_near(orthogonalized(scale * x), orthogonalized(x), EXACT_TOL)
    assert_near(orthogonalized(x.T).T, orthogonalized(x), EXACT_TOL)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_of_the_learning_rate(shape: Shape) -> None:
    """An RMS of 0.2 as AdamW's, or a spectral norm of sqrt(max(1, rows / columns))."""
    x = random_matrices(*shape)
    like_adamw = orthogonalized(x, adjust_lr_fn="match_rms_adamw", **CUBIC)
    assert abs(like_adamw.square().mean().sqrt().item() - 0.2) <= EXACT_TOL
    original = orthogonalized(x, adjust_lr_fn="original", **CUBIC)
    wanted = max(1.0, shape[0] / shape[1]) ** 0.5
    assert abs(torch.linalg.matrix_norm(original, ord=2).item() - wanted) <= EXACT_TOL


def trajectory(grads: Tensor, momentum: str, nesterov: bool, **options: Any) -> Tensor:
    """Weights from zero, the momentum on the gradient as Muon has it."""
    start = torch.zeros_like(grads[0])
    settings = {"momentum_site": "gradient", "betas": (BETA1, 0.99), "lr": 1.0, **options}
    return descend(
        "muon", start, replay(grads), STEPS, momentum=momentum, nesterov=nesterov, **settings
    )


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_average_and_heavy_ball_give_one_direction(shape: Shape, nesterov: bool) -> None:
    """mu_ema = (1 - beta1) mu_heavy_ball, with look-ahead or without: one matrix up to scale."""
    grads = random_matrices(STEPS, *shape, seed=1)
    ema, heavy_ball = (trajectory(grads, kind, nesterov) for kind in ("ema", "heavy_ball"))
    assert_near(ema, heavy_ball, EXACT_TOL)


def test_looking_ahead_matters() -> None:
    grads = random_matrices(STEPS, 5, 8, seed=1)
    ahead, behind = (trajectory(grads, "ema", nesterov) for nesterov in (True, False))
    # Nothing to look ahead to at the first step: g and (1 + beta1) g are one direction.
    assert_near(ahead[0], behind[0], EXACT_TOL)
    assert_apart(ahead[1:], behind[1:], 1e-3)


@pytest.mark.parametrize("nesterov", [True, False])
def test_direction_is_that_of_the_momentum(nesterov: bool) -> None:
    """mu <- beta1 mu + g; with look-ahead mu as it will be when g comes once more."""
    grads = random_matrices(STEPS, 5, 8, seed=1)
    weights = trajectory(grads, "heavy_ball", nesterov, adjust_lr_fn="none")
    moment, expected = torch.zeros_like(grads[0]), torch.zeros_like(grads[0])
    for t, g in enumerate(grads):
        moment = BETA1 * moment + g
        expected = expected - orthogonalized(BETA1 * moment + g if nesterov else moment)
        assert_near(weights[t], expected, EXACT_TOL, f"step {t + 1}")
