"""What Sketchy's sketches promise of Shampoo's factors, checked in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.sketchy import Sketchy
from tests.driving import Driver, assert_apart, assert_near, descend, random_matrices, replay
from tests.streams import STREAMS, gaussian
from tests.theory import loewner

SHAPE = (2, 5, 8)
STEPS = 15
RANK = 3
BETA2 = 0.9
ROUNDING = 1e-12  # of the factor's trace
EXACT_TOL = 1e-9

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "long_memory": {"beta2": 0.999},
    "tail_between": {"tail_decay": 0.95},
    "tail_kept": {"tail_decay": 1.0},
    "authors_code": {"authors_code": True},
}
SIDES = ("left", "right")


def factors(grads: Tensor, beta2: float, weight: float) -> Iterator[dict[str, Tensor]]:
    """The factors that are sketched, after each step."""
    groups, rows, columns = grads.shape[1:]
    left, right = (grads.new_zeros(groups, size, size) for size in (rows, columns))
    for g in grads:
        left = beta2 * left + weight * g @ g.mT
        right = beta2 * right + weight * g.mT @ g
        yield {"left": left, "right": right}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sketch_is_below_and_with_its_escaped_mass_above_the_factor(
    variant: str, stream: str
) -> None:
    """U diag(s) U^T <= L <= U diag(s) U^T + rho I: every step, both sides."""
    algorithm = Sketchy(**{"rank": RANK, "beta2": BETA2, **VARIANTS[variant]})
    weight = 1.0 if algorithm.authors_code else 1 - algorithm.beta2
    grads = STREAMS[stream](STEPS, SHAPE)
    driver = Driver(algorithm)
    for t, dense in enumerate(factors(grads, algorithm.beta2, weight), start=1):
        driver.step(grads[t - 1])
        for side in SIDES:
            sketch = loewner.low_rank(
                driver.state[f"{side}_vectors"], driver.state[f"{side}_values"]
            )
            rest = loewner.times_identity(driver.state[f"{side}_mass"], sketch.shape[-1])
            loewner.assert_below(sketch, dense[side], f"{side} step {t}, sketch <= factor")
            loewner.assert_below(dense[side], sketch + rest, f"{side} step {t}, factor <= bound")


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("stream", STREAMS)
def test_escaped_mass_is_bounded_by_the_lower_eigenvalues(stream: str, rank: int) -> None:
    """rho <= min_p sum_{j > p} sigma_j / (ell - p), sigma of the exact factor."""
    grads = STREAMS[stream](STEPS, SHAPE)
    driver = Driver(Sketchy(rank=rank, beta2=BETA2))
    escaped = torch.zeros(())
    for t, dense in enumerate(factors(grads, BETA2, 1 - BETA2), start=1):
        driver.step(grads[t - 1])
        for side in SIDES:
            mass, bound = driver.state[f"{side}_mass"], loewner.tail_bound(dense[side], rank)
            assert (mass <= bound + ROUNDING * loewner.trace(dense[side])).all(), f"{side} step {t}"
            escaped = escaped + mass.sum()
    assert escaped > 0


def test_bound_is_reached_where_the_spectrum_is_flat() -> None:
    """Gradients with all singular values equal: rho = sigma_ell, the bound with p = 0 is tight."""
    rank, size = 3, 3
    rotation = torch.linalg.qr(random_matrices(size, size)).Q
    driver = Driver(Sketchy(rank=rank, beta2=BETA2))
    driver.step(rotation.unsqueeze(0))
    bound = loewner.tail_bound((1 - BETA2) * torch.eye(size, dtype=torch.float64), rank)
    torch.testing.assert_close(driver.state["left_mass"], bound.view(1))


def test_nothing_escapes_from_a_fixed_subspace() -> None:
    """Fewer directions than columns of the sketch: the factor itself, and rho = 0."""
    left, right = random_matrices(2, 5, 2), random_matrices(2, 2, 8)
    grads = left @ random_matrices(STEPS, 2, 2, 2, seed=1) @ right
    driver = Driver(Sketchy(rank=RANK, beta2=BETA2))
    for g in grads:
        driver.step(g)
    *_, dense = factors(grads, BETA2, 1 - BETA2)
    for side in SIDES:
        sketch = loewner.low_rank(driver.state[f"{side}_vectors"], driver.state[f"{side}_values"])
        assert_near(sketch, dense[side], EXACT_TOL, side)
        assert (driver.state[f"{side}_mass"] <= ROUNDING * loewner.trace(dense[side])).all(), side


@pytest.mark.parametrize("rank", [8, 64], ids=["dimension", "more"])
@pytest.mark.parametrize("block_size", [64, 4], ids=["whole", "tiles"])
@pytest.mark.parametrize("stream", ["low_rank", "gaussian"])
def test_rank_of_the_dimension_is_shampoo(stream: str, block_size: int, rank: int) -> None:
    """Nothing is lost: what is taken off all eigenvalues comes back as rho."""
    grads = STREAMS[stream](STEPS, (5, 1, 8))[:, :, 0]
    common = {"block_size": block_size, "betas": (0.9, BETA2)}
    start = random_matrices(5, 8)
    sketched = descend(
        "sketchy", start, replay(grads), STEPS, rank=rank, update_interval=1, **common
    )
    whole = descend("shampoo", start, replay(grads), STEPS, inverse_interval=1, **common)
    assert_near(sketched, whole, EXACT_TOL)


def test_lower_rank_is_not_shampoo() -> None:
    grads, start = gaussian(STEPS, (5, 1, 8))[:, :, 0], random_matrices(5, 8)
    common = {"betas": (0.9, BETA2)}
    sketched = descend("sketchy", start, replay(grads), STEPS, rank=2, update_interval=1, **common)
    whole = descend("shampoo", start, replay(grads), STEPS, inverse_interval=1, **common)
    assert_apart(sketched, whole, 1e-2)
