"""What the references in float64 cannot see: float32 range and rounding, shapes and options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.base import StepContext
from hf_precond.preconditioners.shared_basis import SharedBasis
from tests.streams import low_rank

CPU = torch.device("cpu")
FLOAT32_TOLERANCE = 1e-3


def run(algorithm: SharedBasis, grads: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """State after all steps, and the last direction."""
    state = algorithm.init(tuple(grads.shape[1:]), dtype=grads.dtype, device=CPU)
    for step, g in enumerate(grads, start=1):
        ctx = StepContext(step=step)
        algorithm.update(state, g, ctx)
        direction = algorithm.apply(state, g, ctx)
    return state, direction


@pytest.mark.parametrize("scale", [1e-12, 1e8, 1e12])
def test_float32_statistics_scale_with_the_gradient(scale: float) -> None:
    """A is of fourth order in the gradient and would leave float32's range."""
    algorithm = SharedBasis(rank=3, update_interval=1, eps=1e-30)
    grads = low_rank(6, (2, 5, 8)).float()
    expected, direction = run(algorithm, grads)
    state, scaled = run(algorithm, scale * grads)
    for key, power in (("coef", 2), ("escaped_mass", 2), ("root_tail", -1)):
        found = (state[key].double() / scale**power).float()
        torch.testing.assert_close(
            found, expected[key], rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE
        )
    torch.testing.assert_close(scaled, direction, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


def test_float32_shift_is_not_below_rounding_of_the_spectrum() -> None:
    """c_i >= 1e-6 lambda_max(R_i) in float32: below it a root's excess is rounding noise."""
    grads = 1e3 * low_rank(2, (1, 5, 4), rank=1, noise=0.0)
    algorithm = SharedBasis(rank=4, update_interval=1, max_rank_ratio=4.0)
    state, _ = run(algorithm, grads.float())
    largest = torch.linalg.eigvalsh(state["coef"])[..., -1]
    assert (state["root_tail"].square().reciprocal() >= 0.99e-6 * largest).all()
    state, _ = run(algorithm, grads)
    largest = torch.linalg.eigvalsh(state["coef"])[..., -1]
    assert (state["root_tail"].square().reciprocal() < 0.99e-6 * largest).all()


@pytest.mark.parametrize(
    ("size", "rank"), [(1, 1), (4, 2), (16, 4), (64, 8), (256, 16), (1024, 32), (4096, 32)]
)
def test_rank_is_capped_by_the_ratio(size: int, rank: int) -> None:
    """k <= b and k^2 <= ratio * b."""
    assert SharedBasis(rank=32, max_rank_ratio=1.0).effective_rank((1, 3, size)) == rank


@pytest.mark.parametrize(("ratio", "size"), [(1.0, 1024), (4.0, 256), (0.5, 2048)])
def test_min_block_size_is_where_the_full_rank_begins(ratio: float, size: int) -> None:
    algorithm = SharedBasis(rank=32, max_rank_ratio=ratio)
    assert algorithm.min_block_size == size
    assert algorithm.effective_rank((1, 3, size)) == 32
    assert algorithm.effective_rank((1, 3, size - 1)) < 32


def test_state_is_what_the_paper_promises() -> None:
    """b k + m k^2 + m numbers per group, and the roots; half of the squares when packed."""
    groups, blocks, size, rank = 2, 5, 16, 4
    shape = (groups, blocks, size)
    plain = SharedBasis(rank=rank).init(shape, dtype=torch.float32, device=CPU)
    packed = SharedBasis(rank=rank, packed=True).init(shape, dtype=torch.float32, device=CPU)
    assert plain["basis"].shape == (groups, size, rank)
    assert plain["coef"].shape == plain["root"].shape == (groups, blocks, rank, rank)
    assert packed["coef"].shape == packed["root"].shape == (groups, blocks, 10)
    assert plain["escaped_mass"].shape == plain["root_tail"].shape == (groups, blocks)
    assert all(len(tensor) == groups for tensor in packed.values())


def test_health_is_the_share_of_the_trace_outside_the_basis() -> None:
    """Nothing escapes a fixed subspace; much escapes from a single column."""
    algorithm = SharedBasis(rank=4, update_interval=1)
    inside, _ = run(algorithm, low_rank(4, (1, 5, 8), rank=2, noise=0.0))
    assert (algorithm.health(inside)["escaped_mass_share"] < 1e-5).all()
    single = SharedBasis(rank=1, update_interval=1)
    outside, _ = run(single, low_rank(4, (1, 5, 8), rank=4))
    assert (single.health(outside)["escaped_mass_share"] > 0.5).all()
