"""From param groups to stacks: which view goes to which algorithm, cut how, stacked with what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from hf_precond.preconditioners.base import (
    FALLBACK,
    MAIN,
    Placement,
    Preconditioner,
    placement,
)
from hf_precond.views.plan import Bucket, PlannedView, plan_buckets
from hf_precond.views.tiles import tile
from hf_precond.views.view import ParamView, flat


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedView:
    """A view of a parameter and where the algorithm wants it.

    Attributes:
        param: index of the parameter.
        first_group: index of the view's first group among all groups of the optimizer.
    """

    param: int
    view: ParamView
    place: Placement
    first_group: int


def placed_views(
    param_groups: Iterable[Mapping[str, Any]], algorithm: Preconditioner
) -> list[PlacedView]:
    """Returns all views of all parameters; one without views is a flat view for the fallback."""
    placed: list[PlacedView] = []
    index = first_group = 0
    for group in param_groups:
        for param, plain in zip(group["params"], group["views"], strict=True):
            views = [ParamView.from_plain(view) for view in plain]
            pairs = [(view, placement(algorithm, view.shape)) for view in views]
            for view, place in pairs or [(flat(param.shape), Placement(role=FALLBACK))]:
                placed.append(
                    PlacedView(param=index, view=view, place=place, first_group=first_group)
                )
                first_group += view.shape[0]
            index += 1
    return placed


def buckets_of(
    placed: Sequence[PlacedView], params: Sequence[Tensor], *, max_elements: int
) -> list[Bucket]:
    """Cuts views into tiles where that was asked for and stacks what has one role and shape.

    Views cut into pieces of several sizes tie the stacks they lie in together, because norms are
    taken over whole parameters. Such views stack only among ``max_elements`` weights, so that what
    is worked on at once stays bounded.
    """
    planned, cut = [], 0
    for number, item in enumerate(placed):
        pieces = tile(item.view, *item.place.tile) if item.place.tile else (item.view,)
        chunk = 0
        if len(pieces) > 1:
            chunk = cut // max_elements
            cut += item.view.numel
        planned += [
            PlannedView(
                param=item.param,
                view=piece,
                number=number,
                first_group=item.first_group,
                key=(item.place.role, params[item.param].device, chunk),
            )
            for piece in pieces
        ]
    return plan_buckets(planned, max_elements=max_elements)


def owner_counts(placed: Sequence[PlacedView], params: Sequence[Tensor]) -> dict[str, int]:
    """Returns how many parameters, views and groups there are, by the names of the graft scopes."""
    groups = sum(item.view.shape[0] for item in placed)
    return {"parameter": len(params), "view": len(placed), "group": groups}


def refresh_phases(buckets: Sequence[Bucket]) -> list[tuple[float, ...]]:
    """When each group of each bucket has its turn in a staggered refresh, as shares in [0, 1).

    Groups take turns in order, each the share of the interval that its decomposition costs of all.
    """
    costs = []
    for bucket in buckets:
        groups, rows, size = bucket.shape
        cost = rows * size * min(rows, size) if bucket.key[0] == MAIN else 0
        costs.append(groups * [cost])
    total = sum(map(sum, costs)) or 1
    done = [0, *accumulate(cost for of_bucket in costs for cost in of_bucket)]
    ends = list(accumulate(map(len, costs)))
    return [
        tuple(start / total if start < total else 0.0 for start in done[end - len(of_bucket) : end])
        for end, of_bucket in zip(ends, costs, strict=True)
    ]


def displaced(placed: Iterable[PlacedView]) -> dict[Placement, list[int]]:
    """Returns the views that the algorithm does not take: placement -> parameter of each."""
    found: dict[Placement, list[int]] = {}
    for item in placed:
        if item.place.reason:
            found.setdefault(item.place, []).append(item.param)
    return found
