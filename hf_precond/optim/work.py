"""Which rank works on what: a plan that every rank makes alike, without communication.

A parameter takes one of three routes.

    here        every rank works on what it has of the parameter, whole or its rows
    exchanged   every rank has the whole gradient; the rank that works sends the direction to all
    gathered    row shards of the gradient go to one rank, and the direction's rows come back

A share is a view, or a part of one, and the rank that works on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heapreplace
from math import prod
from typing import Any

from torch import Tensor

from hf_precond.preconditioners.base import FALLBACK, MAIN, Preconditioner
from hf_precond.views.joint import Joint
from hf_precond.views.plan import AnyView, Extent, PlannedView, Range
from hf_precond.views.shards import RowPart, chunk_ranges, row_parts
from hf_precond.views.tiles import Tiles
from hf_precond.views.view import ParamView, flat

SumKind = tuple[int, int]
"""(block size, rank): sums over blocks of one kind have equal shapes."""
Parts = Sequence[tuple[int, AnyView, Extent]]
"""(rank, what it has of a view, as part of the whole) of all ranks."""
RowsOf = Callable[[AnyView | None, Sequence[int], Sequence[Range]], Parts | None]
SlicesOf = Callable[[AnyView, bool, int], Parts]

HERE, EXCHANGED, GATHERED = "here", "exchanged", "gathered"
# Vectors below this size are not worth being cut into slices.
_MIN_SLICED = 2**14


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """How a parameter lies over the ranks.

    Attributes:
        ranges: rows on each rank, where its first dimension is cut; empty elsewhere.
        whole: whether every rank has all of it. Neither: cut in some other way.
    """

    ranges: tuple[Range, ...] = ()
    whole: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A view, or a part of one, and who works on it.

    Attributes:
        rank: None for every rank.
    """

    view: PlannedView
    rank: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The plan.

    Attributes:
        routes: of each parameter.
        owners: rank that works on each gathered parameter.
        shares: of all ranks, in an order that all ranks have.
        sums: for each piece whose blocks are on several ranks: the kind of its sums, and the index
            of its first group among all groups of that kind.
        leaders: for each of these pieces, the first rank that has each of its groups.
        places: number of all groups of a kind.
    """

    routes: tuple[str, ...]
    owners: dict[int, int]
    shares: tuple[Share, ...]
    sums: dict[int, tuple[SumKind, int]]
    leaders: dict[int, tuple[int, ...]]
    places: dict[SumKind, int]

    @property
    def is_shared(self) -> bool:
        """Whether ranks work on different things."""
        return any(share.rank is not None for share in self.shares)

    def of_rank(self, rank: int) -> list[Share]:
        """The shares that a rank works on."""
        return [share for share in self.shares if share.rank in (None, rank)]


def rows_may_split(algorithm: Any) -> bool:
    """Whether an algorithm (or its class) works where blocks of one group lie on several ranks."""
    return bool(getattr(algorithm, "rows_may_split", False))


def plan_work(
    pieces: Sequence[PlannedView],
    params: Sequence[Tensor],
    homes: Sequence[Home],
    algorithm: Preconditioner,
    *,
    mode: str,
    size: int,
) -> Work:
    """Returns which of ``size`` ranks works on what.

    Args:
        pieces: all views of all parameters.
        params: all parameters; only their shapes are read.
        homes: how each parameter lies over the ranks.
        mode: ``auto``, ``replicated``, ``owner`` or ``blocks``.
    """
    of_param: dict[int, list[PlannedView]] = defaultdict(list)
    for piece in pieces:
        for index in piece.params:
            of_param[index].append(piece)
    if mode == "auto" and all(home.whole for home in homes):
        mode = "replicated"
    # Layers of equal shapes ask the same.
    rows_of, slices_of = cache(_rows_of), cache(_slices_of)
    routes = tuple(
        _route(of_param[index], params, homes, algorithm, mode, rows_of)
        for index in range(len(params))
    )
    split = mode in ("auto", "blocks") and rows_may_split(algorithm)
    owned = [
        index
        for index, route in enumerate(routes)
        if route == GATHERED or (route == EXCHANGED and _needs_owner(of_param[index], mode, split))
    ]
    owners = {} if mode == "replicated" else _assign(owned, of_param, size)
    shares: list[Share] = []
    for piece in pieces:
        found: list[Share]
        route, home = routes[piece.param], homes[piece.param]
        if route == HERE:
            found = _here(piece, params[piece.param].shape, home, rows_of)
        elif route == GATHERED or mode == "replicated":
            found = [Share(view=piece, rank=owners.get(piece.param))]
        else:
            found = _exchanged(piece, owners, size, split, slices_of)
        shares += found
    return Work(
        routes=routes,
        owners={index: owners[index] for index in owned if routes[index] == GATHERED},
        shares=tuple(shares),
        **_sums(pieces, shares),
    )


def is_flat(piece: PlannedView) -> bool:
    """Whether a piece is all of its parameter as one row, to be worked on element by element.

    Matrices that an algorithm leaves to the fallback are not: their views may turn them.
    """
    view = piece.view
    whole = isinstance(view, ParamView) and not view.narrows
    return piece.role == FALLBACK and whole and view.shape[:2] == (1, 1)


def sum_kind(piece: PlannedView) -> SumKind:
    """What the sums over the blocks of a piece have in common with those that are as large."""
    return piece.view.shape[2], piece.key.rank


def work_cost(view: AnyView) -> int:
    """Relative cost of the work on a view: its products and decompositions, and its elements."""
    groups, rows, columns = view.shape
    return groups * rows * columns * (min(rows, columns) + 10)


def _route(
    pieces: Sequence[PlannedView],
    params: Sequence[Tensor],
    homes: Sequence[Home],
    algorithm: Preconditioner,
    mode: str,
    rows_of: RowsOf,
) -> str:
    members = {index for piece in pieces for index in piece.params}
    if all(homes[index].whole for index in members):
        return HERE if mode == "replicated" else EXCHANGED
    if mode == "replicated" or not all(homes[index].ranges for index in members):
        return EXCHANGED
    fits = all(
        _fits_rows(piece, params[piece.param].shape, homes[piece.param], algorithm, mode, rows_of)
        for piece in pieces
    )
    return HERE if fits else GATHERED


def _fits_rows(
    piece: PlannedView,
    shape: Sequence[int],
    home: Home,
    algorithm: Preconditioner,
    mode: str,
    rows_of: RowsOf,
) -> bool:
    """Whether a rank's rows of a parameter can be worked on as they are."""
    role = piece.role
    if is_flat(piece):
        return True
    if isinstance(piece.view, Joint) or (mode == "owner" and role != FALLBACK):
        return False
    if role == MAIN and not rows_may_split(algorithm):
        return False
    base = piece.view.base if isinstance(piece.view, Tiles) else piece.view
    whole_rows = base is piece.view or piece.view.shape[1] == base.shape[1]
    return whole_rows and rows_of(piece.view, shape, home.ranges) is not None


def _needs_owner(pieces: Sequence[PlannedView], mode: str, split: bool) -> bool:
    """Whether the work on an exchanged parameter is one rank's."""
    return mode != "replicated" and not all(_is_sliced(piece, split) for piece in pieces)


def _is_sliced(piece: PlannedView, split: bool) -> bool:
    if is_flat(piece):
        return piece.view.numel >= _MIN_SLICED
    return split and piece.role == MAIN and not isinstance(piece.view, Joint)


def _assign(
    owned: Sequence[int], of_param: dict[int, list[PlannedView]], size: int
) -> dict[int, int]:
    """Gives each parameter to a rank: the costliest first, each to the rank with least so far.

    A weight and the bias that is trained with it go together.
    """
    units: dict[tuple[int, ...], int] = defaultdict(int)
    unit_of: dict[int, tuple[int, ...]] = {}
    for index in owned:
        members = tuple(sorted({i for piece in of_param[index] for i in piece.params}))
        unit_of[index] = members
        if index == members[0]:
            units[members] = sum(work_cost(piece.view) for piece in of_param[index])
    loads, places = [(0, rank) for rank in range(size)], {}
    for unit, cost in sorted(units.items(), key=lambda item: (-item[1], item[0])):
        load, rank = loads[0]
        heapreplace(loads, (load + cost, rank))
        places[unit] = rank
    return {index: places[unit_of[index]] for index in owned}


def _here(piece: PlannedView, shape: Sequence[int], home: Home, rows_of: RowsOf) -> list[Share]:
    """Every rank works on what it has."""
    if home.whole:
        return [Share(view=piece, rank=None)]
    found = rows_of(None if is_flat(piece) else piece.view, shape, home.ranges)
    assert found is not None, "checked where the route was taken"
    return [
        Share(view=_with_extent(piece, view, extent), rank=rank) for rank, view, extent in found
    ]


def _rows_of(view: AnyView | None, shape: Sequence[int], ranges: Sequence[Range]) -> Parts | None:
    """What each rank has of a view, or None where rows are not blocks.

    Args:
        view: None for all elements as one row.
        shape: of the whole parameter.
        ranges: rows of the parameter on each rank.
    """
    if view is None:
        row = prod(shape[1:])
        return [
            (rank, flat((stop - start, row)), _slice_extent(start * row, stop * row))
            for rank, (start, stop) in enumerate(ranges)
            if start < stop
        ]
    tiles = view if isinstance(view, Tiles) else None
    base = view.base if isinstance(view, Tiles) else view
    assert isinstance(base, ParamView)
    parts = row_parts(base, shape, ranges)
    if parts is None:
        return None
    return [(rank, *_part(part, tiles)) for rank, of_rank in enumerate(parts) for part in of_rank]


def _part(part: RowPart, tiles: Tiles | None) -> tuple[AnyView, Extent]:
    """A view, or its tiles, where only some rows are at hand."""
    if tiles is None:
        columns = (0, part.view.shape[2])
        return part.view, Extent(groups=part.groups, rows=part.rows, columns=columns)
    count = tiles.tiles_per_group
    view = Tiles(
        name=tiles.name,
        base=part.view,
        rows=(0, 1, part.view.shape[1]),
        columns=tiles.columns,
    )
    groups = (part.groups[0] * count, part.groups[1] * count)
    return view, Extent(groups=groups, rows=part.rows, columns=(0, tiles.shape[2]))


def _with_extent(piece: PlannedView, view: AnyView, extent: Extent) -> PlannedView:
    """A part of a piece. Written out: there may be a million, and ``replace`` takes long."""
    return PlannedView(
        param=piece.param,
        view=view,
        bias=piece.bias,
        number=piece.number,
        first_group=piece.first_group,
        key=piece.key,
        piece=piece.piece,
        extent=extent,
    )


def _exchanged(
    piece: PlannedView, owners: dict[int, int], size: int, split: bool, slices_of: SlicesOf
) -> list[Share]:
    """Every rank has the gradient: one works on all of it, or each on a slice."""
    if not _is_sliced(piece, split):
        return [Share(view=piece, rank=owners[piece.param])]
    found = slices_of(piece.view, is_flat(piece), size)
    return [
        Share(view=_with_extent(piece, view, extent), rank=rank) for rank, view, extent in found
    ]


def _slices_of(view: AnyView, elementwise: bool, size: int) -> Parts:
    """Each rank's slice of a view that all of them have."""
    sliced = _slice_flat if elementwise else _slice_rows
    length = view.shape[2 if elementwise else 1]
    return [
        (rank, *sliced(view, start, stop))
        for rank, (start, stop) in enumerate(chunk_ranges(length, size))
        if start < stop
    ]


def _slice_flat(view: AnyView, start: int, stop: int) -> tuple[AnyView, Extent]:
    length = view.numel
    part = ParamView(
        split=(1, 1, length),
        narrows=((2, start, stop - start),),
        order=(0, 1, 2),
        shape=(1, 1, stop - start),
    )
    return part, _slice_extent(start, stop)


def _slice_rows(view: AnyView, start: int, stop: int) -> tuple[AnyView, Extent]:
    groups, _, columns = view.shape
    if isinstance(view, Tiles):
        base, cut = view.base, view.columns
    else:
        assert isinstance(view, ParamView)
        base, cut = view, (0, 1, columns)
    part = Tiles(name=view.name, base=base, rows=(start, 1, stop - start), columns=cut)
    return part, Extent(groups=(0, groups), rows=(start, stop), columns=(0, columns))


def _slice_extent(start: int, stop: int) -> Extent:
    return Extent(groups=(0, 1), rows=(0, 1), columns=(start, stop))


def _sums(pieces: Sequence[PlannedView], shares: Sequence[Share]) -> dict[str, Any]:
    """Where the sums over blocks of each piece have their place, and who leads each group."""
    num_groups = {piece.piece: piece.view.shape[0] for piece in pieces}
    holders: dict[int, dict[int, int]] = defaultdict(dict)
    for share in shares:
        extent = share.view.extent
        if share.view.role == MAIN and extent is not None and share.rank is not None:
            found = holders[share.view.piece]
            if len(found) < num_groups[share.view.piece]:
                for group in range(*extent.groups):
                    found.setdefault(group, share.rank)
    sums: dict[int, tuple[SumKind, int]] = {}
    leaders: dict[int, tuple[int, ...]] = {}
    counts: dict[SumKind, int] = defaultdict(int)
    for piece in pieces:
        if piece.piece in holders:
            groups, kind = piece.view.shape[0], sum_kind(piece)
            sums[piece.piece] = kind, counts[kind]
            counts[kind] += groups
            leaders[piece.piece] = tuple(holders[piece.piece][group] for group in range(groups))
    return {"sums": sums, "leaders": leaders, "places": dict(counts)}
