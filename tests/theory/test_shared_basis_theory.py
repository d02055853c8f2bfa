"""The theorems of the shared-basis paper, checked in float64 on the algorithm that trains models.

Lemmas, theorems, numbered equations and section 6.8 are those of the paper and its appendix.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.streams import STREAMS, gaussian, low_rank, slowly_turning
from tests.theory.tracking import Tracker, outer, spectral_norm, track

SHAPE = (2, 5, 8)
STEPS = 15

LOEWNER_TOL = 1e-10  # smallest allowed eigenvalue, relative to the largest matrix in sight
EXACT_TOL = 1e-8  # two float64 routes to the same matrix
SUBSPACE_TOL = 1e-6  # angle left by one shifted power iteration
NORM_TOL = 1e-10  # a bound against the norm it bounds, relative to M
FLOAT32_NORM_TOL = 1e-3  # the same, relative, in float32
TYPICAL_BLOCK_BOUND = 1.5

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "no_deflation": {"deflate": False},
    "ema": {"beta2": 0.9},
    "ema_no_deflation": {"beta2": 0.9, "deflate": False},
    "three_iterations": {"num_iters": 3},
    "oversampled": {"oversample": 2},
    "cold_start": {"warm_start": False},
    "exact_norm": {"escaped_norm": "exact"},
    "coefficients_between": {"update_interval": 5, "coef_interval": 1, "beta2": 0.95},
    "some_gradients_left_out": {"update_interval": 6, "coef_interval": 2},
    "packed": {"packed": True},
}


def assert_loewner_nonnegative(dense: Tensor, scale: Tensor, what: str) -> None:
    smallest = torch.linalg.eigvalsh(dense).amin()
    assert smallest >= -LOEWNER_TOL * scale, (
        f"{what}: eigenvalue {smallest:.3e} at scale {scale:.3e}"
    )


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_lemma_2_every_block_every_step(variant: str, stream: str) -> None:
    """H <= Q R Q^T + rho I <= H + 2 rho I, H taken over the gradients that were taken in."""
    options = {"rank": 3, "num_iters": 1, **VARIANTS[variant]}
    run = track(STREAMS[stream](STEPS, SHAPE), **options)
    interval = options.get("coef_interval") or options.get("update_interval", 1)
    for t, second_moment in enumerate(run.second_moments(interval), start=1):
        snapshot = run.snapshots[t]
        gap = snapshot.approximation - second_moment
        twice_escaped = 2 * snapshot.escaped_mass[..., None, None] * torch.eye(SHAPE[2])
        scale = spectral_norm(snapshot.approximation).amax()
        assert_loewner_nonnegative(gap, scale, f"step {t}, H <= approximation")
        assert_loewner_nonnegative(
            twice_escaped - gap, scale, f"step {t}, approximation <= H + 2 rho I"
        )


@pytest.mark.parametrize("stream", ["low_rank", "gaussian", "heavy_tailed"])
def test_inequality_18_with_the_exact_basis(stream: str) -> None:
    """sum rho^{1/2} <= sum Tr(H_i)^{1/2} + (3 m^3)^{1/4} (sum Tr H_i)^{1/2}."""
    blocks = SHAPE[1]
    grads = STREAMS[stream](STEPS, SHAPE)
    run = exact_basis(grads, rank=2)
    traces = grads.square().sum(dim=(0, -1))
    left = run.snapshots[-1].escaped_mass.sqrt().sum(-1)
    right = traces.sqrt().sum(-1) + (3 * blocks**3) ** 0.25 * traces.sum(-1).sqrt()
    assert (left <= right).all()
    assert (left > 0).all()


@pytest.mark.parametrize("stream", ["low_rank", "gaussian", "heavy_tailed"])
def test_theorem_3_bounds_the_escaped_mass_by_the_lower_eigenvalues(stream: str) -> None:
    """rho_i <= sum_{j > p} sigma_j(H_i) / (k Q_i - p) for every p < k Q_i, Q_i of equation 20."""
    rank = 4
    grads = STREAMS[stream](STEPS, SHAPE)
    run = exact_basis(grads, rank=rank)
    deflated, unshared = torch.zeros(SHAPE[:2]), torch.zeros(SHAPE[:2])
    for t, snapshot in enumerate(run.snapshots[1:], start=1):
        moment = run.moment(t)
        projected = snapshot.project(moment)
        basis = snapshot.basis.unsqueeze(1)
        deflated = deflated + spectral_norm(projected - snapshot.coef)
        unshared = unshared + spectral_norm(moment - basis @ projected @ basis.mT)
    quality = deflated / (deflated + unshared)
    lower_eigenvalues = torch.linalg.eigvalsh(outer(grads).sum(0)).flip(-1)
    mass, checked = run.snapshots[-1].escaped_mass, 0
    for p in range(rank):
        applies = p < rank * quality
        bound = lower_eigenvalues[..., p:].sum(-1) / (rank * quality - p)
        assert (mass[applies] <= bound[applies] * (1 + EXACT_TOL)).all(), f"p = {p}"
        checked += int(applies.sum())
    assert checked >= quality.numel()


def test_theorem_1_bounds_the_regret_of_an_online_convex_problem() -> None:
    """Regret <= sqrt(2) D sum_i [Tr(H_i^{1/2}) + b (2 rho_i)^{1/2}] with lr = D / sqrt(2)."""
    blocks, size, steps, diameter = 3, 6, 200, 4.0
    inputs = low_rank(steps, (1, 1, size), noise=0.2, seed=2)[:, 0, 0]
    truth = gaussian(1, (1, blocks, size))[0, 0] / size
    targets = inputs @ truth.T + 0.1 * gaussian(steps, (1, 1, blocks), seed=3)[:, 0, 0]
    best = torch.linalg.lstsq(inputs, targets).solution.T

    def loss(theta: Tensor, t: int) -> Tensor:
        return 0.5 * (theta @ inputs[t] - targets[t]).square().sum()

    theta, regret, distance = torch.zeros_like(best), torch.zeros(()), torch.zeros(())
    tracker = Tracker(rank=2)
    for t in range(steps):
        distance = torch.maximum(distance, (theta - best).norm(dim=1).amax())
        regret = regret + loss(theta, t) - loss(best, t)
        gradient = torch.outer(theta @ inputs[t] - targets[t], inputs[t])
        theta = theta - diameter / 2**0.5 * tracker.step(gradient.unsqueeze(0))[0]
    assert distance <= diameter, "the theorem's premise"
    *_, second_moment = tracker.second_moments()
    roots = torch.linalg.eigvalsh(second_moment).clamp(min=0).sqrt().sum()
    escaped = size * (2 * tracker.snapshots[-1].escaped_mass).sqrt().sum()
    bound = 2**0.5 * diameter * (roots + escaped)
    assert 0 < regret <= bound


@pytest.mark.parametrize("deflate", [True, False])
@pytest.mark.parametrize("beta2", [None, 0.9])
def test_full_rank_is_block_diagonal_full_matrix_adagrad(
    beta2: float | None, deflate: bool
) -> None:
    """k = b: the approximation is H itself, and d_i = (H_i + eps I)^{-1/2} g_i."""
    eps = 1e-2
    grads = gaussian(STEPS, SHAPE)
    run = Tracker(rank=SHAPE[2], beta2=beta2, deflate=deflate, eps=eps)
    directions = [run.step(g) for g in grads]
    for t, second_moment in enumerate(run.second_moments(), start=1):
        torch.testing.assert_close(
            run.snapshots[t].approximation, second_moment, rtol=EXACT_TOL, atol=EXACT_TOL
        )
        eigenvalues, vectors = torch.linalg.eigh(second_moment)
        root = (vectors * (eigenvalues.clamp(min=0) + eps).rsqrt().unsqueeze(-2)) @ vectors.mT
        expected = (root @ grads[t - 1].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(directions[t - 1], expected, rtol=EXACT_TOL, atol=EXACT_TOL)


def test_one_block_with_the_exact_basis_is_frequent_directions() -> None:
    """m = 1: sketch and escaped mass are those of frequent directions with k rows."""
    rank, size = 3, 8
    grads = gaussian(STEPS, (1, 1, size))
    run = exact_basis(grads, rank=rank)
    sketch, shed = torch.zeros(rank, size, dtype=torch.float64), torch.zeros(())
    for t, g in enumerate(grads[:, 0, 0], start=1):
        sketch[-1] = g
        _, values, vectors = torch.linalg.svd(sketch, full_matrices=False)
        shed = shed + values[-1] ** 2
        sketch = (values**2 - values[-1] ** 2).clamp(min=0).sqrt().unsqueeze(-1) * vectors
        snapshot = run.snapshots[t]
        torch.testing.assert_close(
            snapshot.low_rank[0, 0], sketch.T @ sketch, rtol=EXACT_TOL, atol=EXACT_TOL
        )
        torch.testing.assert_close(
            snapshot.escaped_mass[0, 0], shed.double(), rtol=EXACT_TOL, atol=EXACT_TOL
        )


@pytest.mark.parametrize("zero_first", [False, True])
@pytest.mark.parametrize("deflate", [True, False])
def test_nothing_escapes_from_a_fixed_subspace(deflate: bool, zero_first: bool) -> None:
    grads = low_rank(STEPS, SHAPE, rank=2, noise=0.0)
    if zero_first:
        grads[0] = 0.0
    run = track(grads, rank=4, deflate=deflate)
    traces = grads.square().sum(dim=(0, -1))
    assert (run.snapshots[-1].escaped_mass <= SUBSPACE_TOL * traces).all()
    assert (traces > 0).all()


def test_lemma_1_diagonal_blocks_outweigh_off_diagonal_ones() -> None:
    """||H_ii||^2 + ||H_jj||^2 >= ||H_ij||^2 + ||H_ji||^2 for a linear layer's second moment."""
    blocks, size = 4, 6
    weight = torch.zeros(blocks, size, dtype=torch.float64, requires_grad=True)
    full = torch.zeros(blocks * size, blocks * size, dtype=torch.float64)
    for inputs in low_rank(STEPS, (1, 7, size))[:, 0]:
        (inputs @ weight.T + inputs[:, :blocks]).tanh().square().sum().backward()
        assert weight.grad is not None
        full += outer(weight.grad.flatten())
        weight.data -= 0.01 * weight.grad
        weight.grad = None
    squares = full.view(blocks, size, blocks, size).square().sum(dim=(1, 3))
    diagonal = squares.diagonal()
    assert (diagonal.unsqueeze(0) + diagonal.unsqueeze(1) >= squares + squares.T - EXACT_TOL).all()


@pytest.mark.parametrize("stream", ["low_rank", "gaussian", "heavy_tailed", "rank_one"])
@pytest.mark.parametrize("variant", ["paper", "ema", "no_deflation", "coefficients_between"])
def test_block_bound_is_never_below_and_typically_near_the_exact_norm(
    variant: str, stream: str
) -> None:
    options = {"rank": 3, "forget_mass": True, **VARIANTS[variant]}
    run = track(STREAMS[stream](STEPS, SHAPE), **options)
    steps = range(1, STEPS + 1)
    exact = torch.stack([run.exact_norms(t) for t in steps])
    claimed = torch.stack([run.claimed_norms(t) for t in steps])
    slack = torch.stack([NORM_TOL * spectral_norm(run.moment(t)) for t in steps])
    assert (claimed >= exact - slack).all()
    assert (claimed <= 2.0 * exact + slack).all()
    assert (claimed <= TYPICAL_BLOCK_BOUND * exact + slack).double().mean() > 0.95


def test_exact_norm_is_the_spectral_norm() -> None:
    run = track(gaussian(STEPS, SHAPE), rank=3, escaped_norm="exact", beta2=0.9)
    for t in range(1, STEPS + 1):
        torch.testing.assert_close(
            run.claimed_norms(t), run.exact_norms(t), rtol=EXACT_TOL, atol=EXACT_TOL
        )


@pytest.mark.parametrize("options", [{}, {"coef_interval": 1, "update_interval": 10}])
@pytest.mark.parametrize("beta2", [None, 0.99])
@pytest.mark.parametrize("deflate", [True, False])
def test_float32_block_bound_survives_a_settled_basis(
    deflate: bool, beta2: float | None, options: dict[str, int]
) -> None:
    """Where cancelling formulas go negative in float32, the block bound stays a bound."""
    grads = slowly_turning(200, (1, 12, 24))
    run = track(
        grads,
        rank=4,
        deflate=deflate,
        beta2=beta2,
        dtype=torch.float32,
        forget_mass=True,
        **options,
    )
    for t in range(1, len(grads) + 1):
        exact, claimed = run.exact_norms(t), run.claimed_norms(t)
        rounding = 4 * torch.finfo(torch.float32).eps * spectral_norm(run.moment(t))
        assert (claimed >= exact * (1 - FLOAT32_NORM_TOL) - rounding).all(), (
            f"step {t}: below the norm"
        )
        assert (claimed <= 2 * exact).all(), f"step {t}: lost to cancellation"


def exact_basis(grads: Tensor, *, rank: int) -> Tracker:
    """The algorithm as the theorems assume it: the converged top-k basis and the exact norm."""
    return track(grads, rank=rank, num_iters=100, escaped_norm="exact")
