"""From param groups to stacks: which view goes to which algorithm, cut how, stacked with what."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from hf_precond.optim.flat_parameters import check_not_flat
from hf_precond.preconditioners.base import (
    FALLBACK,
    MAIN,
    Placement,
    Preconditioner,
    Shape,
    layer_needs,
    placement,
)
from hf_precond.views.joint import Joint
from hf_precond.views.plan import AnyView, Bucket, Key, PlannedView, plan_buckets
from hf_precond.views.positions import WeightLayout, positions
from hf_precond.views.tiles import tile
from hf_precond.views.view import ParamView, check_cover, flat, rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedView:
    """A view of a parameter and where the algorithm wants it.

    Attributes:
        param: index of the parameter.
        bias: index of the bias that a joint view takes along.
        first_group: index of the view's first group among all groups of the optimizer.
        rank: chosen for the view; 0 for that of the algorithm's options.
    """

    param: int
    view: ParamView | Joint
    bias: int | None = None
    place: Placement
    first_group: int
    rank: int = 0


def take_views(group: MutableMapping[str, Any]) -> None:
    """Gives a param group its views, by the shapes where it brings none, and checks them.

    Raises:
        ValueError: for flat parameters, or views that do not belong to the group's parameters.
    """
    for param in group["params"]:
        check_not_flat(param)
    views = group.setdefault("views", [_default_views(param) for param in group["params"]])
    layers = group.setdefault("layers", [[] for _ in group["params"]])
    for key, entries in (("views", views), ("layers", layers)):
        if len(entries) != len(group["params"]):
            raise ValueError(
                f"a param group has {len(group['params'])} parameters and {len(entries)} "
                f"{key}: give one list of {key} per parameter"
            )
    for name, param, plain in zip(group_names(group), group["params"], views, strict=True):
        _check_views(name, param, plain)


def _default_views(param: Tensor) -> list[list[Any]]:
    """Views from the shape alone: matrices and kernels by rows, the rest to the fallback."""
    return [rows(param.shape).to_plain()] if param.ndim >= 2 else []


def _check_views(name: str, param: Tensor, plain: Sequence[Any]) -> None:
    """Raises ValueError unless the plain views cover the parameter exactly once."""
    if not plain:
        return
    try:
        check_cover([ParamView.from_plain(view) for view in plain], param.shape)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from error


def placed_views(
    param_groups: Sequence[Mapping[str, Any]], algorithm: Preconditioner
) -> list[PlacedView]:
    """Returns all views of all parameters; one without views is a flat view for the fallback.

    A bias that is trained together with its layer's weight has no place of its own.
    """
    biases = joint_biases(param_groups, algorithm)
    with_weight = set(biases.values())
    placed: list[PlacedView] = []
    index = first_group = 0
    for group in param_groups:
        ranks = group.get("view_ranks") or [[] for _ in group["params"]]
        for param, plain, layer, of_views in zip(
            group["params"], group["views"], group["layers"], ranks, strict=True
        ):
            own = [ParamView.from_plain(view) for view in plain]
            joint = index in biases
            views = [_joint(view, layer, param) if joint else view for view in own]
            pairs = [(view, placement(algorithm, view.shape)) for view in views]
            if not pairs and index not in with_weight:
                pairs = [(flat(param.shape), Placement(role=FALLBACK))]
            for number, (view, place) in enumerate(pairs):
                placed.append(
                    PlacedView(
                        param=index,
                        view=view,
                        bias=biases.get(index),
                        place=place,
                        first_group=first_group,
                        rank=of_views[number] if of_views else 0,
                    )
                )
                first_group += view.shape[0]
            index += 1
    return placed


def joint_biases(
    param_groups: Sequence[Mapping[str, Any]], algorithm: Preconditioner
) -> dict[int, int]:
    """Returns for each weight whose bias is trained together with it the index of that bias.

    That needs an algorithm that knows its layers, and views in which each output of the layer is a
    row once: of an attention output's heads all have all outputs.
    """
    needs = layer_needs(algorithm)
    if needs is None or not needs.joint_bias:
        return {}
    names = [name for group in param_groups for name in group_names(group)]
    position = {name: index for index, name in enumerate(names) if name}
    found, index = {}, 0
    for group in param_groups:
        for param, plain, layer in zip(
            group["params"], group["views"], group["layers"], strict=True
        ):
            if plain and layer:
                layout = WeightLayout.from_plain(layer)
                views = [ParamView.from_plain(view) for view in plain]
                # One place: the algorithm takes all of the weight or none of it.
                taken = all(placement(algorithm, _wider(view.shape)).role == MAIN for view in views)
                rows = sum(view.shape[0] * view.shape[1] for view in views)
                if layout.bias in position and taken and rows == layout.num_outputs(param.shape):
                    found[index] = position[layout.bias]
            index += 1
    return found


def _wider(shape: Shape) -> Shape:
    groups, rows, columns = shape
    return groups, rows, columns + 1


def _joint(view: ParamView, layer: Sequence[Any], param: Tensor) -> Joint:
    found = positions(view, WeightLayout.from_plain(layer), param.shape)
    assert found is not None, "checked where the groups are taken"
    return Joint(base=view, outputs=found.outputs.to(param.device))


def group_names(group: Mapping[str, Any]) -> list[str]:
    """Returns the names of a group's parameters, empty where none were given."""
    return list(group.get("param_names", [""] * len(group["params"])))


def pieces_of(
    placed: Sequence[PlacedView], params: Sequence[Tensor], *, max_elements: int
) -> list[PlannedView]:
    """Cuts views into tiles where that was asked for.

    Views cut into pieces of several sizes tie the stacks they lie in together, because norms are
    taken over whole parameters. Such views stack only among ``max_elements`` weights, so that what
    is worked on at once stays bounded.
    """
    planned: list[PlannedView] = []
    cut = 0
    for number, item in enumerate(placed):
        pieces: tuple[AnyView, ...] = (item.view,)
        if item.place.tile:
            assert isinstance(item.view, ParamView), "joint views are not cut"
            pieces = tile(item.view, *item.place.tile)
        chunk = 0
        if len(pieces) > 1:
            chunk = cut // max_elements
            cut += item.view.numel
        planned += [
            PlannedView(
                param=item.param,
                view=piece,
                bias=item.bias,
                number=number,
                first_group=item.first_group,
                key=Key(item.place.role, params[item.param].device, chunk, item.rank),
                piece=len(planned) + index,
            )
            for index, piece in enumerate(pieces)
        ]
    return planned


def buckets_of(
    placed: Sequence[PlacedView], params: Sequence[Tensor], *, max_elements: int
) -> list[Bucket]:
    """Stacks the pieces of all views that have one role and shape."""
    pieces = pieces_of(placed, params, max_elements=max_elements)
    return plan_buckets(pieces, max_elements=max_elements)


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
        cost = rows * size * min(rows, size) if bucket.key.role == MAIN else 0
        costs.append(groups * [cost])
    total = sum(map(sum, costs)) or 1
    done = [0, *accumulate(cost for of_bucket in costs for cost in of_bucket)]
    ends = list(accumulate(map(len, costs)))
    return [
        tuple(start / total if start < total else 0.0 for start in done[end - len(of_bucket) : end])
        for end, of_bucket in zip(ends, costs, strict=True)
    ]


def phases_by_piece(buckets: Sequence[Bucket]) -> dict[int, tuple[float, ...]]:
    """The same for each group of each piece, wherever it will be stacked."""
    return {
        slot.piece: phases[slot.start : slot.stop]
        for bucket, phases in zip(buckets, refresh_phases(buckets), strict=True)
        for slot in bucket.slots
    }


def displaced(placed: Iterable[PlacedView]) -> dict[Placement, list[int]]:
    """Returns the views that the algorithm does not take: placement -> parameter of each."""
    found: dict[Placement, list[int]] = {}
    for item in placed:
        if item.place.reason:
            found.setdefault(item.place, []).append(item.param)
    return found


def log_displaced(
    placed: Sequence[PlacedView], names: Sequence[str], algorithm: str, fallback: str
) -> None:
    """Says which matrices the algorithm does not take, and why.

    Args:
        names: of all parameters.
        algorithm: its name.
        fallback: name of the fallback.
    """
    for place, params in displaced(placed).items():
        what = fallback if place.role == FALLBACK else "the graft step"
        found = list(dict.fromkeys(names[param] for param in params))
        logger.warning(
            "%s: %d matrices follow %s: %s (%s%s)",
            *(algorithm, len(params), what, place.reason),
            *(", ".join(found[:3]), ", ..." if len(found) > 3 else ""),
        )
