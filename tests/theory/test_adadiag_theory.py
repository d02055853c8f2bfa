"""The laws of AdaDiag and AdaDiag++, checked in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.adadiag import AdaDiag
from hf_precond.preconditioners.rotation import orient
from tests.driving import (
    Driver,
    assert_apart,
    assert_near,
    descend,
    follow,
    matrix,
    noisy_problem,
    random_matrices,
    random_rotation,
    turned,
)
from tests.streams import gaussian

NAMES = ("adadiag", "adadiag_pp")
STEPS = 12
NEVER = 10**9
EXACT_TOL = 1e-10
ROTATION_TOL = 1e-9
# In the bases of the very gradient the rotated one is diagonal. The rest is rounding, which eps
# (1e-8) makes harmless but not small beyond this.
OWN_BASES_TOL = 1e-6
# Orthogonal iteration tells null directions apart by a shift of 1e-8 of the trace.
ROUNDING_TOL = {"svd": 1e-9, "eigh": 1e-9, "qr": 1e-5}
ORTHONORMAL_TOL = {torch.float64: 1e-12, torch.float32: 1e-5}

Shape = tuple[int, int]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_identity_bases_are_adamw(name: str, shape: Shape, decay: float) -> None:
    """P = Q = I, because no basis is ever taken: torch's AdamW with its bias corrections."""
    start, lr, betas, eps = random_matrices(*shape), 0.1, (0.8, 0.97), 1e-3
    options = {"projection_interval": NEVER, "betas": betas, "eps": eps, "weight_decay": decay}
    actual = descend(name, start, noisy_problem(*shape), STEPS, lr=lr, **options)
    adamw = torch.optim.AdamW([matrix(start)], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    assert_near(actual, follow(adamw, noisy_problem(*shape), STEPS), EXACT_TOL)


@pytest.mark.parametrize("name", NAMES)
def test_bases_change_the_step(name: str) -> None:
    start, problem = random_matrices(5, 8), noisy_problem(5, 8)
    runs = [
        descend(name, start, problem, STEPS, projection_interval=interval)
        for interval in (4, NEVER)
    ]
    assert torch.equal(runs[0][:3], runs[1][:3])
    assert_apart(runs[0][3:], runs[1][3:], 1e-2)


@pytest.mark.parametrize("method", ["svd", "eigh"])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
def test_svd_at_every_step_makes_the_rotated_gradient_diagonal(shape: Shape, method: str) -> None:
    """P^T G Q = S for AdaDiag++, the singular values in order; for AdaDiag its rows orthogonal."""
    options = {"projection_interval": 1, "basis_method": method}
    both = Driver(AdaDiag(two_sided=True, **options))
    one = Driver(AdaDiag(two_sided=False, **options))
    for g in gaussian(STEPS, (2, *shape)):
        both.step(g)
        one.step(g)
        values = torch.linalg.svdvals(g)
        small, large = sorted(shape)
        diagonal = torch.zeros(2, small, large, dtype=g.dtype)
        diagonal[..., range(small), range(small)] = values
        assert_near(both.algorithm.rotate(both.state, orient(g)), diagonal, EXACT_TOL)
        rows = one.algorithm.rotate(one.state, orient(g))
        assert_near(rows @ rows.mT, torch.diag_embed(values**2), EXACT_TOL)


@pytest.mark.parametrize("shape", [(5, 8), (4, 4), (8, 5)])
@pytest.mark.parametrize(
    "options",
    [{"reproject_moments": True, "projection_interval": 3}, {"projection_interval": NEVER}],
    ids=["reprojected", "one_svd"],
)
def test_one_sided_is_equivariant_under_rotations_of_the_smaller_side(
    shape: Shape, options: dict[str, Any]
) -> None:
    """W -> U W (W -> W U where there are more rows): the trajectory turns along.

    From an SVD at step 1. The signs that make singular vectors unique turn differently, which the
    carried first moment notices at a second SVD: only reprojected it does not.
    """
    rotations = one_rotation(shape)
    plain, other = both_ways("adadiag", shape, rotations, first_svd="step1", **options)
    assert_near(other, plain, ROTATION_TOL)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_without_its_bases_the_law_fails(shape: Shape) -> None:
    """Adam prefers its coordinates: what is equivariant above is the method, not the problem."""
    plain, other = both_ways("adadiag", shape, one_rotation(shape), projection_interval=NEVER)
    assert_apart(other, plain, 1e-2)


def test_carried_moments_notice_a_second_svd() -> None:
    """The paper carries M as it is: equivariant up to the second SVD and not beyond."""
    settings = {"first_svd": "step1", "projection_interval": 6}
    plain, other = both_ways("adadiag", (5, 8), one_rotation((5, 8)), **settings)
    assert_near(other[:5], plain[:5], ROTATION_TOL)
    assert_apart(other[5:], plain[5:], 1e-3)


def test_two_sided_is_equivariant_under_both_rotations_up_to_the_next_refresh() -> None:
    """W -> U W Z of a square weight, from an SVD at step 1."""
    size, interval = 5, STEPS
    rotations = random_rotation(size, seed=1), random_rotation(size, seed=2)
    settings = {"first_svd": "step1", "projection_interval": interval}
    plain, other = both_ways("adadiag_pp", (size, size), rotations, **settings)
    assert_near(other[: interval - 1], plain[: interval - 1], OWN_BASES_TOL)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
@pytest.mark.parametrize("method", ["svd", "eigh", "qr"])
def test_reprojected_moments_do_not_depend_on_the_signs(
    method: str, shape: Shape, two_sided: bool
) -> None:
    """P, Q, M and P D, Q E, D M E are one state: every later direction is the same."""
    plain, flipped = sign_flipped_runs(shape, two_sided, method, reproject_moments=True)
    assert_near(flipped, plain, ROTATION_TOL)


@pytest.mark.parametrize("two_sided", [False, True])
def test_carried_moments_depend_on_the_signs(two_sided: bool) -> None:
    """Without reprojection the same two states part at the next refresh."""
    plain, flipped = sign_flipped_runs((5, 8), two_sided, "svd", reproject_moments=False)
    assert_near(flipped[:2], plain[:2], ROTATION_TOL)
    assert_apart(flipped[2:], plain[2:], 1e-2)


def stream_with(fault: str, shape: Shape) -> Tensor:
    """Gradients [T, 2, M, B] of which something is missing."""
    grads = gaussian(9, (2, *shape))
    if fault == "dead rows":
        grads[:, :, [0, 2]] = 0.0
    elif fault == "dead columns":
        grads[..., [0, 3]] = 0.0
    elif fault == "zero gradients":
        grads[[0, 3, 5, 8]] = 0.0  # the first, and three that bases are taken from
    elif fault == "rank one":
        grads = grads[..., :1] * grads[:, :, :1]
    return grads


@pytest.mark.parametrize("dtype", ORTHONORMAL_TOL)
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("method", ["svd", "eigh", "qr"])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
@pytest.mark.parametrize("fault", ["dead rows", "dead columns", "zero gradients", "rank one"])
def test_bases_are_orthonormal_whatever_the_gradients(
    fault: str, shape: Shape, method: str, two_sided: bool, dtype: torch.dtype
) -> None:
    algorithm = AdaDiag(
        two_sided=two_sided, projection_interval=3, first_svd="step1", basis_method=method
    )
    driver = Driver(algorithm)
    for t, g in enumerate(stream_with(fault, shape).to(dtype), start=1):
        assert driver.step(g).isfinite().all()
        for side in ("left", "right")[: 1 + two_sided]:
            basis = driver.state[side]
            excess = basis.mT @ basis - torch.eye(basis.shape[-1], dtype=dtype)
            assert excess.abs().max() <= ORTHONORMAL_TOL[dtype], f"{side} at step {t}"


def uneven_stream(fault: str, shape: Shape) -> Tensor:
    """Full gradients, but those that bases are taken from (steps 1, 4, 7) have null directions."""
    grads = gaussian(9, (2, *shape))
    grads[::3] = stream_with(fault, shape)[::3]
    return grads


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("method", ROUNDING_TOL)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
@pytest.mark.parametrize("fault", ["dead rows", "dead columns", "rank one"])
def test_null_directions_are_not_left_to_rounding(
    fault: str, shape: Shape, method: str, two_sided: bool
) -> None:
    """Other last bits of the gradients change the last digits of the steps, not a basis."""
    algorithm = AdaDiag(
        two_sided=two_sided,
        projection_interval=3,
        first_svd="step1",
        basis_method=method,
        eps=1e-3,
    )
    grads = uneven_stream(fault, shape)
    last_bits = 1 + 1e-15 * gaussian(9, (2, *shape), seed=5)
    runs = []
    for stream in (grads, last_bits * grads):
        driver = Driver(algorithm)
        runs.append(torch.stack([driver.step(g) for g in stream]))
    assert_near(*runs, ROUNDING_TOL[method])


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("method", ["svd", "eigh", "qr"])
def test_a_zero_gradient_keeps_the_bases(method: str, two_sided: bool) -> None:
    algorithm = AdaDiag(two_sided=two_sided, projection_interval=2, basis_method=method)
    driver = Driver(algorithm)
    grads = gaussian(4, (2, 5, 8))
    for g in grads[:3]:
        driver.step(g)
    before = {
        side: driver.state[side].clone() for side in ("left", "right") if side in driver.state
    }
    driver.step(torch.zeros_like(grads[3]))
    for side, basis in before.items():
        assert_near(driver.state[side], basis, ORTHONORMAL_TOL[torch.float64], side)
        eye = torch.eye(basis.shape[-1], dtype=basis.dtype).expand_as(basis)
        assert_apart(basis, eye, 0.1, side)


@pytest.mark.parametrize(("shape", "small", "large"), [((5, 8), 5, 8), ((8, 5), 5, 8)])
def test_memory(shape: Shape, small: int, large: int) -> None:
    """m^2 + 2 m n numbers for AdaDiag, m^2 + n^2 + 2 m n for AdaDiag++."""
    one_sided = small**2 + 2 * small * large
    assert numbers(AdaDiag(two_sided=False), shape) == one_sided
    assert numbers(AdaDiag(two_sided=True), shape) == one_sided + large**2


def numbers(algorithm: Any, shape: Shape) -> int:
    """Numbers of state for one matrix."""
    state = algorithm.init((1, *shape), dtype=torch.float64, device=torch.device("cpu"))
    return sum(tensor.numel() for tensor in state.values())


def one_rotation(shape: Shape) -> tuple[Tensor, Tensor]:
    """A rotation of the smaller side, rows where both are equal, and the identity."""
    rows, columns = shape
    if rows <= columns:
        return random_rotation(rows), torch.eye(columns, dtype=torch.float64)
    return torch.eye(rows, dtype=torch.float64), random_rotation(columns)


def both_ways(
    name: str, shape: Shape, rotations: tuple[Tensor, Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """A trajectory, and that of the turned problem turned back."""
    left, right = rotations
    problem, start = noisy_problem(*shape), random_matrices(*shape)
    plain = descend(name, start, problem, STEPS, **options)
    other = descend(name, left @ start @ right, turned(problem, left, right), STEPS, **options)
    return plain, left.T @ other @ right.T


def sign_flipped_runs(
    shape: Shape, two_sided: bool, method: str, *, reproject_moments: bool
) -> tuple[Tensor, Tensor]:
    """Directions of steps 5 to 11, the signs of one run's bases flipped after step 4.

    Bases are taken at steps 1 and 7: two of these directions come before the second ones.
    """
    algorithm = AdaDiag(
        two_sided=two_sided,
        projection_interval=7,
        first_svd="step1",
        basis_method=method,
        reproject_moments=reproject_moments,
    )
    grads = gaussian(11, (2, *shape))
    runs = []
    for flip in (False, True):
        driver = Driver(algorithm)
        for g in grads[:4]:
            driver.step(g)
        if flip:
            flip_signs(driver.state)
        runs.append(torch.stack([driver.step(g) for g in grads[4:]]))
    return runs[0], runs[1]


def flip_signs(state: dict[str, Tensor]) -> None:
    """P <- P D, Q <- Q E and M <- D M E, in place."""
    moment = state["exp_avg"]
    for side, dim in (("left", -2), ("right", -1)):
        if side in state:
            signs = torch.ones(state[side].shape[-1], dtype=moment.dtype)
            signs[::2] = -1
            state[side].mul_(signs)
            moment.mul_(signs.unsqueeze(-1) if dim == -2 else signs)
