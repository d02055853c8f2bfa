"""Matrices that an algorithm does not take, or takes in tiles: whose step they follow, and how the
optimizer tells.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_precond import PreconditionedOptimizer
from hf_precond.explain import explain_groups, format_table
from hf_precond.optim.flat_state import flat_state, load_flat_state
from hf_precond.views.view import fused_rows, heads_in, rows
from tests.suite.building import (
    assert_bit_equal,
    assert_same,
    build,
    group,
    parameter,
    params_of,
    random_grads,
    run,
    state_tensors,
)

TOLERANCE = 1e-11
STEPS = range(1, 9)
LARGE, SMALL, VECTOR = (9, 4), (5, 6), (5,)
NEVER: dict[str, Any] = {"max_dim": 100, "block_size": 100, "start_step": 10**6}
# Less than LARGE's rows, more than SMALL's dimensions.
SHAMPOO: dict[str, Any] = {
    "max_dim": 8,
    "block_size": 8,
    "start_step": 3,
    "update_interval": 1,
    "inverse_interval": 2,
}
# 36 elements are too many, 30 are not.
FULL: dict[str, Any] = {"max_elements": 30, "root_interval": 2}
GRAFTS = ("none", "sgd", "adam", "adagrad", "rmsprop_normalized")


def named(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    """Parameters ``p0``, ``p1``, ... of the shapes."""
    return [(f"p{index}", parameter(*shape, seed=index)) for index, shape in enumerate(shapes)]


def shampoo(params: Any, **options: Any) -> PreconditionedOptimizer:
    return build("shampoo", params, weight_decay=0.1, **{**SHAMPOO, **options})


def full_matrix(params: Any, **options: Any) -> PreconditionedOptimizer:
    return build("full_matrix_adagrad", params, weight_decay=0.1, **{**FULL, **options})


def run_with(
    optimizer: torch.optim.Optimizer, grads: dict[int, list[Tensor]], *which: int
) -> list[Tensor]:
    """Takes all steps with some of the gradients."""
    return run(optimizer, STEPS, lambda _, step: [grads[step][index] for index in which])


def gradients(*shapes: tuple[int, ...]) -> dict[int, list[Tensor]]:
    """One list of gradients per step."""
    params = [parameter(*shape) for shape in shapes]
    return {step: random_grads(params, step) for step in STEPS}


def keys_of(optimizer: PreconditionedOptimizer, index: int) -> set[str]:
    """The state keys of one parameter."""
    return set(optimizer.state[params_of(optimizer)[index]])


# --- a large matrix in Shampoo --------------------------------------------------------------------


@pytest.mark.parametrize("graft", [graft for graft in GRAFTS if graft != "none"])
@pytest.mark.parametrize("site", ["direction", "gradient"])
def test_a_large_matrix_takes_the_graft_partners_step(graft: str, site: str) -> None:
    """Bit for bit, as if preconditioning never began; others notice nothing."""
    options = {"graft": graft, "momentum_site": site}
    grads = gradients(LARGE, SMALL, VECTOR)
    together = shampoo([parameter(*LARGE), parameter(*SMALL), parameter(*VECTOR)], **options)
    partner = shampoo([parameter(*LARGE)], **NEVER, **options)
    others = shampoo([parameter(*SMALL), parameter(*VECTOR)], **options)
    found = run_with(together, grads, 0, 1, 2)
    assert_bit_equal(found[:1], run_with(partner, grads, 0), "large")
    assert_bit_equal(found[1:], run_with(others, grads, 1, 2), "others")


@pytest.mark.parametrize("site", ["direction", "gradient"])
def test_without_a_partner_it_takes_the_momentum(site: str) -> None:
    grads = gradients(LARGE)
    options = {"graft": "none", "momentum": "heavy_ball", "momentum_site": site, "start_step": 1}
    optimizer = shampoo([parameter(*LARGE)], **options)
    lr = optimizer.param_groups[0]["lr"]
    sgd = torch.optim.SGD([parameter(*LARGE)], lr=lr, momentum=0.9)
    decay = optimizer.param_groups[0]["weight_decay"]
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert decay > 0  # of the shell, not of torch's SGD
    assert_same(run_with(optimizer, grads, 0), run_with(sgd, grads, 0), TOLERANCE)


def test_grafted_to_adam_without_momentum_it_is_torchs() -> None:
    grads = gradients(LARGE)
    options = {"graft": "adam", "momentum": "none", "betas": (0.9, 0.95)}
    optimizer = shampoo([parameter(*LARGE)], **options)
    adam = torch.optim.AdamW(
        [parameter(*LARGE)],
        lr=optimizer.param_groups[0]["lr"],
        betas=(0.0, 0.95),
        eps=1e-10,
        weight_decay=0.1,
    )
    assert_same(run_with(optimizer, grads, 0), run_with(adam, grads, 0), TOLERANCE)


def test_its_state_is_the_partners_alone() -> None:
    optimizer = shampoo([parameter(*LARGE), parameter(*SMALL)], graft="adam")
    run(optimizer, [1])
    assert keys_of(optimizer, 0) == {"step", "exp_avg", "graft_sq"}
    assert keys_of(optimizer, 1) >= {"left", "right", "left_root", "right_root"}


def test_either_side_may_be_the_large_one() -> None:
    optimizer = shampoo([parameter(9, 4), parameter(4, 9), parameter(9, 9), parameter(8, 8)])
    run(optimizer, [1])
    assert ["left" in keys_of(optimizer, index) for index in range(4)] == [
        False,
        False,
        False,
        True,
    ]


# --- the other side of a large matrix -------------------------------------------------------------


def inverse_square_root(factor: Tensor) -> Tensor:
    """With Shampoo's ridge, relative to the largest eigenvalue."""
    values, vectors = torch.linalg.eigh(factor)
    return (vectors * (values.clamp(min=0) + 1e-6 * values[-1]) ** -0.5) @ vectors.T


def one_sided_steps(grads: Sequence[Tensor], beta2: float, lr: float) -> Tensor:
    """The weight after G R^(-1/2) of all gradients, R the mean of G^T G, from zero."""
    factor = torch.zeros(grads[0].shape[1], grads[0].shape[1], dtype=torch.float64)
    weight = torch.zeros_like(grads[0])
    for g in grads:
        factor = beta2 * factor + (1 - beta2) * g.T @ g
        weight = weight - lr * g @ inverse_square_root(factor)
    return weight


@pytest.mark.parametrize("block_size", [8, 4, 3, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_sided(block_size: int, transposed: bool) -> None:
    """Tiles of the small side, each with all of the large one."""
    grads = [g for (g,) in gradients(LARGE).values()]
    param = nn.Parameter(torch.zeros(LARGE[::-1] if transposed else LARGE, dtype=torch.float64))
    options = {"momentum": "none", "graft": "none", "start_step": 1, "inverse_interval": 1}
    optimizer = build(
        "shampoo",
        [param],
        large_dim="one_sided",
        betas=(0.9, 0.8),
        **{**SHAMPOO, **options, "block_size": block_size},
    )
    run(optimizer, STEPS, lambda _, step: [grads[step - 1].T if transposed else grads[step - 1]])
    lr = optimizer.param_groups[0]["lr"]
    pieces = [
        one_sided_steps([g[:, start : start + block_size] for g in grads], 0.8, lr)
        for start in range(0, 4, block_size)
    ]
    found = param.detach().T if transposed else param.detach()
    assert_same([found], [torch.cat(pieces, 1)], 1e-8)


def test_one_sided_state_is_that_of_the_small_side() -> None:
    optimizer = shampoo([parameter(9, 4), parameter(4, 9)], large_dim="one_sided", graft="none")
    run(optimizer, [1])
    assert keys_of(optimizer, 0) == {"step", "exp_avg", "right", "right_root"}
    assert keys_of(optimizer, 1) == {"step", "exp_avg", "left", "left_root"}


def test_without_a_small_side_there_is_only_the_graft_step() -> None:
    grads = gradients((9, 9))
    optimizer = shampoo([parameter(9, 9)], large_dim="one_sided", graft="adam")
    partner = shampoo([parameter(9, 9)], **NEVER, graft="adam")
    assert_bit_equal(run_with(optimizer, grads, 0), run_with(partner, grads, 0))


# --- a large group in full-matrix Adagrad ---------------------------------------------------------


def test_a_large_group_follows_torchs_adamw() -> None:
    grads = gradients(LARGE)
    options = {"betas": (0.8, 0.95), "fallback_eps": 1e-6}
    optimizer = full_matrix([parameter(*LARGE)], **options)
    lr = optimizer.param_groups[0]["lr"]
    adamw = torch.optim.AdamW(
        [parameter(*LARGE)], lr=lr, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1
    )
    assert_same(run_with(optimizer, grads, 0), run_with(adamw, grads, 0), TOLERANCE)


@pytest.mark.parametrize("fallback", ["adam", "sgd"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_a_large_group_follows_the_fallback(fallback: str, ratio: float) -> None:
    """Bit for bit as a parameter without a view; others notice nothing."""
    options = {"fallback": fallback, "fallback_lr_ratio": ratio}
    grads = gradients(LARGE, SMALL, VECTOR)
    together = full_matrix([parameter(*LARGE), parameter(*SMALL), parameter(*VECTOR)], **options)
    without_view = full_matrix([group([parameter(*LARGE)], [[]])], **options)
    others = full_matrix([parameter(*SMALL), parameter(*VECTOR)], **options)
    found = run_with(together, grads, 0, 1, 2)
    assert_bit_equal(found[:1], run_with(without_view, grads, 0), "large")
    assert_bit_equal(found[1:], run_with(others, grads, 1, 2), "others")
    assert keys_of(together, 0) == keys_of(without_view, 0)


def test_the_limit_counts_the_weights_of_one_group() -> None:
    """Two heads of 18 weights are small, one matrix of 36 is not."""
    heads = heads_in(LARGE, heads=2)
    optimizer = full_matrix(
        [group([parameter(*LARGE), parameter(*LARGE)], [[heads], [rows(LARGE)]])]
    )
    run(optimizer, [1])
    assert "root" in keys_of(optimizer, 0)
    assert "root" not in keys_of(optimizer, 1)


# --- one parameter, several places ----------------------------------------------------------------

PIECES = fused_rows(LARGE, [("q", 6, 1), ("k", 3, 1)])


def split_grads(grads: dict[int, list[Tensor]]) -> dict[int, list[Tensor]]:
    return {step: list(whole.split([6, 3])) for step, (whole,) in grads.items()}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (full_matrix, {"max_elements": 12, "graft": "none"}),
        (full_matrix, {"max_elements": 12, "graft": "adam"}),
        (full_matrix, {"max_elements": 12, "graft": "adam", "momentum_site": "gradient"}),
        (shampoo, {"max_dim": 5, "graft": "adam"}),
        (shampoo, {"max_dim": 5, "graft": "adam", "block_size": 2}),
        (shampoo, {"max_dim": 5, "graft": "none", "large_dim": "one_sided", "block_size": 2}),
    ],
)
@pytest.mark.parametrize("scope", ["parameter", "view"])
def test_pieces_of_one_parameter_equal_separate_parameters(
    make: Any, options: dict[str, Any], scope: str
) -> None:
    """The large piece elsewhere, the small one preconditioned; norms are those of what is."""
    whole = parameter(*LARGE)
    separate = [nn.Parameter(part.clone()) for part in whole.detach().split([6, 3])]
    together = make([group([whole], [PIECES])], graft_scope=scope, **options)
    apart = make(separate, graft_scope=scope, **options)
    grads = gradients(LARGE)
    run_with(together, grads, 0)
    expected = run_with(apart, split_grads(grads), 0, 1)
    assert_same(whole.detach().split([6, 3]), expected, TOLERANCE)


def test_state_keys_name_the_piece() -> None:
    optimizer = full_matrix([group([parameter(*LARGE)], [PIECES])], max_elements=12, graft="none")
    run(optimizer, [1])
    keys = keys_of(optimizer, 0)
    assert {"q.exp_avg", "q.exp_avg_sq", "k.root", "k.second_moment"} <= keys
    assert not {"q.root", "k.exp_avg_sq"} & keys


# --- what is said about it ------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("hf_precond")
    ]


def test_displaced_matrices_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = full_matrix(named(LARGE, SMALL, LARGE, VECTOR))
    run(optimizer, STEPS)
    (message,) = warnings_of(caplog)
    assert message.startswith("full_matrix_adagrad: 2 matrices follow adam: ")
    assert "max_elements = 30" in message
    assert "p0" in message
    assert "p2" in message
    assert "p1" not in message
    assert "p3" not in message


def test_large_matrices_of_shampoo_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = shampoo(named(LARGE, SMALL))
    run(optimizer, [1, 2])
    (message,) = warnings_of(caplog)
    assert message.startswith("shampoo: 1 matrices follow the graft step: ")
    assert "max_dim = 8" in message
    assert message.endswith("(p0)")


def test_of_many_matrices_the_first_are_named(caplog: pytest.LogCaptureFixture) -> None:
    run(shampoo(named(*[LARGE] * 5)), [1])
    (message,) = warnings_of(caplog)
    assert "5 matrices" in message
    assert "(p0, p1, p2, ...)" in message


def test_pieces_of_one_parameter_name_it_once(caplog: pytest.LogCaptureFixture) -> None:
    views = fused_rows((12, 4), [("q", 6, 1), ("k", 6, 1)])
    run(shampoo([group([parameter(12, 4)], [views])], max_dim=5), [1])
    (message,) = warnings_of(caplog)
    assert "2 matrices" in message
    assert message.endswith("(param_0)")


@pytest.mark.parametrize("make", [shampoo, full_matrix])
def test_where_all_fit_nothing_is_logged(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    run(make(named(SMALL, VECTOR)), [1, 2])
    assert warnings_of(caplog) == []


def test_the_plan_counts_each_place() -> None:
    optimizer = shampoo(named(LARGE, SMALL, LARGE, VECTOR), graft="adam")
    plan = {row.algorithm: row for row in optimizer.plan()}
    assert plan.keys() == {"shampoo", "graft step (adam)", "adam"}
    assert [row.num_tensors for row in plan.values()] == [2, 1, 1]
    assert [row.num_params for row in plan.values()] == [72, 30, 5]
    assert plan["graft step (adam)"].state_bytes == 8 * 72 * 2
    assert plan["shampoo"].state_bytes == 8 * (2 * 5 * 5 + 2 * 6 * 6 + 2 * 30)


def test_the_plan_counts_fallback_matrices_with_the_fallback() -> None:
    plan = {row.algorithm: row for row in full_matrix(named(LARGE, SMALL, VECTOR)).plan()}
    assert plan.keys() == {"full_matrix_adagrad", "adam"}
    assert (plan["adam"].num_tensors, plan["adam"].num_params) == (2, 41)
    assert (plan["full_matrix_adagrad"].num_tensors, plan["full_matrix_adagrad"].num_params) == (
        1,
        30,
    )


def test_the_plan_counts_a_parameter_in_both_of_its_places() -> None:
    optimizer = full_matrix([group([parameter(*LARGE)], [PIECES])], max_elements=12)
    plan = {row.algorithm: row for row in optimizer.plan()}
    assert [plan[name].num_params for name in ("adam", "full_matrix_adagrad")] == [24, 12]
    assert [row.num_tensors for row in plan.values()] == [1, 1]


@pytest.mark.parametrize("block_size", [1, 3, 4, 8])
def test_the_plan_counts_tiles_as_one_tensor(block_size: int) -> None:
    optimizer = shampoo(named(SMALL, SMALL, VECTOR), block_size=block_size)
    (main,) = [row for row in optimizer.plan() if row.algorithm == "shampoo"]
    assert (main.num_tensors, main.num_params) == (2, 60)
    assert sum(row.state_bytes for row in optimizer.plan()) == allocated(optimizer)


def allocated(optimizer: PreconditionedOptimizer) -> int:
    """Bytes of all state tensors after a step, but for the step counts."""
    run(optimizer, [1])
    return sum(
        tensor.numel() * tensor.element_size()
        for key, tensor in state_tensors(optimizer).items()
        if not key.endswith(".step")
    )


def layers() -> nn.Module:
    return nn.ModuleDict({"small": nn.Linear(6, 5), "large": nn.Linear(4, 9)})


def test_the_explanation_says_where_and_why() -> None:
    rows = {row.parameter: row for row in explain_groups(layers(), "shampoo", **SHAMPOO)}
    assert rows["small.weight"].algorithm == "shampoo"
    assert rows["large.weight"].algorithm == "graft step"
    assert "max_dim = 8" in rows["large.weight"].reason
    assert "max_dim" not in rows["small.weight"].reason
    assert rows["large.weight"].state_bytes < rows["small.weight"].state_bytes
    rows = {row.parameter: row for row in explain_groups(layers(), "full_matrix_adagrad", **FULL)}
    assert rows["small.weight"].algorithm == "full_matrix_adagrad"
    assert rows["large.weight"].algorithm == "adam"
    assert "max_elements = 30" in rows["large.weight"].reason
    assert "max_elements = 30" in format_table(rows.values())


def test_the_explanation_shows_tiles() -> None:
    options = {**SHAMPOO, "block_size": 4}
    rows = {row.parameter: row for row in explain_groups(layers(), "shampoo", **options)}
    assert "1 x [5, 6]" in rows["small.weight"].view
    assert "4x4" in rows["small.weight"].view
    assert "tiles" not in rows["large.weight"].view


# --- state of tiles -------------------------------------------------------------------------------


def tiled(**options: Any) -> PreconditionedOptimizer:
    """A matrix with remainders on both sides, a fused kernel, a large matrix and a vector."""
    shapes = [(5, 7), (9, 4), (13, 3), (5,)]
    params = [parameter(*shape, seed=index) for index, shape in enumerate(shapes)]
    views = [
        [rows((5, 7))],
        list(fused_rows((9, 4), [("q", 6, 2), ("k", 3, 1)])),
        [rows((13, 3))],
        [],
    ]
    names = [f"p{index}" for index in range(4)]
    groups = [{**group(params, views), "param_names": names}]
    return shampoo(groups, **{"max_dim": 12, "block_size": 3, "inverse_interval": 3, **options})


def test_state_keys_name_the_tiles() -> None:
    optimizer = tiled(graft="adam")
    run(optimizer, [1])
    keys = keys_of(optimizer, 0)
    pieces = ("3x3", "3x1", "2x3", "2x1")
    names = ("left", "right", "left_root", "right_root", "exp_avg", "graft_sq")
    assert keys == {"step", *(f"{piece}.{name}" for piece in pieces for name in names)}
    assert {"q.3x3.left", "q.3x1.left", "k.3x3.left", "k.3x1.left"} <= keys_of(optimizer, 1)
    state = optimizer.state[params_of(optimizer)[0]]
    assert state["3x3.left"].shape == (2, 3, 3)
    assert state["2x1.right"].shape == (1, 1, 1)


@pytest.mark.parametrize("done", [1, 4, 5])
@pytest.mark.parametrize("stagger", [False, True])
def test_state_of_tiles_survives_a_flat_file(done: int, stagger: bool) -> None:
    """Bit for bit, in the middle of an interval too."""
    straight, first, second = (tiled(stagger=stagger) for _ in range(3))
    run(straight, STEPS)
    weights = run(first, range(1, done + 1))
    tensors, header = flat_state(first)
    assert "state.p0.3x1.right_root" in tensors
    for param, weight in zip(params_of(second), weights, strict=True):
        param.data.copy_(weight)
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    load_flat_state(second, copies, json.loads(json.dumps(header)))
    run(second, range(done + 1, STEPS.stop))
    assert_bit_equal(params_of(second), params_of(straight), "weight")
    expected = state_tensors(straight)
    assert state_tensors(second).keys() == expected.keys()
    assert_bit_equal(state_tensors(second).values(), expected.values(), "state")


def test_a_resumed_run_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    """It is another process, whose reader has not seen the first one's log."""
    first, second = tiled(), tiled()
    run(first, [1])
    assert len(warnings_of(caplog)) == 1
    caplog.clear()
    load_flat_state(second, *flat_state(first))
    run(second, [2, 3])
    assert len(warnings_of(caplog)) == 1


def test_a_later_group_is_reported_alone(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = tiled()
    run(optimizer, [1])
    caplog.clear()
    late = parameter(3, 60)
    optimizer.add_param_group({"params": [("late", late)]})
    run(optimizer, [2, 3])
    (text,) = warnings_of(caplog)
    assert "1 matrices" in text
    assert "(late)" in text


@pytest.mark.parametrize("option", [{"block_size": 4}, {"max_dim": 100}])
def test_state_of_other_tiles_is_refused(option: dict[str, int]) -> None:
    first, other = tiled(), tiled(**option)
    run(first, [1])
    with pytest.raises(ValueError, match="tensors do not fit"):
        load_flat_state(other, *flat_state(first))


def test_tiles_equal_separate_parameters() -> None:
    """Where no norm is taken over several of them."""
    whole = parameter(4, 6)
    places = [(slice(i, i + 2), slice(j, j + 2)) for i in (0, 2) for j in (0, 2, 4)]
    separate = [nn.Parameter(whole.detach()[place].clone()) for place in places]
    together, apart = (
        shampoo(params, block_size=2, graft="none") for params in ([whole], separate)
    )
    grads = gradients((4, 6))
    run_with(together, grads, 0)
    expected = run(apart, STEPS, lambda _, step: [grads[step][0][place] for place in places])
    assert_same([whole.detach()[place] for place in places], expected, TOLERANCE)


def test_tiles_of_several_sizes_are_stacked_in_bounded_chunks() -> None:
    """Norms over parameters tie their stacks together: without a bound it would be all of them."""
    params = [parameter(5, 5, seed=index) for index in range(6)]
    optimizer = build("shampoo", params, block_size=3, bucket_size=50)
    run(optimizer, [1])
    sizes = [
        sum(slot.view.numel for bank in cluster for slot in bank.bucket.slots)
        for cluster in optimizer._laid.clusters
    ]
    assert sizes == [50, 50, 50]
    whole = build("shampoo", [parameter(5, 5, seed=index) for index in range(6)], block_size=3)
    assert_same(run(optimizer, [2, 3]), run(whole, [1, 2, 3]), TOLERANCE)
