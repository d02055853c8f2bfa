"""The laws of two-sided bases: where they meet Adam, a rotated Adam, and the singular vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.base import StepContext
from hf_precond.preconditioners.two_sided_basis import TwoSidedBasis
from tests.driving import (
    Driver,
    assert_apart,
    assert_near,
    follow,
    matrix,
    random_matrices,
    random_rotation,
    replay,
)

STEPS, NEVER, BETA2 = 12, 10**6, 0.97
EXACT_TOL = 1e-10
SHAPES = [(5, 8), (8, 5), (6, 6)]
SQUARES = ("core_sq", "out_sq", "in_sq", "tail_sq")
Shape = tuple[int, int]


def directions(grads: Tensor, out_basis: Tensor, in_basis: Tensor, interval: int = 1) -> Tensor:
    """Directions [T, m, b] from bases of the test's own, unscaled."""
    rank = max(out_basis.shape[1], in_basis.shape[1])
    driver = Driver(
        TwoSidedBasis(
            rank=rank, update_interval=interval, update_rms=None, tail_ratio=None, beta2=BETA2
        )
    )
    driver.state = driver.algorithm.init(
        (1, *grads.shape[1:]), dtype=torch.float64, device=torch.device("cpu")
    )
    for name, basis in (("out_basis", out_basis), ("in_basis", in_basis)):
        driver.state[name].copy_(basis)
    return torch.cat([driver.step(g.unsqueeze(0)) for g in grads])


def after_nothing(grads: Tensor) -> Tensor:
    """The gradients after one of zeros, which leaves bases as they are and counts as a step."""
    return torch.cat([torch.zeros_like(grads[:1]), grads])


def adam(grads: Tensor) -> Tensor:
    """Adam's directions without momentum, [T, m, b]."""
    start = torch.zeros_like(grads[0])
    optimizer = torch.optim.Adam([matrix(start)], lr=1.0, betas=(0.0, BETA2), eps=1e-8)
    weights = follow(optimizer, replay(grads), len(grads))
    return torch.cat([start.unsqueeze(0), weights]).diff(dim=0).neg()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_bases_of_unit_vectors_leave_adam(shape: Shape, rank: int) -> None:
    """Cut along its rows and columns, a matrix keeps its entries."""
    grads = after_nothing(random_matrices(STEPS, *shape))
    units = [torch.eye(size, dtype=torch.float64)[:, :rank] for size in shape]
    assert_near(directions(grads, *units, interval=NEVER), adam(grads), EXACT_TOL)


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_bases_make_a_rotated_adam(shape: Shape) -> None:
    grads = after_nothing(random_matrices(STEPS, *shape))
    left, right = (random_rotation(size, seed=size) for size in shape)
    expected = left @ adam(left.T @ grads @ right) @ right.T
    actual = directions(grads, left, right, interval=NEVER)
    assert_near(actual, expected, EXACT_TOL)
    assert_apart(actual, adam(grads), 1e-2)


def test_equivariant_under_rotations_where_nothing_is_left_to_coordinates() -> None:
    """G -> U G Z with bases U P and Z^T Q, square and of full rank: the rotated directions."""
    grads = random_matrices(STEPS, 6, 6)
    bases = random_rotation(6, seed=1), random_rotation(6, seed=2)
    left, right = random_rotation(6, seed=3), random_rotation(6, seed=4)
    turned = directions(left @ grads @ right, left @ bases[0], right.T @ bases[1])
    assert_near(left.T @ turned @ right.T, directions(grads, *bases), 1e-7)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_transposed_gradients_and_bases_give_the_transposed_direction(shape: Shape) -> None:
    grads = random_matrices(STEPS, *shape)
    bases = [random_rotation(size, seed=size)[:, :2] for size in shape]
    transposed = directions(grads.mT, bases[1], bases[0])
    assert_near(transposed.mT, directions(grads, *bases), EXACT_TOL)


@pytest.mark.parametrize("shape", SHAPES)
def test_squares_of_the_parts_sum_up_to_those_of_the_gradient(shape: Shape) -> None:
    driver = Driver(TwoSidedBasis(rank=2, beta2=0.0))
    for g in random_matrices(STEPS, 1, *shape):
        driver.step(g)
        total = torch.stack([driver.state[name].sum() for name in SQUARES]).sum()
        assert_near(total, g.square().sum(), EXACT_TOL)


def test_bases_find_the_leading_singular_vectors() -> None:
    left, right = random_rotation(7, seed=1)[:, :3], random_rotation(9, seed=2)[:, :3]
    g = (left * torch.tensor([4.0, 2.0, 0.1], dtype=torch.float64)) @ right.T
    driver = Driver(TwoSidedBasis(rank=2))
    for _ in range(30):
        driver.step(g.unsqueeze(0))
    for name, vectors in (("out_basis", left), ("in_basis", right)):
        overlap = (vectors[:, :2].T @ driver.state[name][0]).abs()
        assert_near(overlap, torch.eye(2, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rounding_outside_of_the_gradients_is_not_brought_to_one(scale: float) -> None:
    """Gradients of rank two in float32: what falls outside of the bases is noise, and stays so."""
    left, right = random_rotation(12, seed=1)[:, :2], random_rotation(16, seed=2)[:, :2]
    cores = random_matrices(30, 2, 2, seed=3) * scale
    driver = Driver(TwoSidedBasis(rank=4))
    for core in cores:
        direction = driver.step((left @ core @ right.T).float().unsqueeze(0))[0].double()
    outside = direction - left @ (left.T @ direction @ right) @ right.T
    assert outside.norm() < 0.05 * direction.norm()


@pytest.mark.parametrize(
    ("ratio", "low", "high"), [(1.0, 0.75, 1.0), (0.3, 0.22, 0.3), (None, 3.0, 7.0)]
)
def test_directions_outside_of_the_bases_are_no_larger_than_those_inside(
    ratio: float | None, low: float, high: float
) -> None:
    """Noise on top of a signal of rank two: root mean squares of either part's singular values."""
    sides = random_rotation(40, seed=1)[:, :2], random_rotation(60, seed=2)[:, :2]
    signal = 30 * sides[0] @ sides[1].T
    driver = Driver(TwoSidedBasis(rank=2, tail_ratio=ratio, beta2=BETA2))
    for noise in random_matrices(STEPS, 1, 40, 60):
        direction = driver.step(signal + noise)[0]
    out_basis, in_basis = (driver.state[name][0] for name in ("out_basis", "in_basis"))
    inside = out_basis.T @ direction @ in_basis
    outside = direction - out_basis @ (out_basis.T @ direction)
    outside = outside - outside @ in_basis @ in_basis.T
    sizes = [(x.square().sum() / count) ** 0.5 for x, count in ((inside, 2), (outside, 38))]
    # Divided weight by weight, the tail has a little of what lies inside.
    assert low < float(sizes[1] / sizes[0]) <= high


@pytest.mark.parametrize("size", [0.2, 0.01])
def test_directions_have_the_root_mean_square_asked_for(size: float) -> None:
    driver = Driver(TwoSidedBasis(rank=2, update_rms=size))
    for g in random_matrices(STEPS, 3, 5, 8):
        for direction in driver.step(g):
            assert direction.square().mean().sqrt().item() == pytest.approx(size, rel=1e-12)


def test_bases_follow_the_momentum_where_it_is_preconditioned() -> None:
    """Not the gradient of the step: noise that averages out turns nothing."""
    moment, noise = random_matrices(1, 5, 8, seed=1), random_matrices(1, 5, 8, seed=2)
    algorithm = TwoSidedBasis(rank=2)
    states = []
    for gradient in (moment, noise):
        state = algorithm.init((1, 5, 8), dtype=torch.float64, device=torch.device("cpu"))
        algorithm.update(state, gradient, StepContext(step=1, moment=moment))
        states.append(state)
    for name in ("out_basis", "in_basis"):
        assert torch.equal(states[0][name], states[1][name])
    assert_apart(states[0]["core_sq"], states[1]["core_sq"], 1e-2)
