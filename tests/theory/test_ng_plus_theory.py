"""The laws of NG+, checked in float64."""

from __future__ import annotations

from math import comb
from typing import Any

import pytest
import torch

from hf_precond.preconditioners.ng_plus import NgPlus
from hf_precond.preconditioners.schedule import Schedule
from tests.driving import (
    Driver,
    assert_apart,
    assert_near,
    descend,
    directions,
    random_matrices,
    replay,
)
from tests.streams import STREAMS, gaussian

STEPS = 12
EXACT_TOL = 1e-10
DAMPING = 0.16
PAPER: dict[str, Any] = {"damping_mode": "absolute", "damping": DAMPING, "update_interval": 1}

Shape = tuple[int, int]


@pytest.mark.parametrize("damping", [1e-2, 0.16, 2.0])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4), (1, 6)])
def test_sherman_morrison_woodbury(shape: Shape, damping: float) -> None:
    """One step on L = G G^T alone: (lam I + U U^T)^(-1) G, with U = G, by the other side's inverse.

    (G - U (lam I + U^T U)^(-1) U^T G) / lam, from the left and, transposed, from the right.
    """
    algorithm = NgPlus(beta=0.0, gamma=1.0, damping=Schedule.parse(damping))
    g = random_matrices(*shape)
    inner = damping * torch.eye(shape[1], dtype=g.dtype) + g.T @ g
    expected = (g - g @ torch.linalg.solve(inner, g.T @ g)) / damping
    assert_near(directions(algorithm, g.view(1, 1, *shape))[0, 0], expected, EXACT_TOL)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_curvature_is_the_average_on_the_smaller_side(shape: Shape) -> None:
    """L_t = beta^t lam I + gamma sum_s beta^(t-s) G_s G_s^T; d = (L + lam I)^(-1) G, dense."""
    beta, gamma = 0.8, 0.3
    algorithm = NgPlus(beta=beta, gamma=gamma, damping=Schedule.parse(DAMPING), update_interval=1)
    grads = gaussian(STEPS, (1, *shape))
    found = directions(algorithm, grads)
    left = shape[0] <= shape[1]
    eye = torch.eye(4, dtype=torch.float64)
    curvature = DAMPING * eye
    for g, direction in zip(grads[:, 0], found[:, 0], strict=True):
        x = g if left else g.T
        curvature = beta * curvature + gamma * x @ x.T
        expected = torch.linalg.solve(curvature + DAMPING * eye, x)
        assert_near(direction if left else direction.T, expected, EXACT_TOL)


@pytest.mark.parametrize("sketch_size", ["columns", "more"])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_sketch_of_all_columns_is_exact(shape: Shape, sketch_size: str) -> None:
    """q = n, drawn without replacement: the very Gram matrix, bit for bit."""
    grads, start = random_matrices(STEPS, *shape, seed=1), random_matrices(*shape)
    size = max(shape) + (sketch_size == "more")
    whole = descend("ng_plus", start, replay(grads), STEPS, **PAPER)
    sketched = descend("ng_plus", start, replay(grads), STEPS, sketch_size=size, **PAPER)
    assert torch.equal(sketched, whole)


def test_sketch_is_unbiased() -> None:
    """Over all choices of q columns of n, the sketched Gram matrices average to G G^T."""
    rows, columns, size = 3, 4, 2
    g = random_matrices(rows, columns)
    found: list[torch.Tensor] = []
    for seed in range(100):
        algorithm = NgPlus(beta=0.0, gamma=1.0, sketch_size=size, seed=seed)
        driver = Driver(algorithm)
        driver.step(g.unsqueeze(0))
        curvature = driver.state["curvature"][0]
        if not any(torch.allclose(curvature, other) for other in found):
            found.append(curvature)
    assert len(found) == comb(columns, size)
    assert_near(torch.stack(found).mean(0), g @ g.T, EXACT_TOL)


@pytest.mark.parametrize("block_size", [4, 64])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_one_block_of_all_rows_is_exact(shape: Shape, block_size: int) -> None:
    """p = m."""
    grads, start = random_matrices(STEPS, *shape, seed=1), random_matrices(*shape)
    whole = descend("ng_plus", start, replay(grads), STEPS, **PAPER)
    blocks = descend("ng_plus", start, replay(grads), STEPS, block_size=block_size, **PAPER)
    assert_near(blocks, whole, EXACT_TOL)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_blocks_never_mix(shape: Shape, mode: str) -> None:
    """Rows 1-2, 3-4 and 5 of the smaller side move as if they were weights of their own."""
    grads, start = random_matrices(STEPS, *shape, seed=1), random_matrices(*shape)
    options = PAPER | {"damping_mode": mode}
    together = descend("ng_plus", start, replay(grads), STEPS, block_size=2, **options)
    for part in torch.arange(5).split(2):
        block = (part, slice(None)) if shape[0] == 5 else (slice(None), part)
        alone = descend(
            "ng_plus", start[block], replay(grads[(slice(None), *block)]), STEPS, **options
        )
        assert_near(together[(slice(None), *block)], alone, EXACT_TOL, f"from {part[0]}")


def test_blocks_matter() -> None:
    grads, start = random_matrices(STEPS, 4, 7, seed=1), random_matrices(4, 7)
    whole = descend("ng_plus", start, replay(grads), STEPS, **PAPER)
    blocks = descend("ng_plus", start, replay(grads), STEPS, block_size=2, **PAPER)
    assert_apart(blocks, whole, 1e-2)


@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 2}, {"sketch_size": 3}, {"damping_mode": "relative"}],
    ids=["paper", "blocks", "sketched", "relative"],
)
def test_transposed_weight_takes_the_transposed_step(options: dict[str, Any]) -> None:
    grads, start = random_matrices(STEPS, 4, 7, seed=1), random_matrices(4, 7)
    settings = PAPER | options
    upright = descend("ng_plus", start, replay(grads), STEPS, **settings)
    turned = descend("ng_plus", start.T, replay(grads.mT), STEPS, **settings)
    assert_near(turned.mT, upright, EXACT_TOL)


def test_square_weight_has_the_law_only_for_one_gradient() -> None:
    """Neither side is the smaller one: the left is taken both ways, and two averages differ."""
    algorithm = NgPlus(damping=Schedule.parse(DAMPING), beta=1.0, gamma=1.0, update_interval=1)
    one_only = NgPlus(damping=Schedule.parse(DAMPING), beta=0.0, gamma=1.0, update_interval=1)
    grads = gaussian(STEPS, (1, 4, 4))
    assert_near(directions(one_only, grads.mT).mT, directions(one_only, grads), EXACT_TOL)
    assert_apart(directions(algorithm, grads.mT).mT, directions(algorithm, grads), 1e-2)


@pytest.mark.parametrize("scale", [1e-12, 1e8])
@pytest.mark.parametrize("stream", ["low_rank", "gaussian", "with_zeros"])
def test_relative_damping_scales_the_step_inversely(stream: str, scale: float) -> None:
    """c G gives d / c, as a natural gradient does where no absolute number interferes.

    Before any curvature was seen, the direction is the gradient.
    """
    algorithm = NgPlus(damping_mode="relative", damping=Schedule.parse(0.01), update_interval=2)
    grads = STREAMS[stream](STEPS, (2, 4, 7))
    unseen = 2 if not grads[0].any() else 0
    small, large = directions(algorithm, grads), directions(algorithm, scale * grads)
    assert_near(scale * large[unseen:], small[unseen:], 1e-9)
    assert torch.equal(small[:unseen], grads[:unseen])
