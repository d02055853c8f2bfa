"""The laws of Shampoo, checked in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.shampoo import Shampoo
from tests.driving import (
    Driver,
    assert_apart,
    assert_near,
    descend,
    directions,
    random_matrices,
    replay,
)
from tests.streams import STREAMS, gaussian, low_rank
from tests.theory import loewner

STEPS = 12
EXACT_TOL = 1e-9
EVERY_STEP: dict[str, Any] = {"inverse_interval": 1}


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e8])
@pytest.mark.parametrize("accumulate", ["ema", "sum"])
@pytest.mark.parametrize("stream", ["low_rank", "gaussian", "with_zeros"])
def test_relative_ridge_makes_the_step_independent_of_the_gradients_scale(
    stream: str, accumulate: str, scale: float
) -> None:
    grads = STREAMS[stream](STEPS, (2, 5, 8))
    algorithm = Shampoo(accumulate=accumulate, inverse_interval=2)
    assert_near(directions(algorithm, scale * grads), directions(algorithm, grads), EXACT_TOL)


def test_absolute_ridge_ties_the_step_to_the_scale() -> None:
    grads = gaussian(STEPS, (2, 5, 8))
    algorithm = Shampoo(eps_mode="absolute", eps=1e-2)
    assert_apart(directions(algorithm, 1e-3 * grads), directions(algorithm, grads), 1e-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 3},
        {"accumulate": "sum", "exponent": 0.5},
        {"max_dim": 6, "large_dim": "one_sided"},
        {"merge_dims": True},
    ],
    ids=["paper", "tiles", "sum", "one_sided", "merged"],
)
def test_transposed_weight_takes_the_transposed_step(options: dict[str, Any]) -> None:
    grads, start = low_rank(STEPS, (5, 1, 8))[:, :, 0], random_matrices(5, 8)
    settings = EVERY_STEP | options
    upright = descend("shampoo", start, replay(grads), STEPS, **settings)
    turned = descend("shampoo", start.T, replay(grads.mT), STEPS, **settings)
    assert_near(turned.mT, upright, EXACT_TOL)


@pytest.mark.parametrize("shape", [(6, 8), (7, 10)], ids=["even", "with_remainders"])
def test_tiles_never_mix(shape: tuple[int, int]) -> None:
    """Every tile moves as if it were a weight of its own."""
    size = 4
    grads, start = random_matrices(STEPS, *shape, seed=1), random_matrices(*shape)
    together = descend("shampoo", start, replay(grads), STEPS, block_size=size)
    for rows in torch.arange(shape[0]).split(size):
        for columns in torch.arange(shape[1]).split(size):
            tile = (rows.unsqueeze(-1), columns)
            alone = descend("shampoo", start[tile], replay(grads[(slice(None), *tile)]), STEPS)
            assert_near(
                together[(slice(None), *tile)], alone, EXACT_TOL, f"tile at {rows[0]}, {columns[0]}"
            )


def test_first_step_is_the_orthogonal_factor_of_the_gradient() -> None:
    """L^(-1/4) G R^(-1/4) = U V^T for G = U S V^T, as the ridge goes to zero."""
    for shape in ((5, 8), (8, 5), (6, 6)):
        g = random_matrices(*shape)
        left, _, right = torch.linalg.svd(g, full_matrices=False)
        algorithm = Shampoo(accumulate="sum", eps=1e-14)
        assert_near(directions(algorithm, g.view(1, 1, *shape))[0, 0], left @ right, 1e-6)


@pytest.mark.parametrize(
    ("stream", "rank"), [("gaussian", 4), ("low_rank", 4), ("heavy_tailed", 4), ("rank_one", 1)]
)
def test_kronecker_product_of_roots_bounds_the_full_second_moment(stream: str, rank: int) -> None:
    """Gupta et al., Lemma 8: sum vec(G) vec(G)^T <= r L^(1/2) (x) R^(1/2), r the largest rank."""
    grads = STREAMS[stream](STEPS, (1, 4, 6))
    driver = Driver(Shampoo(accumulate="sum"))
    second_moment = torch.zeros(24, 24, dtype=torch.float64)
    for t, g in enumerate(grads, start=1):
        driver.step(g)
        second_moment = second_moment + torch.outer(g.flatten(), g.flatten())
        product = torch.kron(*(square_root(driver.state[side][0]) for side in ("left", "right")))
        loewner.assert_below(second_moment, rank * product, f"step {t}")


def test_steps_spend_no_more_than_the_regret_bound_allows() -> None:
    """sum <G_t, d_t> <= 2 r tr(L^(1/4)) tr(R^(1/4)): Gupta et al., the proof of Theorem 7."""
    rank = 4
    grads = gaussian(STEPS, (1, rank, 6))
    driver = Driver(Shampoo(accumulate="sum", eps=1e-12, **EVERY_STEP))
    spent = torch.stack([(g * driver.step(g)).sum() for g in grads])
    traces = [loewner.spectrum(driver.state[side]).pow(0.25).sum() for side in ("left", "right")]
    assert (spent > 0).all()
    assert spent.sum() <= 2 * rank * traces[0] * traces[1]


def square_root(dense: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(dense)
    return loewner.low_rank(vectors, values.clamp(min=0).sqrt())
