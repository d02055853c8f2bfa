"""Ada-FD and SON-FD: what frequent directions promise of the full second moment, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.frequent_directions import FrequentDirections
from hf_precond.preconditioners.full_matrix import FullMatrix
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

SHAPE = (2, 3, 4)
SIZE = 12
STEPS = 20
EXACT_TOL = 1e-9
ROUNDING = 1e-12  # of the second moment's trace


def second_moments(grads: Tensor) -> Iterator[Tensor]:
    """sum g g^T of the flattened groups after each step, [G, N, N]."""
    dense = torch.zeros(len(grads[0]), SIZE, SIZE, dtype=grads.dtype)
    for g in grads:
        flat = g.flatten(1).unsqueeze(-1)
        dense = dense + flat @ flat.mT
        yield dense


def sketch(driver: Driver) -> Tensor:
    return loewner.low_rank(driver.state["sketch_rows"].mT, driver.state["sketch_values"])


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("stream", STREAMS)
def test_sketch_is_below_and_with_its_escaped_mass_above_the_second_moment(
    stream: str, rank: int
) -> None:
    """U diag(s) U^T <= H <= U diag(s) U^T + rho I, every step."""
    grads = STREAMS[stream](STEPS, SHAPE)
    driver = Driver(FrequentDirections(rank=rank))
    for t, dense in enumerate(second_moments(grads), start=1):
        driver.step(grads[t - 1])
        rest = loewner.times_identity(driver.state["escaped_mass"], SIZE)
        loewner.assert_below(sketch(driver), dense, f"step {t}, sketch <= second moment")
        loewner.assert_below(dense, sketch(driver) + rest, f"step {t}, second moment <= bound")


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("stream", STREAMS)
def test_escaped_mass_is_bounded_by_the_lower_eigenvalues(stream: str, rank: int) -> None:
    """rho <= min_p sum_{j > p} sigma_j / (ell - p)."""
    grads = STREAMS[stream](STEPS, SHAPE)
    driver = Driver(FrequentDirections(rank=rank))
    for t, dense in enumerate(second_moments(grads), start=1):
        driver.step(grads[t - 1])
        mass, bound = driver.state["escaped_mass"], loewner.tail_bound(dense, rank)
        assert (mass <= bound + ROUNDING * loewner.trace(dense)).all(), f"step {t}"
    assert (driver.state["escaped_mass"] > 0).all()


def test_sketch_is_that_of_ghashami() -> None:
    """The new gradient takes the sketch's empty last row; its smallest singular value goes."""
    rank, grads = 3, gaussian(STEPS, (1, 3, 4))
    driver = Driver(FrequentDirections(rank=rank))
    rows, shed = torch.zeros(rank, SIZE, dtype=torch.float64), 0.0
    for t, g in enumerate(grads, start=1):
        driver.step(g)
        rows[-1] = g.flatten()
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        shed += float(values[-1] ** 2)
        rows = (values**2 - values[-1] ** 2).clamp(min=0).sqrt().unsqueeze(-1) * vectors
        if t >= rank:
            assert_near(sketch(driver)[0], rows.T @ rows, EXACT_TOL, f"step {t}")
        assert abs(driver.state["escaped_mass"].item() - shed) <= EXACT_TOL * (1 + shed)


def test_nothing_escapes_from_a_fixed_subspace() -> None:
    """Gradients of two dimensions in all, and a sketch of four: H itself."""
    inner, basis = random_matrices(STEPS, 2, 1, 2), random_matrices(2, 2, SIZE, seed=1)
    grads = (inner @ basis).view(STEPS, *SHAPE)
    driver = Driver(FrequentDirections(rank=4))
    for t, dense in enumerate(second_moments(grads), start=1):
        driver.step(grads[t - 1])
        assert_near(sketch(driver), dense, EXACT_TOL, f"step {t}")
        assert (driver.state["escaped_mass"] <= ROUNDING * loewner.trace(dense)).all(), f"step {t}"


@pytest.mark.parametrize("rank", [SIZE, 64], ids=["dimension", "more"])
@pytest.mark.parametrize("stream", ["low_rank", "gaussian", "heavy_tailed"])
def test_full_rank_ada_fd_is_full_matrix_adagrad(stream: str, rank: int) -> None:
    eps = 1e-2
    grads = STREAMS[stream](STEPS, SHAPE)
    sketched = directions(FrequentDirections(rank=rank, eps=eps), grads)
    assert_near(sketched, directions(FullMatrix(eps=eps), grads), EXACT_TOL)


def test_full_rank_ada_fd_takes_the_steps_of_full_matrix_adagrad() -> None:
    """The same by name, with momentum and decoupled decay around it."""
    grads, start = random_matrices(STEPS, 3, 4, seed=1), random_matrices(3, 4)
    momentum = {"momentum": "ema", "momentum_site": "gradient"}
    options = {"eps": 1e-2, "weight_decay": 0.1, **momentum}
    sketched = descend("ada_fd", start, replay(grads), STEPS, rank=SIZE, **options)
    whole = descend("full_matrix_adagrad", start, replay(grads), STEPS, root_interval=1, **options)
    assert_near(sketched, whole, EXACT_TOL)


def test_low_rank_ada_fd_is_not_full_matrix_adagrad() -> None:
    grads = gaussian(STEPS, SHAPE)
    sketched = directions(FrequentDirections(rank=3, eps=1e-2), grads)
    assert_apart(sketched, directions(FullMatrix(eps=1e-2), grads), 1e-2)


@pytest.mark.parametrize("rank", [SIZE, 64], ids=["dimension", "more"])
def test_full_rank_son_fd_is_the_inverse(rank: int) -> None:
    """d = (sum g g^T + eps I)^(-1) g, which Sherman and Morrison give step by step."""
    eps = 1e-2
    grads, start = random_matrices(STEPS, 3, 4, seed=1), torch.zeros(3, 4, dtype=torch.float64)
    weights = descend("son_fd", start, replay(grads), STEPS, lr=1.0, rank=rank, eps=eps)
    inverse = torch.eye(SIZE, dtype=torch.float64) / eps
    expected = torch.zeros(SIZE, dtype=torch.float64)
    for t, g in enumerate(grads.flatten(1)):
        solved = inverse @ g
        inverse = inverse - torch.outer(solved, solved) / (1 + g @ solved)
        expected = expected - inverse @ g
        assert_near(weights[t].flatten(), expected, EXACT_TOL, f"step {t + 1}")


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_direction_is_the_power_of_sketch_and_escaped_mass(power: float) -> None:
    """d = (U diag(s) U^T + (rho + eps) I)^(-p) g, dense."""
    eps, grads = 1e-3, low_rank(STEPS, SHAPE)
    driver = Driver(FrequentDirections(rank=3, power=power, eps=eps))
    for t, g in enumerate(grads, start=1):
        direction = driver.step(g)
        rest = loewner.times_identity(driver.state["escaped_mass"] + eps, SIZE)
        root = loewner.inverse_power(sketch(driver) + rest, power)
        assert_near(direction.flatten(1), (root @ g.flatten(1).unsqueeze(-1))[..., 0], EXACT_TOL)
        assert (direction * g).sum() > 0, f"step {t}: no descent"
