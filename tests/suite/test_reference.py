"""Law: an optimizer agrees with its dense float64 reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_precond import list_optimizers, option_specs
from hf_precond.optim.stages import GRAFTS
from hf_precond.views.view import ParamView, fused_rows, heads_in, rows
from tests.reference.table import REFERENCES, references
from tests.relatives import RELATIVES
from tests.streams import STREAMS
from tests.suite.building import assert_same, build, group, params_of

TOLERANCE = 1e-10
# Where a statistic's rank is low (few rows, zeros), or its spectrum spans many decades (spikes), a
# basis is completed by an iteration whose shift of 1e-8, or a root whose eps, magnifies rounding.
DEGENERATE_TOLERANCE = 1e-6
DEGENERATE_STREAMS = {"heavy_tailed", "rank_one", "with_zeros"}
# Those after an algorithm's first: as many as the longest interval of the options below, and two.
STEPS = 12

STAGE_SETS: dict[str, dict[str, Any]] = {
    **{f"graft_{kind}": {"graft": kind} for kind in GRAFTS},
    "graft_beta2_one": {"graft": "rmsprop", "graft_beta2": 1.0},
    "graft_beta2_short": {"graft": "adam_normalized", "graft_beta2": 0.7},
    "scope_view": {"graft": "adam", "graft_scope": "view"},
    "scope_group": {"graft": "adagrad", "graft_scope": "group"},
    "scope_group_normalized": {"graft": "rmsprop_normalized", "graft_scope": "group"},
    "heavy_ball": {"momentum": "heavy_ball"},
    "no_momentum": {"momentum": "none"},
    "nesterov": {"nesterov": True},
    "nesterov_heavy_ball_of_gradient": {
        "nesterov": True,
        "momentum": "heavy_ball",
        "momentum_site": "gradient",
    },
    "momentum_of_gradient": {"momentum_site": "gradient", "graft": "adam"},
    "momentum_of_gradient_normalized": {"momentum_site": "gradient"},
    "heavy_ball_of_gradient": {"momentum_site": "gradient", "momentum": "heavy_ball"},
    "start_later": {"start_step": 6},
    "start_later_without_graft": {"start_step": 6, "graft": "none"},
    "fallback_sgd": {"fallback": "sgd", "fallback_momentum": 0.8},
    "betas": {"betas": (0.5, 0.7)},
    "small_buckets": {"bucket_size": 1},
}
SCALES = (1e8, 1e-12)
# Stages are the same code around every algorithm: with these all of them at once, with the others
# some of them, and the rest with the slow tests.
EVERY_STAGE = ("shared_basis_adagrad", "two_sided_basis", "kfac")
SHARE_OF_STAGES = 6

REGULAR = {
    (3, 7): [rows((3, 7))],
    (5, 4): [rows((5, 4))],
    (4, 4): [rows((4, 4))],
    (6, 7): [rows((6, 7), groups=2)],
    (6, 5): list(fused_rows((6, 5), [("q", 4, 2), ("k", 2, 1)])),
    (3, 6): [heads_in((3, 6), heads=2)],
    (5,): [],
}
DEGENERATE = {(1, 7): [rows((1, 7))], (4, 1): [rows((4, 1))], (3, 6): [rows((3, 6), groups=3)]}


def _parameters(views: dict[Any, list[ParamView]]) -> dict[str, Any]:
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in views]
    return group(params, list(views.values()))


def _gradients(
    stream: str, params: list[Tensor], scale: float, num_steps: int
) -> list[list[Tensor]]:
    """One list of gradients per step."""
    per_param = [
        scale * STREAMS[stream](num_steps, (1, len(param), param[0].numel()), seed=seed)
        for seed, param in enumerate(params)
    ]
    return [
        [grads[step].view_as(param) for grads, param in zip(per_param, params, strict=True)]
        for step in range(num_steps)
    ]


def _tolerance(name: str, kind: str, general: float) -> float:
    return REFERENCES[name].tolerances.get(kind, general)


def check_agreement(
    name: str,
    stream: str = "low_rank",
    *,
    gradient_scale: float = 1.0,
    views: dict[Any, list[ParamView]] = REGULAR,
    tolerance: float = TOLERANCE,
    **options: Any,
) -> None:
    """Runs optimizer and references side by side and compares all weights after every step."""
    options = {"rank": 2, "update_interval": 1} | REFERENCES[name].paper | options
    optimizer = build(name, [_parameters(views)], lr=0.5, weight_decay=0.1, **options)
    expected = references(optimizer)
    params = params_of(optimizer)
    num_steps = STEPS + optimizer.recipe.stages.start_step - 1
    gradients = _gradients(stream, params, gradient_scale, num_steps)
    for step, grads in enumerate(gradients, start=1):
        for param, grad, reference in zip(params, grads, expected, strict=True):
            param.grad = grad
            reference.step(grad)
        optimizer.step()
        weights = [reference.weight for reference in expected]
        assert_same(params, weights, tolerance, f"{stream} step {step}")
    assert any(param.abs().sum() > 0 for param in params)


def pairs(labels: Iterable[Any]) -> list[Any]:
    """(name, label) for all optimizers, most of them slow."""
    return [
        pytest.param(
            name,
            label,
            marks=()
            if name in EVERY_STAGE or (number + index) % SHARE_OF_STAGES == 0
            else pytest.mark.slow,
        )
        for number, name in enumerate(list_optimizers())
        for index, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("name", "graft"),
    [
        *((name, "none") for name in list_optimizers()),
        *pairs(["rmsprop_normalized"]),
    ],
)
@pytest.mark.parametrize("stream", STREAMS)
def test_agrees_with_reference(name: str, stream: str, graft: str) -> None:
    degenerate = _tolerance(name, "degenerate", DEGENERATE_TOLERANCE)
    tolerance = degenerate if stream in DEGENERATE_STREAMS else TOLERANCE
    check_agreement(name, stream, tolerance=tolerance, graft=graft)


@pytest.mark.parametrize("stream", STREAMS)
def test_agrees_with_reference_on_few_rows_or_columns(name: str, stream: str) -> None:
    tolerance = _tolerance(name, "degenerate", DEGENERATE_TOLERANCE)
    check_agreement(name, stream, views=DEGENERATE, tolerance=tolerance, rank=3)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "graft"), pairs(["none", "adam", "rmsprop_normalized"]))
def test_agrees_with_reference_at_every_scale(name: str, scale: float, graft: str) -> None:
    check_agreement(
        name, gradient_scale=scale, graft=graft, tolerance=_tolerance(name, "scales", TOLERANCE)
    )


@pytest.mark.parametrize(("name", "label"), pairs(STAGE_SETS))
def test_agrees_with_reference_under_all_stages(name: str, label: str) -> None:
    check_agreement(name, **STAGE_SETS[label])


@pytest.mark.parametrize(
    ("row", "label"),
    [
        pytest.param(row, label, marks=pytest.mark.slow if row in RELATIVES and index % 3 else ())
        for row in REFERENCES
        for index, label in enumerate(REFERENCES[row].option_sets)
    ],
)
def test_agrees_with_reference_under_own_options(row: str, label: str) -> None:
    options = REFERENCES[row].option_sets[label]
    assert options.keys() <= option_specs(row).keys()
    # With an eps of 1e-8 a stale shared basis divides by what is mostly rounding.
    stale = {"graft": "none", "eps": 1e-3} if row.startswith("shared_basis") else {"graft": "none"}
    check_agreement(row, tolerance=_tolerance(row, label, TOLERANCE), **stale | options)


def test_every_optimizer_has_a_reference() -> None:
    assert set(REFERENCES) == set(list_optimizers())
