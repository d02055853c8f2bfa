"""The laws of SOAP, checked in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.soap import Soap
from tests.driving import (
    Driver,
    assert_apart,
    assert_near,
    descend,
    directions,
    follow,
    matrix,
    noisy_problem,
    random_matrices,
    random_rotation,
    replay,
    turned,
)
from tests.streams import gaussian

STEPS = 12
BETAS = (0.8, 0.97)
EXACT_TOL = 1e-10
# One step of orthogonal iteration and a nearly singular first factor magnify rounding.
ROTATION_TOL = 1e-8
ORTHONORMAL_TOL = {torch.float64: 1e-12, torch.float32: 1e-5}

Shape = tuple[int, int]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
def test_with_no_side_rotated_it_is_adam_one_gradient_late(shape: Shape, decay: float) -> None:
    """The first gradient makes the bases only: step t is AdamW's step t - 1 on G_2, ..., G_t.

    Decoupled decay is the shell's and does not wait: the first step shrinks the weight.
    """
    lr, eps = 0.1, 1e-3
    grads, start = random_matrices(STEPS, *shape, seed=1), random_matrices(*shape)
    options = {"max_dim": 1, "betas": BETAS, "eps": eps, "weight_decay": decay}
    actual = descend("soap", start, replay(grads), STEPS, lr=lr, **options)
    shrunk = (1 - lr * decay) * start
    adamw = torch.optim.AdamW([matrix(shrunk)], lr=lr, betas=BETAS, eps=eps, weight_decay=decay)
    later = follow(adamw, replay(grads[1:]), STEPS - 1)
    assert_near(actual, torch.cat([shrunk.unsqueeze(0), later]), EXACT_TOL)


def test_rotations_change_the_step() -> None:
    grads = gaussian(STEPS, (1, 5, 8))
    assert_apart(directions(Soap(), grads), directions(Soap(max_dim=1), grads), 1e-2)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_a_side_over_max_dim_keeps_its_coordinates(shape: Shape) -> None:
    """One-sided: the basis that is left has the size of the smaller side."""
    driver = Driver(Soap(max_dim=5))
    driver.step(gaussian(1, (1, *shape))[0])
    bases = {name: tensor.shape[-1] for name, tensor in driver.state.items() if "basis" in name}
    assert bases == {"left_basis" if shape[0] == 5 else "right_basis": 5}


@pytest.mark.parametrize("method", ["qr", "eigh"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [((5, 5), {}), ((5, 8), {"max_dim": 5}), ((8, 5), {"max_dim": 5})],
    ids=["both_sides", "left", "right"],
)
def test_equivariant_under_rotations_of_the_rotated_sides(
    shape: Shape, options: dict[str, Any], method: str
) -> None:
    """W -> U W Z from the start: nothing happens in the first coordinates.

    Where a first factor has null directions they are completed from the coordinates, so the law is
    one of square weights and of the smaller side.
    """
    left, right = (
        random_rotation(size, seed=size) if size == 5 else torch.eye(size, dtype=torch.float64)
        for size in shape
    )
    problem, start = noisy_problem(*shape), random_matrices(*shape)
    settings = {"basis_interval": 2, "basis_method": method, "betas": BETAS, **options}
    plain = descend("soap", start, problem, STEPS, **settings)
    begin = left @ start @ right
    other = descend("soap", begin, turned(problem, left, right), STEPS, **settings)
    assert_near(left.T @ other @ right.T, plain, ROTATION_TOL)


def test_without_its_bases_the_law_fails() -> None:
    left, right = random_rotation(5, seed=1), random_rotation(5, seed=2)
    problem, start = noisy_problem(5, 5), random_matrices(5, 5)
    plain = descend("soap", start, problem, STEPS, max_dim=1)
    begin = left @ start @ right
    other = descend("soap", begin, turned(problem, left, right), STEPS, max_dim=1)
    assert_apart(left.T @ other @ right.T, plain, 1e-2)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
def test_transposed_weight_takes_the_transposed_step(shape: Shape) -> None:
    grads = gaussian(STEPS, (1, *shape))
    algorithm = Soap(basis_interval=2)
    assert_near(directions(algorithm, grads.mT).mT, directions(algorithm, grads), ROTATION_TOL)


@pytest.mark.parametrize("scale", [1e-6, 1e8])
def test_step_does_not_depend_on_the_gradients_scale(scale: float) -> None:
    """As Adam's, where eps does not count."""
    grads = gaussian(STEPS, (1, 5, 5))
    algorithm = Soap(basis_interval=2, eps=1e-30)
    assert_near(directions(algorithm, scale * grads), directions(algorithm, grads), ROTATION_TOL)


def test_eigenbases_diagonalise_the_factors_before_the_gradient() -> None:
    """Q_L^T L Q_L is diagonal, descending, for the factors of the steps before."""
    driver = Driver(Soap(basis_interval=1, basis_method="eigh"))
    grads = gaussian(STEPS, (2, 5, 8))
    driver.step(grads[0])
    for g in grads[1:]:
        factors = {side: driver.state[side].clone() for side in ("left", "right")}
        driver.step(g)
        for side, factor in factors.items():
            basis = driver.state[f"{side}_basis"]
            values = torch.linalg.eigvalsh(factor).flip(-1)
            assert_near(basis.mT @ factor @ basis, torch.diag_embed(values), EXACT_TOL, side)


def test_turning_the_moment_along_keeps_it_where_it_was() -> None:
    """Q_L M Q_R^T is the average of the gradients, whatever the bases did in between."""
    driver = Driver(Soap(basis_interval=1, beta1=BETAS[0]))
    grads = gaussian(STEPS, (2, 5, 8))
    average = torch.zeros_like(grads[0])
    driver.step(grads[0])
    for g in grads[1:]:
        driver.step(g)
        average = torch.lerp(average, g, 1 - BETAS[0])
        left, right = driver.state["left_basis"], driver.state["right_basis"]
        assert_near(left @ driver.state["exp_avg"] @ right.mT, average, EXACT_TOL)


@pytest.mark.parametrize("dtype", ORTHONORMAL_TOL)
@pytest.mark.parametrize("method", ["qr", "eigh"])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
@pytest.mark.parametrize("fault", ["dead rows", "zero gradients", "zero first", "rank one"])
def test_bases_are_orthonormal_whatever_the_gradients(
    fault: str, shape: Shape, method: str, dtype: torch.dtype
) -> None:
    driver = Driver(Soap(basis_interval=2, basis_method=method))
    for t, g in enumerate(stream_with(fault, shape).to(dtype), start=1):
        assert driver.step(g).isfinite().all()
        for side in ("left_basis", "right_basis"):
            basis = driver.state[side]
            excess = basis.mT @ basis - torch.eye(basis.shape[-1], dtype=dtype)
            assert excess.abs().max() <= ORTHONORMAL_TOL[dtype], f"{side} at step {t}"


@pytest.mark.parametrize("method", ["qr", "eigh"])
def test_null_directions_are_not_left_to_rounding(method: str) -> None:
    """A first gradient with dead rows, or of rank one, and then full ones."""
    for fault in ("dead rows", "rank one"):
        grads = gaussian(9, (2, 5, 8))
        grads[0] = stream_with(fault, (5, 8))[0]
        last_bits = 1 + 1e-15 * gaussian(9, (2, 5, 8), seed=5)
        algorithm = Soap(basis_interval=2, basis_method=method, eps=1e-3)
        runs = [directions(algorithm, stream) for stream in (grads, last_bits * grads)]
        assert_near(*runs, EXACT_TOL, fault)


def stream_with(fault: str, shape: Shape) -> Tensor:
    """Gradients [T, 2, M, B] of which something is missing."""
    grads = gaussian(9, (2, *shape))
    if fault == "dead rows":
        grads[:, :, [0, 2]] = 0.0
    elif fault == "zero gradients":
        grads[2::2] = 0.0
    elif fault == "zero first":
        grads[:3] = 0.0
    elif fault == "rank one":
        grads = grads[..., :1] * grads[:, :, :1]
    return grads
