"""Shampoo against ``pytorch_optimizer``'s ``Shampoo`` and ``ScalableShampoo``.

``Shampoo`` is the paper's: L = eps I + sum G G^T, roots every step. Ours is the same with
``accumulate="sum"``, an absolute ridge and ``inverse_interval=1``. Not compared: its momentum mixes
the last *direction* into the next gradient, and with ``preconditioning_compute_steps=k`` its roots
are zero before step k.

``ScalableShampoo`` is Google's. Differences, and what each test does about them:

- Average: the factors start from eps I, and their decay takes that ridge away, beta2^t eps at step
  t; ours is added under every root. A sum (decay one, written into the group because the
  constructor refuses it) has the same ridge at every step. With an average one step is compared:
  both take the graft's steps before it (``start_step``), ours with the ridge of that step.
- Roots by Newton (``use_svd=False``) have a relative ridge on top and stop at a residual of 1e-3,
  sometimes earlier: where a residual grows by a fifth in one iteration, which also happens on the
  way to convergence. Compared on matrices without that, to 1e-3, gradients large enough for the
  absolute ridge not to count.
- Momentum: ``moving_average_for_momentum`` has no bias correction, its alternative is our heavy
  ball on the direction. It gathers directions from step 1, ours what steps were taken: compared
  with ``start_preconditioning_step=1``.
- ``shape_interpretation`` merges small dimensions, and takes what becomes a vector not at all;
  ours (``merge_dims``) takes it whole: off.
- Intervals: theirs act at steps k, 2k, ..., ours at 1, 1 + k, ...: one.
"""

from __future__ import annotations

from typing import Any

import pytest
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

pytorch_optimizer = pytest.importorskip(
    "pytorch_optimizer", reason="compares with another library: pip install hf-precond[crosscheck]"
)

STEPS = 12
LR = 0.1
EPS = 1e-3
EXACT_TOL = 1e-11
CLOSED_LOOP_TOL = 1e-10  # gradients at weights that differ by rounding
NEWTON_TOL = 1e-3

SHAPES = [(5, 8), (8, 5), (5, 5)]
TILED = [((5, 8), 64), ((8, 5), 64), ((7, 10), 4), ((8, 4), 4)]  # (shape, block_size)
GRAFTS = {"none": "NONE", "sgd": "SGD", "adagrad": "ADAGRAD", "rmsprop": "RMSPROP"}
Shape = tuple[int, int]


def scalable(
    start: Tensor, *, beta1: float = 0.0, beta2: float = 1.0, graft: str = "none", **options: Any
) -> Any:
    """Google's Shampoo of one matrix with exact roots at every step; a decay of one sums."""
    kinds = pytorch_optimizer.optimizer.utils.graft.LayerWiseGrafting
    settings = {
        "start_preconditioning_step": 1,
        "preconditioning_compute_steps": 1,
        "shape_interpretation": False,
        "graft_type": getattr(kinds, GRAFTS[graft]),
        "matrix_eps": EPS,
        "use_svd": True,
        "nesterov": False,
        "decoupled_weight_decay": True,
        **options,
    }
    optimizer = pytorch_optimizer.ScalableShampoo([matrix(start)], lr=LR, **settings)
    optimizer.param_groups[0]["betas"] = (beta1, beta2)
    return optimizer


def ours(start: Tensor, gradient: Any, steps: int = STEPS, **options: Any) -> Tensor:
    settings = {"inverse_interval": 1, "eps_mode": "absolute", "eps": EPS, **options}
    return descend("shampoo", start, gradient, steps, lr=LR, **settings)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_shampoo_of_the_paper(shape: Shape, decay: float) -> None:
    start, problem = random_matrices(*shape), noisy_problem(*shape)
    theirs = pytorch_optimizer.Shampoo(
        [matrix(start)], lr=LR, matrix_eps=EPS, weight_decay=decay, weight_decouple=True
    )
    actual = ours(start, problem, accumulate="sum", weight_decay=decay)
    assert_near(actual, follow(theirs, problem, STEPS), CLOSED_LOOP_TOL)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "block_size"), TILED)
def test_sum_in_tiles(shape: Shape, block_size: int, decay: float) -> None:
    """The same tiles, remainders included."""
    start, problem = random_matrices(*shape), noisy_problem(*shape)
    options = {"block_size": block_size, "weight_decay": decay}
    expected = follow(scalable(start, **options), problem, STEPS)
    assert_near(ours(start, problem, accumulate="sum", **options), expected, CLOSED_LOOP_TOL)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("graft", ["none", "sgd", "adagrad"])
def test_graft_and_momentum_around_a_sum(graft: str, nesterov: bool) -> None:
    """Direction, graft over the whole matrix, heavy ball, decay. (A sum of RMSProp is empty.)"""
    shape = (7, 10)
    start, grads = random_matrices(*shape), random_matrices(STEPS, *shape, seed=1)
    common = {"block_size": 4, "nesterov": nesterov, "graft": graft, "weight_decay": 0.1}
    expected = follow(scalable(start, beta1=0.9, **common), replay(grads), STEPS)
    actual = ours(
        start,
        replay(grads),
        accumulate="sum",
        betas=(0.9, 0.99),
        momentum="heavy_ball",
        momentum_site="direction",
        **common,
    )
    assert_near(actual, expected, EXACT_TOL)


@pytest.mark.parametrize("last", [1, 3, 9])
@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize(("shape", "block_size"), TILED)
def test_average_at_one_step(shape: Shape, block_size: int, graft: str, last: int) -> None:
    """Steps of the graft up to ``last``, then one of factors whose ridge has decayed as long."""
    beta2 = 0.9
    start, grads = random_matrices(*shape), random_matrices(last, *shape, seed=1)
    common = {"block_size": block_size, "graft": graft}
    theirs = scalable(start, beta2=beta2, start_preconditioning_step=last, **common)
    expected = follow(theirs, replay(grads), last)
    actual = ours(
        start,
        replay(grads),
        last,
        betas=(0.9, beta2),
        eps=EPS * beta2**last,
        start_step=last,
        **common,
    )
    assert_near(actual, expected, EXACT_TOL)


def test_decaying_ridge_is_all_that_differs_in_a_trajectory_of_the_average() -> None:
    """The difference is in proportion to it."""
    start, grads = random_matrices(5, 8), random_matrices(STEPS, 5, 8, seed=1)

    def difference(eps: float) -> float:
        theirs = scalable(start, beta2=0.9, matrix_eps=eps)
        actual = ours(start, replay(grads), betas=(0.9, 0.9), eps=eps)
        expected = follow(theirs, replay(grads), STEPS)
        return (actual - expected).abs().max().item()

    shares = [difference(eps) / eps for eps in (1e-5, 1e-6, 1e-7)]
    assert max(shares) <= 1.1 * min(shares)


@pytest.mark.parametrize(
    ("shape", "side"), [((5, 8), "INPUT"), ((8, 5), "OUTPUT")], ids=["left", "right"]
)
def test_one_side(shape: Shape, side: str) -> None:
    """Their choice of a side, our dimension over ``max_dim``: (L + eps I)^(-1/2) G."""
    kinds = pytorch_optimizer.optimizer.utils.partition.PreConditionerType
    start, problem = random_matrices(*shape), noisy_problem(*shape)
    theirs = scalable(start, pre_conditioner_type=getattr(kinds, side))
    actual = ours(start, problem, accumulate="sum", max_dim=6, large_dim="one_sided")
    assert_near(actual, follow(theirs, problem, STEPS), CLOSED_LOOP_TOL)


@pytest.mark.parametrize("order", [2, 8])
def test_exponent(order: int) -> None:
    start, problem = random_matrices(5, 8), noisy_problem(5, 8)
    theirs = scalable(start, inverse_exponent_override=order)
    actual = ours(start, problem, accumulate="sum", exponent=1 / order)
    expected = follow(theirs, problem, STEPS)
    assert_near(actual, expected, CLOSED_LOOP_TOL)
    assert_apart(ours(start, problem, accumulate="sum"), expected, 1e-2)


@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_roots_by_newton(shape: Shape, eps: float, method: str) -> None:
    """The relative ridge; their iteration against our exact roots and our own iteration."""
    start, grads = random_matrices(*shape), 1e6 * random_matrices(STEPS, *shape, seed=1)
    theirs = scalable(start, beta2=0.9, use_svd=False, matrix_eps=eps)
    expected = follow(theirs, replay(grads), STEPS)
    options = {"eps_mode": "relative", "eps": eps, "root_method": method}
    assert_near(ours(start, replay(grads), betas=(0.9, 0.9), **options), expected, NEWTON_TOL)
