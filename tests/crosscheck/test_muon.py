"""Muon against ``torch.optim.Muon`` and ``pytorch_optimizer``'s ``Muon``.

Both follow Jordan's program, and ours does with ``adjust_lr_fn`` and the momentum matched. Our
first moment is an average with a bias correction, theirs without: one matrix up to its scale, which
the iteration does not see. Differences, and what each test does about them:

- Precision: they iterate in bfloat16, whatever the weight. Either the iteration is made to run in
  the weight's own float64, by replacing the cast alone, and everything agrees to rounding; or ours
  runs in bfloat16 too, and 8 bits through fifteen products leave two percent of the step.
- They cast first and take the norm then, ours the other way round: other last bits in bfloat16.
- Norms below 1e-7 are taken as 1e-7; ours below 1e-20 (``eps``).
- The names of the two factors of the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond import create_optimizer
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

STEPS = 8
LR = 0.1
BETA1 = 0.9
EPS = 1e-7
EXACT_TOL = 1e-11
CLOSED_LOOP_TOL = 1e-10  # gradients at weights that differ by rounding
BFLOAT16_TOL = 0.06  # of a step, in the Frobenius norm
BFLOAT16_COSINE = 0.998

FACTORS = ("original", "match_rms_adamw")
SHAPES = [(5, 8), (8, 5), (6, 6), (24, 40)]
Shape = tuple[int, ...]


def torch_muon(start: Tensor, *, factor: str, lr: float = LR, **options: Any) -> Any:
    """PyTorch's optimizer of one matrix."""
    settings = {"momentum": BETA1, "weight_decay": 0.0, "eps": EPS, **options}
    return torch.optim.Muon([matrix(start)], lr=lr, adjust_lr_fn=factor, **settings)


def library_muon(start: Tensor, *, factor: str, lr: float = LR, **options: Any) -> Any:
    """The library's optimizer of one matrix; it takes the eps as it is."""
    group = {"params": [matrix(start)], "use_muon": True, "lr": lr}
    settings = {"momentum": BETA1, "use_adjusted_lr": factor == "match_rms_adamw", **options}
    if "ns_coefficients" in settings:
        settings["ns_coeffs"] = settings.pop("ns_coefficients")
    return pytorch_optimizer.Muon([{**group, **settings}])


OTHERS: dict[str, Callable[..., Any]] = {"library": library_muon}
if hasattr(torch.optim, "Muon"):
    OTHERS["torch"] = torch_muon


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets both iterate in the precision of the weight."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    base = pytorch_optimizer.optimizer.muon.base
    iterate = partial(base.zero_power_via_newton_schulz_5, dtype=torch.float64)
    monkeypatch.setattr(base, "zero_power_via_newton_schulz_5", iterate)


def ours(start: Tensor, gradient: Any, *, factor: str, **options: Any) -> Tensor:
    settings = {
        "adjust_lr_fn": factor,
        "betas": (BETA1, 0.999),
        "momentum": "ema",
        "momentum_site": "gradient",
        "nesterov": True,
        "eps": EPS,
        **options,
    }
    return descend("muon", start, gradient, STEPS, lr=LR, **settings)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", OTHERS)
def test_same_steps_in_one_precision(
    other: str, shape: Shape, factor: str, nesterov: bool, decay: float
) -> None:
    """Momentum, look-ahead, iteration, factor and decoupled decay."""
    start, problem = random_matrices(*shape), noisy_problem(*shape)
    options = {"factor": factor, "nesterov": nesterov, "weight_decay": decay}
    expected = follow(OTHERS[other](start, **options), problem, STEPS)
    assert_near(ours(start, problem, **options), expected, CLOSED_LOOP_TOL)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("options", [{"ns_steps": 2}, {"ns_coefficients": (1.5, -0.5, 0.0)}])
@pytest.mark.parametrize("other", OTHERS)
def test_same_iteration_with_other_steps_and_coefficients(
    other: str, options: dict[str, Any]
) -> None:
    start, grads = random_matrices(5, 8), random_matrices(STEPS, 5, 8, seed=1)
    expected = follow(OTHERS[other](start, factor="original", **options), replay(grads), STEPS)
    assert_near(ours(start, replay(grads), factor="original", **options), expected, EXACT_TOL)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("factor", FACTORS)
def test_a_kernel_is_one_matrix_of_its_output_channels(factor: str) -> None:
    """The library's reading of a convolution is ours; PyTorch refuses it."""
    shape = (6, 2, 3, 3)
    start, grads = random_matrices(*shape), random_matrices(STEPS, *shape, seed=1)
    expected = follow(library_muon(start, factor=factor), replay(grads), STEPS)
    assert_near(ours(start, replay(grads), factor=factor), expected, EXACT_TOL)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("other", OTHERS)
def test_tiny_gradients_shrink_the_step_with_their_eps_only(other: str) -> None:
    """Theirs divides by 1e-7 at least; the heavy ball is their average over 1 - beta1."""
    start = torch.zeros(5, 8, dtype=torch.float64)
    grads = 1e-11 * random_matrices(STEPS, 5, 8, seed=1)
    expected = follow(OTHERS[other](start, factor="original"), replay(grads), STEPS)
    matched = {"momentum": "heavy_ball", "eps": EPS / (1 - BETA1)}
    assert_near(ours(start, replay(grads), factor="original", **matched), expected, EXACT_TOL)
    free = ours(start, replay(grads), factor="original", eps=1e-20)
    assert_apart(free, expected, 1.0)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", OTHERS)
def test_same_steps_in_bfloat16(other: str, shape: Shape, factor: str) -> None:
    """As they are: every step, to what bfloat16 leaves of it."""
    grads = random_matrices(STEPS, *shape, seed=1)
    expected = steps_of(in_bfloat16(OTHERS[other](torch.zeros(shape), factor=factor), grads))
    actual = steps_of(in_bfloat16(our_muon(torch.zeros(shape), factor), grads))
    errors = relative_errors(actual, expected)
    assert (errors <= BFLOAT16_TOL).all(), f"{errors.max():.3f}"
    cosines = F.cosine_similarity(actual.flatten(1), expected.flatten(1))
    assert (cosines >= BFLOAT16_COSINE).all(), f"{cosines.min():.5f}"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("other", OTHERS)
def test_bfloat16_is_as_near_to_float64_as_theirs(other: str, shape: Shape) -> None:
    """On average over the steps: no rounding that could be left out."""
    grads = random_matrices(STEPS, *shape, seed=1)
    start = torch.zeros(shape)
    exact = steps_of(ours(start.double(), replay(grads), factor="original"))
    theirs = steps_of(in_bfloat16(OTHERS[other](start, factor="original"), grads))
    own = steps_of(in_bfloat16(our_muon(start, "original"), grads))
    assert relative_errors(own, exact).mean() <= 1.3 * relative_errors(theirs, exact).mean()


def our_muon(start: Tensor, factor: str) -> torch.optim.Optimizer:
    """Ours with the iteration in bfloat16 and everything around it in float32."""
    options = {"ns_dtype": "bfloat16", "adjust_lr_fn": factor, "betas": (BETA1, 0.999), "eps": EPS}
    return create_optimizer([matrix(start)], "muon", lr=LR, **options)


def in_bfloat16(optimizer: torch.optim.Optimizer, grads: Tensor) -> Tensor:
    """Weights in float32 that are moved by what was iterated in bfloat16."""
    return follow(optimizer, replay(grads.float()), STEPS)


def relative_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Of every step, in the Frobenius norm."""
    return (actual - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))


def steps_of(weights: Tensor) -> Tensor:
    """What every step changed, from zero, in float64."""
    return torch.diff(weights.double(), dim=0, prepend=torch.zeros_like(weights[:1]).double())
