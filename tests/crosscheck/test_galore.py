"""AdaDiag against full-rank GaLore: both are AdamW in the gradient's singular vectors.

GaLore of ``pytorch_optimizer`` with the rank of the smaller side and ``scale=1`` differs from
AdaDiag in this, and each test says what it does about it:

- Side: it projects onto the right vectors of a square matrix, AdaDiag rotates the left side there.
  ``projection_type="left"`` takes that side; "std" takes the smaller one elsewhere, as AdaDiag.
- Timing: bases from the first gradient and at steps T, 2T, ...: ``first_svd="step1"``.
- eps is added to sqrt(V) before the bias correction, AdaDiag's after it. Both vanish with eps; with
  beta2 = 0 nothing is corrected and any eps is the same.
- Its SVD is in float32. Either the tolerance is that of float32, or the SVD is replaced.
- Signs: LAPACK's, while AdaDiag makes the largest entry of each left vector positive. They matter
  to a first moment that is carried over to new bases: not before the second SVD, not with
  beta1 = 0, and not where the SVD is replaced by one with AdaDiag's signs.
- Decay shrinks the weight after the step, W <- (1 - lr wd)(W - lr d), ours before it. With
  gradients that do not depend on the weight, W / (1 - lr wd) takes our steps.
- Two-sided ("full") bases are thin: they equal AdaDiag++'s for square matrices only.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.driving import (
    assert_apart,
    assert_near,
    descend,
    follow,
    matrix,
    noisy_problem,
    random_matrices,
    replay,
)

pytorch_optimizer = pytest.importorskip(
    "pytorch_optimizer", reason="compares with another library: pip install hf-precond[crosscheck]"
)

STEPS = 12
INTERVAL = 4
NEVER = 10**9
LR = 0.1
NO_EPS = 1e-16
FLOAT32_SVD_TOL = 3e-6
EXACT_TOL = 1e-11
CLOSED_LOOP_TOL = 1e-10  # gradients at weights that differ by rounding
SHAPES = [(5, 8), (8, 5), (5, 5)]

Shape = tuple[int, int]


def galore(start: Tensor, *, interval: int, kind: str = "std", **options: Any) -> Any:
    """Full-rank GaLore of one matrix."""
    projection = {
        "rank": min(start.shape),
        "update_proj_gap": interval,
        "scale": 1.0,
        "projection_type": "left" if kind == "std" and start.shape[0] == start.shape[1] else kind,
    }
    return pytorch_optimizer.GaLore([{"params": [matrix(start)], **projection}], lr=LR, **options)


def adadiag(start: Tensor, gradient: Any, *, interval: int, **options: Any) -> Tensor:
    settings = {"first_svd": "step1", "projection_interval": interval, **options}
    name = settings.pop("name", "adadiag")
    return descend(name, start, gradient, STEPS, lr=LR, **settings)


@pytest.fixture
def double_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """GaLore's SVD in the gradient's own precision and with AdaDiag's signs."""

    def bases(self: Any, x: Tensor, projection_type: str, from_random_matrix: bool = False) -> Any:
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        # The vectors of the smaller side decide; their partners turn along.
        deciding = left if x.shape[0] <= x.shape[1] else right.T
        peaks = deciding.abs().argmax(0, keepdim=True)
        signs = deciding.gather(0, peaks).sign()
        left, right = left * signs, right * signs.T
        return {"left": left, "right": right, "full": (left, right)}[projection_type]

    projector = pytorch_optimizer.optimizer.galore.GaLoreProjector
    monkeypatch.setattr(projector, "get_orthogonal_matrix", bases)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sided_is_galore_up_to_the_second_svd(shape: Shape) -> None:
    """The library as it is, its SVD in float32."""
    options = {"interval": NEVER, "betas": (0.9, 0.999), "eps": NO_EPS}
    start, grads = random_matrices(*shape), random_matrices(STEPS, *shape, seed=1)
    expected = follow(galore(start, **options), replay(grads), STEPS)
    assert_near(adadiag(start, replay(grads), **options), expected, FLOAT32_SVD_TOL)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sided_without_a_first_moment_is_galore(shape: Shape) -> None:
    """The library as it is over several SVDs: squares know no signs."""
    options = {"interval": INTERVAL, "betas": (0.0, 0.99), "eps": NO_EPS}
    start, grads = random_matrices(*shape), random_matrices(STEPS, *shape, seed=1)
    expected = follow(galore(start, **options), replay(grads), STEPS)
    assert_near(adadiag(start, replay(grads), **options), expected, FLOAT32_SVD_TOL)


@pytest.mark.usefixtures("double_svd")
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_sided_is_galore_adamw(shape: Shape, betas: tuple[float, float]) -> None:
    """Over several SVDs with both moments, to rounding."""
    options = {"interval": INTERVAL, "betas": betas, "eps": NO_EPS}
    start, problem = random_matrices(*shape), noisy_problem(*shape)
    expected = follow(galore(start, **options), problem, STEPS)
    assert_near(adadiag(start, problem, **options), expected, CLOSED_LOOP_TOL)


@pytest.mark.parametrize("shape", SHAPES)
def test_signs_are_all_that_differs_at_the_second_svd(shape: Shape) -> None:
    """Without the replaced SVD the carried first moment makes another trajectory of it."""
    options = {"interval": INTERVAL, "betas": (0.9, 0.999), "eps": NO_EPS}
    start, grads = random_matrices(*shape), random_matrices(STEPS, *shape, seed=1)
    expected = follow(galore(start, **options), replay(grads), STEPS)
    actual = adadiag(start, replay(grads), **options)
    assert_near(actual[: INTERVAL - 1], expected[: INTERVAL - 1], FLOAT32_SVD_TOL)
    assert_apart(actual[INTERVAL - 1 :], expected[INTERVAL - 1 :], 1e-2)


@pytest.mark.usefixtures("double_svd")
def test_difference_vanishes_with_eps() -> None:
    """In proportion: two conventions of eps, and nothing else."""
    start, grads = random_matrices(5, 8), random_matrices(STEPS, 5, 8, seed=1)

    def difference(eps: float) -> float:
        options = {"interval": INTERVAL, "betas": (0.9, 0.999), "eps": eps}
        expected = follow(galore(start, **options), replay(grads), STEPS)
        return (adadiag(start, replay(grads), **options) - expected).abs().max().item()

    shares = [difference(eps) / eps for eps in (1e-7, 1e-8, 1e-9, 1e-10)]
    assert max(shares) <= 1.1 * min(shares)


@pytest.mark.usefixtures("double_svd")
@pytest.mark.parametrize("shape", SHAPES)
def test_any_eps_is_the_same_without_a_bias_correction(shape: Shape) -> None:
    options = {"interval": INTERVAL, "betas": (0.9, 0.0), "eps": 0.1}
    start, grads = random_matrices(*shape), random_matrices(STEPS, *shape, seed=1)
    expected = follow(galore(start, **options), replay(grads), STEPS)
    assert_near(adadiag(start, replay(grads), **options), expected, EXACT_TOL)


@pytest.mark.usefixtures("double_svd")
@pytest.mark.parametrize("decay", [0.1, 2.0])
def test_decay_after_the_step_is_ours_before_the_next(decay: float) -> None:
    """V = W / (1 - lr wd) follows V <- (1 - lr wd) V - lr d."""
    options = {"interval": INTERVAL, "betas": (0.9, 0.99), "eps": NO_EPS, "weight_decay": decay}
    start, grads = random_matrices(5, 8), random_matrices(STEPS, 5, 8, seed=1)
    kept = 1 - LR * decay
    expected = follow(galore(start, **options), replay(grads), STEPS)
    actual = kept * adadiag(start / kept, replay(grads), **options)
    assert_near(actual, expected, EXACT_TOL)


@pytest.mark.usefixtures("double_svd")
def test_two_sided_square_is_galore_in_both_bases() -> None:
    """AdaDiag++ and ``projection_type="full"``; beta2 = 0 for one eps.

    The eps is not small: a gradient in its own bases is diagonal, and what is off it rounding.
    """
    options = {"interval": INTERVAL, "betas": (0.9, 0.0), "eps": 1e-3}
    start, grads = random_matrices(5, 5), random_matrices(STEPS, 5, 5, seed=1)
    expected = follow(galore(start, kind="full", **options), replay(grads), STEPS)
    actual = adadiag(start, replay(grads), name="adadiag_pp", **options)
    assert_near(actual, expected, EXACT_TOL)
