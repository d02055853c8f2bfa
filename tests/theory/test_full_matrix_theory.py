"""Full-matrix Adagrad by its theorems, and as Block Adam of one row, checked in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.block_adam import BlockAdam
from hf_precond.preconditioners.full_matrix import FullMatrix
from tests.driving import (
    Driver,
    assert_near,
    descend,
    directions,
    noisy_problem,
    random_matrices,
    random_rotation,
)
from tests.streams import STREAMS, gaussian
from tests.theory import loewner

STEPS = 12
EXACT_TOL = 1e-9


@pytest.mark.parametrize("stream", ["low_rank", "gaussian", "heavy_tailed", "with_zeros"])
@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_direction_is_that_of_block_adam_on_one_row(eps: float, stream: str) -> None:
    """Whatever the shape, all weights are one row: only the weights of the sum differ.

    Block Adam averages: H_T = sum_t w_t g_t g_t^T, w_t = (1 - b) b^(T-t) / (1 - b^T). Full-matrix
    Adagrad of sqrt(w_t) g_t sums the same, and its last direction is sqrt(w_T) times the other.
    """
    beta2, shape = 0.9, (2, 3, 4)
    grads = STREAMS[stream](STEPS, shape)
    for last in (1, 2, STEPS - 1, STEPS):
        ages = torch.arange(last - 1, -1, -1, dtype=torch.float64)
        shares = ((1 - beta2) * beta2**ages / (1 - beta2**last)).sqrt()
        weighted = shares.view(-1, 1, 1, 1) * grads[:last]
        full = directions(FullMatrix(eps=eps), weighted)[-1] / shares[-1]
        rows = grads[:last].flatten(2).unsqueeze(2)
        averaged = directions(BlockAdam(block_size=12, beta2=beta2, eps=eps), rows)[-1]
        if grads[last - 1].any():
            assert_near(full.flatten(1), averaged[:, 0], EXACT_TOL, f"step {last}")


def test_direction_is_the_inverse_root_times_the_gradient() -> None:
    """d = (sum g g^T + eps I)^(-1/2) g over all weights of a group."""
    eps = 1e-2
    grads = gaussian(STEPS, (2, 3, 4))
    dense = eps * torch.eye(12, dtype=torch.float64).expand(2, 12, 12)
    for g, direction in zip(grads, directions(FullMatrix(eps=eps), grads), strict=True):
        flat = g.flatten(1).unsqueeze(-1)
        dense = dense + flat @ flat.mT
        expected = (loewner.inverse_power(dense, 0.5) @ flat).view_as(g)
        assert_near(direction, expected, EXACT_TOL)


def test_rotating_all_weights_rotates_the_trajectory() -> None:
    """w -> U w over the flattened weight: no coordinates are preferred."""
    rows, columns = 3, 4
    problem, rotation = noisy_problem(rows, columns), random_rotation(rows * columns)
    start = random_matrices(rows, columns)

    def turned_problem(weight: Tensor, t: int) -> Tensor:
        back = (rotation.T @ weight.flatten()).view(rows, columns)
        return (rotation @ problem(back, t).flatten()).view(rows, columns)

    options = {"root_interval": 1, "eps": 1e-3}
    plain = descend("full_matrix_adagrad", start, problem, STEPS, **options)
    begin = (rotation @ start.flatten()).view(rows, columns)
    turned = descend("full_matrix_adagrad", begin, turned_problem, STEPS, **options)
    assert_near(turned.flatten(1), plain.flatten(1) @ rotation.T, EXACT_TOL)


@pytest.mark.parametrize("stream", STREAMS)
def test_steps_spend_no_more_than_the_regret_bound_allows(stream: str) -> None:
    """sum_t <g_t, d_t> <= 2 tr(H_T^(1/2)): Duchi et al., Lemma 10."""
    eps = 1e-8
    driver = Driver(FullMatrix(eps=eps))
    grads = STREAMS[stream](STEPS, (2, 3, 4))
    spent = torch.stack([(g * driver.step(g)).sum((-2, -1)) for g in grads])
    allowed = 2 * (loewner.spectrum(driver.state["second_moment"]) + eps).sqrt().sum(-1)
    assert (spent >= 0).all()
    assert (spent.sum(0) > 0).all()
    assert (spent.sum(0) <= allowed).all()
