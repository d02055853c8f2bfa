"""The figures of diagnostics against their definitions, dense and in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer_ext.diagnostics import measures

RANKS = (1, 2, 3, 5, 8)


def gradients(steps: int = 6, groups: int = 2, blocks: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, size, dtype=torch.float64)
    x = torch.randn(steps, groups, blocks, size, generator=generator, dtype=torch.float64)
    return x * scales


def second_moments(g_TGMB: Tensor) -> Tensor:
    """H_i, ``[G, M, B, B]``."""
    return torch.einsum("tgmi,tgmj->gmij", g_TGMB, g_TGMB)


def error(H: Tensor, X: Tensor) -> float:
    return float((H - X).square().sum() / H.square().sum())


def test_shared_error_is_that_of_the_top_eigenvectors_of_the_sum_of_squares() -> None:
    g = gradients()
    H = second_moments(g)
    vectors = torch.linalg.eigh((H @ H).sum(1)).eigenvectors.flip(-1).unsqueeze(1)
    found = measures.shared_errors(g, RANKS)
    for rank in RANKS:
        P = vectors[..., :rank] @ vectors[..., :rank].mT
        assert found[rank] == pytest.approx(error(H, P @ H @ P), abs=1e-10)


def test_separate_error_is_that_of_each_truncated_eigendecomposition() -> None:
    g = gradients()
    H = second_moments(g)
    values, vectors = torch.linalg.eigh(H)
    found = measures.separate_errors(g, RANKS)
    for rank in RANKS:
        top = vectors[..., -rank:]
        X = top * values[..., None, -rank:] @ top.mT
        assert found[rank] == pytest.approx(error(H, X), abs=1e-10)


@pytest.mark.parametrize("steps", [2, 12])
def test_block_diagonal_error_is_that_of_the_entries_left_out(steps: int) -> None:
    g = gradients(steps=steps)
    H = second_moments(g)
    found = measures.block_diagonal_errors(g, RANKS)
    for rank in RANKS:
        place = torch.arange(8) // rank
        X = H * (place[:, None] == place)
        assert found[rank] == pytest.approx(error(H, X), abs=1e-10)


def test_frequent_directions_error_is_that_of_the_sketch_of_each_block() -> None:
    g = gradients()
    H = second_moments(g)
    found = measures.frequent_directions_errors(g, RANKS)
    for rank in RANKS:
        sketches = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
        for step in g:
            sketches += step.unsqueeze(-1) * step.unsqueeze(-2)
            values, vectors = torch.linalg.eigh(sketches)
            lost = values[..., -rank, None] if rank < 8 else torch.zeros_like(values[..., :1])
            values = (values - lost).clamp(min=0)
            sketches = vectors * values.unsqueeze(-2) @ vectors.mT
        assert found[rank] == pytest.approx(error(H, sketches), abs=1e-9)


def test_online_error_is_that_of_what_algorithm_1_holds() -> None:
    g = gradients()
    H = second_moments(g)
    full = measures.online_errors(g, [8])[8]
    assert full == pytest.approx(0, abs=1e-10)  # k = b: block-diagonal full-matrix Adagrad
    algorithm, state = measures._new_run(g, 3, escaped_norm="block")
    for step, g_GMB in enumerate(g, start=1):
        algorithm.update(state, g_GMB, measures._context(step, g_GMB))
    Q = state["basis"].unsqueeze(1)
    X = Q @ state["coef"] @ Q.mT
    assert measures.online_errors(g, [3])[3] == pytest.approx(error(H, X), abs=1e-10)


def test_trace_missed_is_what_the_best_basis_leaves_outside() -> None:
    g = gradients()
    total = second_moments(g).sum(1)
    values = torch.linalg.eigvalsh(total).flip(-1)
    found = measures.shared_trace_missed(g, RANKS)
    for rank in RANKS:
        missed = values[..., rank:].sum() / values.sum()
        assert found[rank] == pytest.approx(float(missed), abs=1e-10)


def test_gradients_of_zeros_have_no_error() -> None:
    g = torch.zeros(4, 1, 3, 8)
    for measure in (
        measures.shared_errors,
        measures.separate_errors,
        measures.online_errors,
        measures.frequent_directions_errors,
        measures.shared_trace_missed,
    ):
        assert all(math.isfinite(value) for value in measure(g, (1, 4)).values()), measure


def test_q_t_is_equation_20_and_escaped_mass_the_algorithms_own() -> None:
    g = gradients(steps=9, groups=1)
    found = measures.run_shared_basis(g, 2)
    algorithm, state = measures._new_run(g, 2, escaped_norm="exact")
    lost, deflated = torch.zeros(1, 3).double(), torch.zeros(1, 3).double()
    for step, g_GMB in enumerate(g, start=1):
        Q, R = state["basis"].unsqueeze(1), state["coef"]
        M = Q @ R @ Q.mT + g_GMB.unsqueeze(-1) * g_GMB.unsqueeze(-2)
        algorithm.update(state, g_GMB, measures._context(step, g_GMB))
        Q = state["basis"].unsqueeze(1)
        inside = Q.mT @ M @ Q
        lost += torch.linalg.matrix_norm(M - Q @ inside @ Q.mT, ord=2)
        deflated += torch.linalg.eigvalsh(inside)[..., 0].clamp(min=0)
    expected = 1 - lost / (deflated + lost)
    assert found.alignment[-1] == pytest.approx(float(expected.mean()), abs=1e-10)
    share = float(algorithm.health(state)["escaped_mass_share"].mean())
    assert found.escaped[-1] == pytest.approx(share, abs=1e-12)


def test_q_t_is_one_where_all_blocks_have_the_same_leading_eigenvectors() -> None:
    """Gradients along the first two axes only: nothing is lost, whatever is deflated."""
    g = torch.zeros(8, 1, 3, 6)
    generator = torch.Generator().manual_seed(1)
    g[..., :2] = torch.randn(8, 1, 3, 2, generator=generator)
    assert measures.run_shared_basis(g, 2).alignment[-1] == pytest.approx(1, abs=1e-6)


def test_second_moment_image_is_the_picture_of_the_appendix() -> None:
    g = gradients(groups=1, blocks=4)[:, 0]
    H = torch.einsum("ti,tj->ij", g.flatten(1), g.flatten(1)).square()
    limit = torch.quantile(H.flatten(), 0.99)
    capped = (H / limit).clamp(max=1)
    expected = capped.view(4, 8, 4, 8).mean((1, 3))
    torch.testing.assert_close(measures.second_moment_image(g), expected)


def test_block_share_tells_blocks_from_noise() -> None:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(400, 4, 4, generator=generator)
    apart = torch.zeros(400, 4, 4)
    apart[torch.arange(400), torch.arange(400) % 4] = torch.randn(400, 4, generator=generator)
    common = torch.randn(400, 1, 1, generator=generator).expand(400, 4, 4)
    assert measures.block_share(common) == pytest.approx(1)
    assert measures.block_share(apart) == pytest.approx(4)
    # White noise has entries on the diagonal only, which lie inside the blocks.
    assert measures.block_share(noise) > 3.5


def test_rank_holding_counts_the_largest_values() -> None:
    shares = measures.singular_values(torch.diag(torch.tensor([6.0, 3.0, 1.0])))
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))
    assert [measures.rank_holding(shares, part) for part in (0.5, 0.6, 0.61, 0.9, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
    ]


def test_the_gradients_own_singular_vectors_leave_nothing_off_the_diagonal() -> None:
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(g, full_matrices=False)
    rotated = (left.mT @ g @ right.mT).flatten()[None]
    apart = measures.off_diagonal(rotated)
    # Zero but between the singular values themselves: vec(S) vec(S)^T of paper 003.
    assert int((apart.abs() > 1e-12).sum()) == len(values) * (len(values) - 1)
    assert measures.off_diagonal_share(torch.eye(6)) == pytest.approx(0)
    assert measures.off_diagonal_share(torch.ones(1, 6)) == pytest.approx(1 - 1 / 6)
