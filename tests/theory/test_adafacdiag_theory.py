"""The laws of AdafacDiag and AdafacDiag++, checked in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.adafacdiag import AdafacDiag
from tests.driving import (
    Driver,
    assert_near,
    descend,
    directions,
    follow,
    matrix,
    random_matrices,
    random_rotation,
    replay,
)
from tests.streams import gaussian

NAMES = ("adafacdiag", "adafacdiag_pp")
STEPS = 10
NEVER = 10**9
EXACT_TOL = 1e-10

Shape = tuple[int, int]


@pytest.mark.parametrize("rotated_momentum", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_memory(shape: Shape, rotated_momentum: bool) -> None:
    """m^2 + m + n numbers and n^2 more for ++; m n more with a first moment."""
    small, large = sorted(shape)
    expected = small**2 + small + large + rotated_momentum * small * large
    options = {"rotated_momentum": rotated_momentum}
    assert numbers(AdafacDiag(two_sided=False, **options), shape) == expected
    assert numbers(AdafacDiag(two_sided=True, **options), shape) == expected + large**2


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_identity_bases_are_adafactor(name: str, shape: Shape) -> None:
    """P = Q = I, no first moment: torch's Adafactor.

    With beta2 = 0, because torch's decay grows from 0 with the step and stays there only with
    ``beta2_decay=0``; with a second eps of one and small weights, because torch multiplies the
    learning rate by the larger of it and the weight's RMS.
    """
    lr, decay, grads = 1e-3, 0.1, random_matrices(STEPS, *shape, seed=1)
    start = 0.1 * random_matrices(*shape)
    options: dict[str, Any] = {"betas": (0.9, 0.0), "rotated_momentum": False}
    actual = descend(
        name,
        start,
        replay(grads),
        STEPS,
        lr=lr,
        weight_decay=decay,
        projection_interval=NEVER,
        **options,
    )
    adafactor = torch.optim.Adafactor(
        [matrix(start)], lr=lr, beta2_decay=0.0, eps=(1e-30, 1.0), d=1.0, weight_decay=decay
    )
    assert_near(actual, follow(adafactor, replay(grads), STEPS), EXACT_TOL)


@pytest.mark.parametrize("two_sided", [False, True])
def test_factors_are_exact_where_the_squares_are_a_product(two_sided: bool) -> None:
    """G^2 = r c^T at every step: V = (1 - beta2^t) G^2, and the clipped u has entries of +-1.

    In the bases P = Q = I; M is then the bias-corrected average of signs.
    """
    signs = random_matrices(STEPS, 1, 5, 8).sign()
    sizes = random_matrices(5, 1, seed=1).abs() * random_matrices(1, 8, seed=2).abs()
    algorithm = AdafacDiag(two_sided=two_sided, projection_interval=NEVER, beta1=0.0)
    assert_near(directions(algorithm, signs * sizes), signs, EXACT_TOL)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("two_sided", [False, True])
def test_root_mean_square_of_the_step_is_clipped(two_sided: bool, threshold: float) -> None:
    """Rotations keep it: RMS(d) <= clip_threshold for every group, first moment or not."""
    for rotated_momentum in (True, False):
        algorithm = AdafacDiag(
            two_sided=two_sided,
            projection_interval=3,
            clip_threshold=threshold,
            rotated_momentum=rotated_momentum,
        )
        found = directions(algorithm, gaussian(STEPS, (2, 5, 8))).square().mean((-2, -1)).sqrt()
        assert (found <= threshold * (1 + EXACT_TOL)).all()
        # Squares averaged from zero without a bias correction make the first u large.
        assert_near(found[0], torch.full((2,), threshold, dtype=torch.float64), EXACT_TOL)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
def test_one_sided_is_equivariant_under_rotations_of_the_smaller_side(shape: Shape) -> None:
    """From an SVD at step 1, with the first moment reprojected, over several refreshes."""
    algorithm = AdafacDiag(
        two_sided=False, projection_interval=3, first_svd="step1", reproject_moments=True
    )
    grads = gaussian(STEPS, (1, *shape))
    plain = directions(algorithm, grads)
    if shape[0] <= shape[1]:
        left = random_rotation(shape[0])
        other = left.T @ directions(algorithm, left @ grads)
    else:
        right = random_rotation(shape[1])
        other = directions(algorithm, grads @ right) @ right.T
    assert_near(other, plain, 1e-9)


@pytest.mark.parametrize("method", ["svd", "eigh", "qr"])
@pytest.mark.parametrize("fault", ["dead rows", "zero gradients"])
def test_directions_are_finite_whatever_the_gradients(fault: str, method: str) -> None:
    grads = gaussian(STEPS, (2, 5, 8))
    grads[(slice(None), slice(None), 2) if fault == "dead rows" else slice(0, None, 3)] = 0.0
    driver = Driver(AdafacDiag(two_sided=True, projection_interval=3, basis_method=method))
    for g in grads:
        assert driver.step(g).isfinite().all()
        for side in ("left", "right"):
            assert_near(gram(driver.state[side]), identity_like(driver.state[side]), 1e-12)


def gram(basis: Tensor) -> Tensor:
    return basis.mT @ basis


def identity_like(basis: Tensor) -> Tensor:
    return torch.eye(basis.shape[-1], dtype=basis.dtype).expand_as(basis)


def numbers(algorithm: AdafacDiag, shape: Shape) -> int:
    """Numbers of state for one matrix."""
    state = algorithm.init((1, *shape), dtype=torch.float64, device=torch.device("cpu"))
    return sum(tensor.numel() for tensor in state.values())
