"""Equal block shapes share a stack."""

from __future__ import annotations

import torch

from hf_precond.views.plan import Key, PlannedView, clusters, plan_buckets
from hf_precond.views.view import ParamView, fused_rows, rows

CPU = torch.device("cpu")


def planned(param: int, view: ParamView, algorithm: str = "a") -> PlannedView:
    return PlannedView(param=param, view=view, key=Key(algorithm, CPU))


def test_equal_blocks_share_a_stack_in_order() -> None:
    items = [
        planned(0, rows((6, 4), groups=3)),
        planned(1, rows((5, 4))),
        planned(2, rows((2, 4))),
    ]
    stack, other = plan_buckets(items, max_elements=10**6)
    assert stack.shape == (4, 2, 4)
    assert [(slot.param, slot.start, slot.stop) for slot in stack.slots] == [(0, 0, 3), (2, 3, 4)]
    assert (stack.params, other.params) == ((0, 2), (1,))
    assert other.shape == (1, 5, 4)


def test_keys_keep_stacks_apart() -> None:
    items = [planned(0, rows((2, 4))), planned(1, rows((2, 4)), "b")]
    assert [bucket.params for bucket in plan_buckets(items, max_elements=10**6)] == [(0,), (1,)]


def test_the_limit_starts_a_new_stack_but_never_splits_a_parameter() -> None:
    pieces = fused_rows((6, 4), [("q", 2, 1), ("k", 2, 1), ("v", 2, 1)])
    items = [planned(param, view) for param in range(3) for view in pieces]
    for limit, expected in ((1, [(0,), (1,), (2,)]), (48, [(0, 1), (2,)]), (10**6, [(0, 1, 2)])):
        buckets = plan_buckets(items, max_elements=limit)
        assert [bucket.params for bucket in buckets] == expected, limit
        assert sum(bucket.shape[0] for bucket in buckets) == 9


def test_clusters_join_stacks_that_share_a_parameter() -> None:
    unequal = fused_rows((6, 4), [("q", 4, 1), ("k", 2, 1)])
    items = [
        planned(0, unequal[0]),
        planned(0, unequal[1]),
        planned(1, rows((4, 4))),
        planned(2, rows((3, 4))),
    ]
    found = clusters(plan_buckets(items, max_elements=10**6))
    params = [sorted({param for bucket in members for param in bucket.params}) for members in found]
    assert sorted(params) == [[0, 1], [2]]
    assert [len(members) for members in found] == [2, 1]
