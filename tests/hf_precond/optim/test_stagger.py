"""Staggered refreshes: each group once per interval, the work spread over the steps."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond import PreconditionedOptimizer, list_optimizers, option_specs
from hf_precond.preconditioners.base import StepContext
from hf_precond.views.view import fused_rows
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

TOLERANCE = 1e-10
INTERVAL = 4


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """What of an optimizer's state is new after a refresh, and when that begins.

    Attributes:
        option: of the interval.
        key: a tensor that changes at a refresh and at no other step.
        first: the first step of a refresh that all groups share.
        early: a step before it at which all groups are new in any case.
    """

    option: str
    key: str
    first: int
    early: int | None = None


ROTATED = Refresh(option="projection_interval", key="left", first=INTERVAL)
REFRESHES = {
    "adadiag": ROTATED,
    "adadiag_pp": ROTATED,
    "adafacdiag": ROTATED,
    "adafacdiag_pp": ROTATED,
    "block_adam": Refresh(option="root_interval", key="root", first=1),
    "full_matrix_adagrad": Refresh(option="root_interval", key="root", first=1),
    "shampoo": Refresh(option="inverse_interval", key="left_root", first=1),
    "soap": Refresh(option="basis_interval", key="left_basis", first=2 + INTERVAL, early=2),
}
WHOLE = {"block_size": 64}  # one tile each
SHAPES = [(4, 5), (3, 9), (4, 5), (6, 8), (4, 5), (5,), (3, 9), (4, 5)]

per_name = pytest.mark.parametrize("name", REFRESHES)


def make(name: str, shapes: Sequence[tuple[int, ...]] = SHAPES, **options: Any) -> Any:
    """An optimizer of the shapes with a refresh every INTERVAL steps, staggered."""
    params = [parameter(*shape, seed=index) for index, shape in enumerate(shapes)]
    defaults = {REFRESHES[name].option: INTERVAL, "update_interval": 1, "stagger": True, **WHOLE}
    return build(name, params, **{**defaults, **options})


def refreshed_tensors(optimizer: PreconditionedOptimizer) -> dict[tuple[str, int], Tensor]:
    """(parameter and tensor, group) -> what a refresh changes, copied."""
    key = REFRESHES[optimizer.algorithm_name].key
    return {
        (name, index): matrix.clone()
        for name, tensor in state_tensors(optimizer).items()
        if name.endswith(f".{key}")
        for index, matrix in enumerate(tensor)
    }


def is_identity(matrix: Tensor) -> bool:
    """True of one identity, or of a stack of them."""
    return torch.equal(matrix, torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(matrix))


def refreshes(
    optimizer: PreconditionedOptimizer, steps: int, grads: Any = random_grads
) -> dict[tuple[str, int], list[int]]:
    """The steps at which each group was refreshed."""
    run(optimizer, [1], grads)
    before = refreshed_tensors(optimizer)
    found: dict[tuple[str, int], list[int]] = {group: [] for group in before}
    for name, matrix in before.items():
        if not is_identity(matrix):
            found[name].append(1)
    for step in range(2, steps + 1):
        run(optimizer, [step], grads)
        after = refreshed_tensors(optimizer)
        for name, matrix in after.items():
            if not torch.equal(matrix, before[name]):
                found[name].append(step)
        before = after
    early = REFRESHES[optimizer.algorithm_name].early
    return {name: [step for step in at if step != early] for name, at in found.items()}


def turns(optimizer: PreconditionedOptimizer, interval: int = INTERVAL) -> list[int]:
    """For each group the step of its first refresh, from that of the very first on."""
    first = REFRESHES[optimizer.algorithm_name].first
    found = refreshes(optimizer, first + interval - 1)
    assert all(len(at) == 1 for at in found.values()), found
    return [at[0] - first for at in found.values()]


def test_every_optimizer_that_staggers_is_here() -> None:
    assert set(REFRESHES) == {name for name in list_optimizers() if "stagger" in option_specs(name)}


# --- whose turn it is -----------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("first", [1, 2, 7])
def test_each_group_has_its_turn_once_per_interval(interval: int, first: int) -> None:
    for count in range(1, 12):
        phases = [index / count for index in range(count)]
        at: dict[int, list[int]] = {index: [] for index in range(count)}
        for step in range(1, first + 3 * interval):
            ctx = StepContext(step=step, phases=phases)
            due = ctx.due_groups(interval, first=first, stagger=True)
            assert ctx.refreshed == (due is not None)
            for index in due or []:
                at[index].append(step)
        for index, steps in at.items():
            begin = first + int(phases[index] * interval)
            assert steps == [begin, begin + interval, begin + 2 * interval], (count, index)


def test_without_stagger_all_groups_have_their_turn_at_once() -> None:
    due = [
        StepContext(step=step, phases=[0.0, 0.5]).due_groups(3, first=2, stagger=False)
        for step in range(1, 9)
    ]
    assert due == [None, slice(None), None, None, slice(None), None, None, slice(None)]


@per_name
def test_each_group_is_refreshed_once_per_interval(name: str) -> None:
    """And not before the first common refresh would have been."""
    first = REFRESHES[name].first
    found = refreshes(make(name), first + 3 * INTERVAL - 1)
    assert len(found) == len(SHAPES) - 1
    for name_and_group, at in found.items():
        assert first <= at[0] < first + INTERVAL, name_and_group
        assert at == [at[0], at[0] + INTERVAL, at[0] + 2 * INTERVAL], name_and_group


@pytest.mark.parametrize("name", [name for name in REFRESHES if REFRESHES[name].early is None])
def test_until_its_first_turn_a_group_keeps_what_it_has(name: str) -> None:
    optimizer = make(name, [(4, 5)] * INTERVAL)
    run(optimizer, range(1, REFRESHES[name].first + 1))
    known = [not is_identity(matrix) for matrix in refreshed_tensors(optimizer).values()]
    assert known == [True] + [False] * (INTERVAL - 1)


# --- the work of a step ---------------------------------------------------------------------------


@per_name
@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_equal_groups_are_spread_evenly(name: str, per_step: int) -> None:
    found = turns(make(name, [(4, 5)] * (per_step * INTERVAL)))
    assert found == [index // per_step for index in range(per_step * INTERVAL)]


@per_name
def test_fewer_groups_than_steps_have_a_step_each(name: str) -> None:
    found = turns(make(name, [(4, 5)] * 3, **{REFRESHES[name].option: INTERVAL}))
    assert len(set(found)) == 3


@per_name
def test_groups_take_turns_by_cost(name: str) -> None:
    """A matrix as dear as all others together has half of the interval to itself."""
    small, large = (4, 4), (8, 8)
    assert 8**3 == 8 * 4**3
    assert turns(make(name, [large, *[small] * 8])) == [0, 2, 2, 2, 2, 3, 3, 3, 3]
    assert turns(make(name, [*[small] * 8, large])) == [0, 0, 0, 0, 1, 1, 1, 1, 2]


@per_name
def test_no_step_has_more_than_its_share_and_one_group(name: str) -> None:
    optimizer = make(name)
    costs = [s[0] * s[1] * min(s) for s in SHAPES if len(s) == 2]
    work: Counter[int] = Counter()
    for cost, turn in zip(costs, turns(optimizer), strict=True):
        work[turn] += cost
    assert max(work.values()) <= sum(costs) / INTERVAL + max(costs)
    assert len(work) > 1


@per_name
def test_vectors_cost_nothing(name: str) -> None:
    matrices = [(4, 5)] * INTERVAL
    assert turns(make(name, [(500,), *matrices, (7,)])) == turns(make(name, matrices))


def test_matrices_that_shampoo_leaves_to_the_graft_step_cost_nothing() -> None:
    optimizer = make("shampoo", [(4, 5), (20, 3), (4, 5)], max_dim=10)
    assert turns(optimizer) == [0, 2]


def test_tiles_have_turns_of_their_own() -> None:
    optimizer = make("shampoo", [(4, 4)], block_size=2)
    assert turns(optimizer) == [0, 1, 2, 3]


@per_name
def test_groups_of_one_parameter_have_turns_of_their_own(name: str) -> None:
    views = list(fused_rows((16, 5), [("q", 8, 2), ("k", 8, 2)]))
    options = {REFRESHES[name].option: INTERVAL, "update_interval": 1, "stagger": True, **WHOLE}
    optimizer = build(name, [group([parameter(16, 5)], [views])], **options)
    assert turns(optimizer) == [0, 1, 2, 3]


@per_name
def test_small_buckets_change_no_turn(name: str) -> None:
    assert turns(make(name, bucket_size=1)) == turns(make(name))


# --- what stays as it is --------------------------------------------------------------------------


@per_name
def test_without_stagger_all_groups_are_refreshed_together(name: str) -> None:
    first = REFRESHES[name].first
    found = refreshes(make(name, stagger=False), first + 2 * INTERVAL)
    together = [first, first + INTERVAL, first + 2 * INTERVAL]
    assert all(at == together for at in found.values())


@per_name
def test_no_stagger_is_the_default(name: str) -> None:
    params = [parameter(*shape, seed=index) for index, shape in enumerate(SHAPES)]
    plain = build(name, params, **{REFRESHES[name].option: INTERVAL, "update_interval": 1, **WHOLE})
    steps = range(1, 3 * INTERVAL)
    assert_bit_equal(run(plain, steps), run(make(name, stagger=False), steps))


@per_name
def test_at_every_step_there_is_nothing_to_stagger(name: str) -> None:
    steps = range(1, 8)
    options = {REFRESHES[name].option: 1}
    staggered, together = make(name, **options), make(name, stagger=False, **options)
    assert_bit_equal(run(staggered, steps), run(together, steps))


@per_name
def test_the_group_whose_turn_is_first_notices_nothing(name: str) -> None:
    """Its refreshes are where all of them would be."""
    steps = range(1, 3 * INTERVAL)
    staggered, together = run(make(name), steps), run(make(name, stagger=False), steps)
    assert_same(staggered[:1], together[:1], TOLERANCE)
    assert not torch.equal(staggered[-1], together[-1])


# --- interruptions --------------------------------------------------------------------------------


@per_name
@pytest.mark.parametrize("done", range(1, 2 * INTERVAL + 1, 2))
def test_resumed_in_the_middle_of_an_interval(name: str, done: int) -> None:
    """Bit for bit."""
    end = 4 * INTERVAL
    straight, first, second = (make(name) for _ in range(3))
    run(straight, range(1, end))
    weights = run(first, range(1, done + 1))
    for param, weight in zip(params_of(second), weights, strict=True):
        param.data.copy_(weight)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, range(done + 1, end))
    assert_bit_equal(params_of(second), params_of(straight), "weight")
    expected = state_tensors(straight)
    assert_bit_equal(state_tensors(second).values(), expected.values(), "state")


def without_first(missing: set[int]) -> Any:
    """Gradients of which the first parameter misses some steps and gets the same ones in all."""

    def grads(params: Sequence[Tensor], step: int) -> list[Tensor | None]:
        _, *others = random_grads(params, step)
        own = step - sum(gap < step for gap in missing)
        return [None if step in missing else random_grads(params, own)[0], *others]

    return grads


@per_name
@pytest.mark.parametrize("gap", [0, 1, 2], ids=["at its turn", "after it", "later"])
def test_a_missing_gradient_delays_that_parameter_alone(name: str, gap: int) -> None:
    """By one step; it is refreshed as often, and all end where they would have ended."""
    first = REFRESHES[name].first
    steps, missing = first + 3 * INTERVAL, first + gap
    whole, gapped = make(name), make(name)
    expected = refreshes(whole, steps)
    found = refreshes(gapped, steps + 1, without_first({missing}))
    names = list(expected)
    late = [step + (step >= missing) for step in expected[names[0]]]
    assert found[names[0]] == late
    for other in names[1:]:
        assert [step for step in found[other] if step <= steps] == expected[other]
    assert_same(params_of(gapped)[:1], params_of(whole)[:1], TOLERANCE)
    run(whole, [steps + 1])
    assert_same(params_of(gapped)[1:], params_of(whole)[1:], TOLERANCE)
