"""K-FAC and its randomized forms: what the factors promise, checked in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_precond import create_optimizer
from hf_precond.linalg.randomized import leading_eigenpairs
from hf_precond.preconditioners.brand_kfac import BrandCKFac, BrandKFac, BrandRKFac
from hf_precond.preconditioners.kfac import KFac
from hf_precond.preconditioners.randomized_kfac import RandomizedKFac
from hf_precond.preconditioners.schedule import Schedule
from tests.driving import BARE, assert_apart, assert_near, random_matrices, random_rotation
from tests.theory.columns import LayerDriver, Seen, directions, gradient, seen, transformed

EXACT_TOL = 1e-10
NO_DAMPING = Schedule.parse(1e-12)
EVERY_STEP: dict[str, Any] = {"update_interval": 1, "inverse_interval": 1}
BRAND: dict[str, Any] = {"update_interval": 1, "brand_interval": 1, "factor_form": "brand"}
OUTPUTS, INPUTS = 6, 9
STEPS = 8


def batches(samples: int = 4, steps: int = STEPS, **options: Any) -> list[Seen]:
    return [seen(samples, INPUTS, OUTPUTS, seed=seed, **options) for seed in range(steps)]


def kfac(**options: Any) -> KFac:
    return KFac(**{**EVERY_STEP, **options})


# --- members of the family that are K-FAC at full rank --------------------------------------------


@pytest.mark.parametrize("samples", [2, 4, 20])
@pytest.mark.parametrize("continuation", [True, False])
@pytest.mark.parametrize("decomposition", ["rsvd", "srevd"])
def test_full_rank_randomized_kfac_is_kfac(
    decomposition: str, continuation: bool, samples: int
) -> None:
    algorithm = RandomizedKFac(
        **EVERY_STEP,
        rank=Schedule.parse(16),
        decomposition=decomposition,
        continuation=continuation,
    )
    expected = directions(kfac(continuation=continuation), batches(samples))
    assert_near(directions(algorithm, batches(samples)), expected, EXACT_TOL)


@pytest.mark.parametrize("oversampling", [0, 3, 8])
@pytest.mark.parametrize("decomposition", ["rsvd", "srevd"])
def test_rank_of_the_factor_is_enough(decomposition: str, oversampling: int) -> None:
    """One batch of three columns: a random projection finds all there is, in its own subspace."""
    algorithm = RandomizedKFac(
        **EVERY_STEP,
        rank=Schedule.parse(4),
        oversampling=Schedule.parse(oversampling),
        decomposition=decomposition,
    )
    stream = batches(3, steps=1)
    assert_near(directions(algorithm, stream), directions(kfac(), stream), EXACT_TOL)


@pytest.mark.parametrize("samples", [1, 4, 20])
@pytest.mark.parametrize("cls", [BrandKFac, BrandRKFac, BrandCKFac])
def test_full_rank_brand_kfac_is_kfac(cls: type[BrandKFac], samples: int) -> None:
    """No column is ever cut off, so every form is the whole factor."""
    algorithm = cls(**BRAND, rank=Schedule.parse(16), max_columns=32, continuation=False)
    expected = directions(kfac(continuation=False), batches(samples))
    assert_near(directions(algorithm, batches(samples)), expected, EXACT_TOL)


@pytest.mark.parametrize("cls", [BrandKFac, BrandRKFac, BrandCKFac])
def test_full_rank_brand_kfac_with_continuation_is_kfac_once_the_form_is_full(
    cls: type[BrandKFac],
) -> None:
    """Four columns a step: after three steps both forms hold all of their 9 and 6 directions.

    A form with room left continues its smallest eigenvalue into it, where the factor has none. The
    gradient of its own columns does not see that, others do.
    """
    algorithm = cls(**BRAND, rank=Schedule.parse(16), max_columns=32)
    x = random_matrices(OUTPUTS, INPUTS)
    assert_near(directions(algorithm, batches()), directions(kfac(), batches()), EXACT_TOL)
    found, expected = directions(algorithm, batches(), x), directions(kfac(), batches(), x)
    assert_near(found[2:], expected[2:], EXACT_TOL)
    assert_apart(found[:2], expected[:2], 1e-2)


def test_intervals_leave_the_step_of_the_last_refresh() -> None:
    """With columns at steps 1 and 4 alone, and a decomposition at steps 1 and 5."""
    stream, x = batches(), random_matrices(OUTPUTS, INPUTS)
    found = directions(kfac(update_interval=3, inverse_interval=4), stream, x)
    some = [stream[0], stream[3]]
    expected = directions(kfac(), some, x)
    for step in range(4):
        assert_near(found[step], expected[0], EXACT_TOL, f"step {step + 1}")
    for step in range(4, 8):
        assert_near(found[step], expected[1], EXACT_TOL, f"step {step + 1}")


# --- scales ---------------------------------------------------------------------------------------

_MEMBERS = [
    kfac(),
    RandomizedKFac(**EVERY_STEP, rank=Schedule.parse(3), oversampling=Schedule.parse(1)),
    BrandKFac(**BRAND, rank=Schedule.parse(3), max_columns=8),
]
per_member = pytest.mark.parametrize("algorithm", _MEMBERS, ids=lambda x: type(x).__name__)


@per_member
def test_a_batch_repeated_is_the_same_step(algorithm: Any) -> None:
    """Nothing depends on T. (Brand's form has more columns then, but none of its own.)"""
    if isinstance(algorithm, BrandKFac):
        algorithm = BrandKFac(**BRAND, rank=Schedule.parse(3), max_columns=8, continuation=False)
    stream = batches(decay=0.7)
    twice = transformed(stream, lambda batch: tuple(torch.cat([x, x]) for x in batch))
    assert_near(directions(algorithm, twice), directions(algorithm, stream), 1e-9)


@per_member
@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e3])
def test_scaling_the_loss_scales_the_step_inversely(algorithm: Any, scale: float) -> None:
    """Gbar goes with the square, the gradient with the loss itself: a natural gradient."""
    stream = batches(decay=0.7)
    louder = transformed(stream, lambda batch: (batch[0], scale * batch[1]))
    assert_near(scale * directions(algorithm, louder), directions(algorithm, stream), 1e-9)


@per_member
def test_scaling_inputs_by_c_scales_the_step_inversely(algorithm: Any) -> None:
    """So W x moves as before when x comes in other units."""
    stream = batches(decay=0.7)
    larger = transformed(stream, lambda batch: (10.0 * batch[0], batch[1]))
    assert_near(10.0 * directions(algorithm, larger), directions(algorithm, stream), 1e-9)


@per_member
def test_rotations_of_inputs_and_outputs_turn_the_step(algorithm: Any) -> None:
    """Damped or not. RS-KFAC up to what its sketch leaves over: at four power iterations little."""
    left, right = random_rotation(OUTPUTS, seed=1), random_rotation(INPUTS, seed=2)
    stream = batches(decay=0.5)
    turned = transformed(stream, lambda batch: (batch[0] @ right.T, batch[1] @ left.T))
    found = left.T @ directions(algorithm, turned) @ right
    tolerance = 1e-4 if type(algorithm) is RandomizedKFac else 1e-9
    assert_near(found, directions(algorithm, stream), tolerance)


@per_member
def test_eigenvalues_of_the_step_lie_between_the_bounds_of_the_damping(algorithm: Any) -> None:
    """1 / (1 + damping)^2 <= step / identity, in units of the two largest eigenvalues, and
    at most 1 / damping^2."""
    driver = LayerDriver(algorithm, (OUTPUTS, INPUTS))
    for batch in batches(decay=0.7):
        x = gradient(batch)
        step = driver.step(batch)
        peak = (driver.state["input_values"][0, 0] * driver.state["output_values"][0, 0]).item()
        ratio = (step * x).sum() / x.square().sum() * peak
        # Continuation adds at most the largest eigenvalue once more.
        assert 1 / 2.1**2 <= ratio <= 1 / 0.1**2


# --- the natural gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_affine_maps_of_inputs_and_outputs_leave_the_function_alone(bias: bool) -> None:
    """x -> P x + p and y -> Q y, as the damping goes to zero: W P~^(-1) stays what it was."""
    mix_inputs = random_matrices(INPUTS, INPUTS, seed=3) + 3 * torch.eye(INPUTS).double()
    if bias:  # the last input is the bias' own, always one
        mix_inputs[-1] = 0.0
        mix_inputs[-1, -1] = 1.0
    mix_outputs = random_matrices(OUTPUTS, OUTPUTS, seed=4) + 3 * torch.eye(OUTPUTS).double()

    def with_ones(batch: Seen) -> Seen:
        if bias:
            batch[0][..., -1] = 1.0
        return batch

    def change(batch: Seen) -> Seen:
        # y' = Q y has the gradient Q^(-T) g.
        return batch[0] @ mix_inputs.T, batch[1] @ torch.linalg.inv(mix_outputs)

    stream = transformed(batches(samples=30), with_ones)
    algorithm = kfac(damping=NO_DAMPING)
    found = directions(algorithm, transformed(stream, change))
    # W' = Q W P^(-1), and so do the steps.
    expected = mix_outputs @ directions(algorithm, stream) @ torch.linalg.inv(mix_inputs)
    assert_near(found, expected, 1e-8)
    damped = directions(kfac(), transformed(stream, change))
    undamped = mix_outputs @ directions(kfac(), stream) @ torch.linalg.inv(mix_inputs)
    assert_apart(damped, undamped, 1e-2)


def _least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The best W [M, B (+ 1)] of y = W (x, 1)."""
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return torch.linalg.lstsq(ones, y).solution.T


def _one_step(model: nn.Linear, x: Tensor, y: Tensor, lr: float) -> None:
    """On the mean over samples of half the squared error."""
    options = {**BARE, **EVERY_STEP, "state_dtype": "float64", "damping": NO_DAMPING}
    optimizer = create_optimizer(model, "kfac", lr=lr, **options)
    loss = 0.5 * (model(x) - y).square().sum(1).mean()
    loss.backward()
    optimizer.step()


def test_one_output_of_a_linear_regression_takes_one_newton_step() -> None:
    """Gbar is the mean of the squared residuals there; with that as the learning rate the step is
    Newton's, onto the least squares solution, weight and bias."""
    x, y = random_matrices(40, 5, seed=1), random_matrices(40, 1, seed=2)
    model = nn.Linear(5, 1).double()
    lr = (model(x) - y).square().mean().item()
    _one_step(model, x, y, lr)
    found = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], dim=1)
    assert_near(found, _least_squares(x, y), 1e-9)


@pytest.mark.parametrize("white", [True, False])
def test_residuals_that_are_white_make_it_newtons_step(white: bool) -> None:
    """The Gauss-Newton matrix of a regression is I (x) A; the empirical Fisher has the residuals'
    second moment in the place of I. Targets that make it I make the natural gradient Newton's."""
    x, model = random_matrices(40, 5, seed=1), nn.Linear(5, 3).double()
    residuals = random_matrices(40, 3, seed=2)
    if white:
        residuals = torch.linalg.qr(residuals).Q * 40**0.5
    y = (model(x) - residuals).detach()
    start = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], dim=1)
    _one_step(model, x, y, 1.0)
    found = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], dim=1)
    newton = _least_squares(x, y) - start
    second_moment = residuals.T @ residuals / 40
    assert_near(second_moment @ (found - start), newton, 1e-9)
    if white:
        assert_near(found, _least_squares(x, y), 1e-9)
    else:
        assert_apart(found, _least_squares(x, y), 1e-2)


# --- factors --------------------------------------------------------------------------------------


def test_factors_are_the_weighted_sum_of_all_batches() -> None:
    """M_k = sum_i kappa(i) rho^(k-i) M_i M_i^T, kappa(0) = 1 and 1 - rho after it."""
    rho, stream = 0.8, batches()
    driver = LayerDriver(kfac(factor_decay=rho), (OUTPUTS, INPUTS))
    for batch in stream:
        driver.step(batch)
    for side, index in (("input", 0), ("output", 1)):
        grams = [batch[index].flatten(0, 1) for batch in stream]
        weights = [rho ** (STEPS - 1 - i) * (1.0 if i == 0 else 1 - rho) for i in range(STEPS)]
        expected = sum(w * x.T @ x / len(x) for w, x in zip(weights, grams, strict=True))
        assert_near(driver.state[f"{side}_factor"][0], expected, EXACT_TOL, side)


def test_a_factor_of_which_nothing_was_seen_is_the_identity() -> None:
    x = random_matrices(OUTPUTS, INPUTS)
    zero = tuple(torch.zeros_like(part) for part in batches()[0])
    for algorithm in _MEMBERS:
        driver = LayerDriver(algorithm, (OUTPUTS, INPUTS))
        assert torch.equal(driver.step(zero, x), x)
        assert torch.equal(driver.step(None, x), x)


# --- random projections ---------------------------------------------------------------------------


def _falling(size: int, power: float, seed: int) -> Tensor:
    """A positive definite matrix with eigenvalues i^(-power)."""
    basis = random_rotation(size, seed=seed)
    return (basis * torch.arange(1, size + 1, dtype=torch.float64) ** -power) @ basis.T


def _error(matrix: Tensor, method: str, power_iterations: int, seed: int) -> float:
    vectors, values = leading_eigenpairs(
        matrix.unsqueeze(0),
        5,
        oversampling=2,
        power_iterations=power_iterations,
        seed=seed,
        method=method,
    )
    found = (vectors[0] * values[0]) @ vectors[0].T
    return torch.linalg.matrix_norm(matrix - found).item()


@pytest.mark.parametrize("method", ["rsvd", "srevd"])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_error_of_the_projection_falls_with_power_iterations(power: float, method: str) -> None:
    """Towards that of the best approximation of the rank, on the mean over sketches."""
    matrix = _falling(40, power, seed=5)
    best = torch.linalg.vector_norm(torch.linalg.eigvalsh(matrix).flip(0)[5:]).item()
    errors = [
        sum(_error(matrix, method, count, seed) for seed in range(20)) / 20
        for count in (0, 1, 2, 4, 8, 40)
    ]
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert all(error > (1 - EXACT_TOL) * best for error in errors)
    assert errors[-1] < (1.05 if power < 1 else 1 + 1e-4) * best


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_singular_vectors_are_nearer_than_projected_eigenvectors(power: float) -> None:
    """RS-KFAC's form against SRE-KFAC's from the same sketch."""
    matrix = _falling(40, power, seed=5)
    for seed in range(10):
        assert _error(matrix, "rsvd", 1, seed) < _error(matrix, "srevd", 1, seed)
