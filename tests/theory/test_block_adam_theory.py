"""Block Adam between its two extremes, elementwise Adam and full rows, checked in float64."""

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
from tests.theory import loewner

STEPS = 12
BETAS = (0.9, 0.99)
EXACT_TOL = 1e-10
SETTINGS: dict[str, Any] = {
    "betas": BETAS,
    "root_interval": 1,
    "momentum": "ema",
    "momentum_site": "gradient",
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 3)])
def test_blocks_of_one_weight_are_adam(shape: tuple[int, int], decay: float) -> None:
    """m^ / sqrt(v^ + eps) is torch's AdamW where no eps counts, bias corrections included."""
    start, lr = random_matrices(*shape), 0.1
    options = {"block_size": 1, "eps": 1e-30, "weight_decay": decay, **SETTINGS}
    actual = descend("block_adam", start, noisy_problem(*shape), STEPS, lr=lr, **options)
    adam = torch.optim.AdamW([matrix(start)], lr=lr, betas=BETAS, eps=0.0, weight_decay=decay)
    assert_near(actual, follow(adam, noisy_problem(*shape), STEPS), EXACT_TOL)


def test_eps_of_an_elementwise_block_is_inside_the_root() -> None:
    eps = 0.3
    grads, start = random_matrices(STEPS, 4, 6, seed=1), torch.zeros(4, 6, dtype=torch.float64)
    options = {"block_size": 1, "eps": eps, **SETTINGS}
    weights = descend("block_adam", start, replay(grads), STEPS, lr=1.0, **options)
    first, second = corrected_moments(grads)
    expected = -(first / (second + eps).sqrt()).cumsum(0)
    assert_near(weights, expected, EXACT_TOL)


@pytest.mark.parametrize("block_size", [8, 64])
def test_whole_rows_are_full_matrix_adam_of_every_neuron(block_size: int) -> None:
    """d_i = (H_i / (1 - beta2^t) + eps I)^(-1/2) m^_i, dense, with H_i of row i alone."""
    eps, shape = 1e-3, (3, 8)
    grads, start = random_matrices(STEPS, *shape, seed=1), torch.zeros(shape, dtype=torch.float64)
    options = {"block_size": block_size, "eps": eps, **SETTINGS}
    weights = descend("block_adam", start, replay(grads), STEPS, lr=1.0, **options)
    moments, ages = corrected_moments(grads)[0], torch.arange(STEPS, dtype=torch.float64)
    expected = torch.zeros(shape, dtype=torch.float64)
    for t in range(1, STEPS + 1):
        shares = (1 - BETAS[1]) * BETAS[1] ** ages[:t].flip(0) / (1 - BETAS[1] ** t)
        dense = torch.einsum("t,tmi,tmj->mij", shares, grads[:t], grads[:t])
        damped = dense + eps * torch.eye(shape[1], dtype=torch.float64)
        root = loewner.inverse_power(damped, 0.5)
        expected = expected - (root @ moments[t - 1].unsqueeze(-1)).squeeze(-1)
        assert_near(weights[t - 1], expected, EXACT_TOL, f"step {t}")


def test_rows_and_blocks_never_mix() -> None:
    """Every block moves as if it were a weight of its own; the last one is smaller."""
    shape, size = (3, 8), 3
    grads, start = random_matrices(STEPS, *shape, seed=1), random_matrices(*shape)
    options = {"block_size": size, "eps": 1e-3, **SETTINGS}
    together = descend("block_adam", start, replay(grads), STEPS, **options)
    for row in range(shape[0]):
        for columns in torch.arange(shape[1]).split(size):
            block = (slice(row, row + 1), columns)
            alone = descend(
                "block_adam", start[block], replay(grads[(slice(None), *block)]), STEPS, **options
            )
            assert_near(
                together[(slice(None), *block)], alone, EXACT_TOL, f"row {row}, column {columns[0]}"
            )


def test_block_size_matters() -> None:
    grads, start = random_matrices(STEPS, 3, 8, seed=1), random_matrices(3, 8)
    runs = [
        descend("block_adam", start, replay(grads), STEPS, block_size=size, **SETTINGS)
        for size in (1, 4)
    ]
    assert_apart(*runs, 1e-2)


def corrected_moments(grads: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's two moments after every step, without their biases."""
    moments = []
    for beta, stream in zip(BETAS, (grads, grads**2), strict=True):
        average, kept = torch.zeros_like(stream[0]), []
        for t, x in enumerate(stream, start=1):
            average = beta * average + (1 - beta) * x
            kept.append(average / (1 - beta**t))
        moments.append(torch.stack(kept))
    return moments[0], moments[1]
