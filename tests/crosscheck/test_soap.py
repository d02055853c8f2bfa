"""SOAP against ``pytorch_optimizer``'s, which follows the authors' program.

Differences, and what each test does about them:

- Bases: after the moments of step t where (t - 1) mod f = 0. Ours are taken at the beginning of
  step t + 1, from the same factors: the same.
- The QR of the orthogonal iteration is in float32 there and unshifted; ours is shifted by 1e-8 of
  the trace. Up to the first QR the tolerance is that of float64, beyond it that of float32.
- A first factor without full rank has null directions. LAPACK chooses them there, ours are
  completed from the coordinates: other second moments, 4 to 9 % of the weight. So exact comparisons
  rotate sides of full rank only, or take our first bases over.
- eps is added to sqrt(V) before the bias correction, ours after it. Both vanish with eps; with
  beta2 = 0 nothing is corrected and any eps is the same.
- The first step, which moves nothing, does not shrink the weight there; ours does, as every step.
  Later ones shrink it after the step, ours before it. With gradients that do not depend on the
  weight both are a factor: W / (1 - lr wd) takes our steps, and starts one factor higher.
- Signs of eigenvectors differ and do not matter: the first moment goes over to new bases.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.soap import Soap
from tests.driving import (
    Driver,
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

STEPS = 14
NEVER = 10**9
LR = 0.1
NO_EPS = 1e-16
EXACT_TOL = 1e-11
CLOSED_LOOP_TOL = 1e-10  # gradients at weights that differ by rounding
FLOAT32_QR_TOL = 1e-6

# Only sides whose first factor has full rank are rotated.
FULL_RANK = [((5, 5), 1000), ((5, 8), 5), ((8, 5), 5), ((5, 8), 1)]
Shape = tuple[int, int]


def theirs(
    start: Tensor, *, interval: int, max_dim: int = 1000, decay: float = 0.0, **options: Any
) -> Any:
    """The library's optimizer of one matrix."""
    settings = {"precondition_frequency": interval, "max_precondition_dim": max_dim, **options}
    return pytorch_optimizer.SOAP([matrix(start)], lr=LR, weight_decay=decay, **settings)


def ours(
    start: Tensor,
    gradient: Any,
    *,
    interval: int,
    max_dim: int = 1000,
    decay: float = 0.0,
    **options: Any,
) -> Tensor:
    settings = {"basis_interval": interval, "max_dim": max_dim, "weight_decay": decay, **options}
    return descend("soap", start, gradient, STEPS, lr=LR, **settings)


def both(shape: Shape, gradient: Any | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Our weights and theirs, of one problem; random gradients unless it is given."""
    start = random_matrices(*shape)
    problem = replay(random_matrices(STEPS, *shape, seed=1)) if gradient is None else gradient
    return ours(start, problem, **options), follow(theirs(start, **options), problem, STEPS)


@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize(("shape", "max_dim"), FULL_RANK)
def test_same_steps_in_the_first_bases(
    shape: Shape, max_dim: int, betas: tuple[float, float]
) -> None:
    """Two sides, either one, and none of them rotated."""
    options = {"interval": NEVER, "max_dim": max_dim, "betas": betas, "eps": NO_EPS}
    assert_near(*both(shape, noisy_problem(*shape), **options), CLOSED_LOOP_TOL)


@pytest.mark.parametrize("interval", [1, 2, 4, 10])
@pytest.mark.parametrize(("shape", "max_dim"), FULL_RANK[:3])
def test_same_steps_through_orthogonal_iterations(
    shape: Shape, max_dim: int, interval: int
) -> None:
    options = {"interval": interval, "max_dim": max_dim, "betas": (0.9, 0.95), "eps": NO_EPS}
    actual, expected = both(shape, **options)
    # The bases of step 1 + f serve from step 2 + f on.
    assert_near(actual[: 1 + interval], expected[: 1 + interval], EXACT_TOL, "before the first")
    assert_near(actual, expected, FLOAT32_QR_TOL, "after it")


def test_new_bases_matter() -> None:
    """What agrees above is not merely a basis that hardly moves."""
    options = {"betas": (0.9, 0.95), "eps": NO_EPS}
    often, never = (both((5, 5), interval=interval, **options)[1] for interval in (2, NEVER))
    assert_apart(often, never, 1e-2)


@pytest.mark.parametrize("interval", [4, NEVER])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_same_steps_once_the_null_space_is_agreed_on(shape: Shape, interval: int) -> None:
    """Their first bases replaced by ours, the null directions of the larger side included."""
    options = {"interval": interval, "betas": (0.9, 0.95), "eps": NO_EPS}
    start, grads = random_matrices(*shape), random_matrices(STEPS, *shape, seed=1)
    driver = Driver(Soap())
    for g in grads[:2]:
        driver.step(g.unsqueeze(0))
    optimizer = theirs(start, **options)
    first = follow(optimizer, replay(grads), 1)
    (state,) = optimizer.state.values()
    state["Q"] = [driver.state[f"{side}_basis"][0].clone() for side in ("left", "right")]
    expected = torch.cat([first, follow(optimizer, replay(grads[1:]), STEPS - 1)])
    actual = ours(start, replay(grads), **options)
    assert_near(actual, expected, EXACT_TOL if interval == NEVER else FLOAT32_QR_TOL)


def test_null_space_is_what_differs_where_a_first_factor_has_one() -> None:
    """The library as it is, on a rectangle with both sides rotated: near, not the same."""
    actual, expected = both((5, 8), interval=NEVER, betas=(0.9, 0.95), eps=NO_EPS)
    assert_near(actual, expected, 0.15)
    assert_apart(actual, expected, 1e-3)


@pytest.mark.parametrize(("shape", "max_dim"), FULL_RANK)
def test_any_eps_is_the_same_without_a_bias_correction(shape: Shape, max_dim: int) -> None:
    options = {"interval": NEVER, "max_dim": max_dim, "betas": (0.9, 0.0), "shampoo_beta": 0.9}
    assert_near(*both(shape, eps=0.1, **options), EXACT_TOL)


def test_difference_vanishes_with_eps() -> None:
    """In proportion: two conventions of eps, and nothing else."""

    def difference(eps: float) -> float:
        actual, expected = both((5, 5), interval=NEVER, betas=(0.9, 0.999), eps=eps)
        return (actual - expected).abs().max().item()

    shares = [difference(eps) / eps for eps in (1e-7, 1e-8, 1e-9, 1e-10)]
    assert max(shares) <= 1.1 * min(shares)


@pytest.mark.parametrize("decay", [0.1, 2.0])
def test_decay_after_the_step_and_not_at_the_first_is_a_factor_each(decay: float) -> None:
    """V = W / (1 - lr wd) follows V <- (1 - lr wd) V - lr d, from W_0 / (1 - lr wd)^2 at step 0."""
    options = {"interval": NEVER, "betas": (0.9, 0.95), "eps": NO_EPS, "decay": decay}
    start, grads = random_matrices(5, 5), random_matrices(STEPS, 5, 5, seed=1)
    kept = 1 - LR * decay
    actual = kept * ours(start / kept**2, replay(grads), **options)
    assert_near(actual, follow(theirs(start, **options), replay(grads), STEPS), EXACT_TOL)
