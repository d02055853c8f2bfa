"""The plan of work: what it must hold whatever the ranks, and that layers alike get the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond import resolve
from hf_precond.optim.layout import pieces_of, placed_views, take_views
from hf_precond.optim.work import GATHERED, Home, Share, Work, plan_work, work_cost
from hf_precond.views.plan import PlannedView
from hf_precond.views.shards import chunk_ranges
from hf_precond.views.view import rows

# Shapes and groups of rows (none: elementwise), most of them twice with others between them.
LAYERS: list[tuple[tuple[int, ...], int | None]] = [
    ((12, 8), 1),
    ((5, 7), 1),
    ((12, 8), 3),
    ((8,), None),
    ((30, 4), 1),
    ((12, 8), 1),
    ((2**14,), None),
    ((11, 4), None),
    ((12, 8), 3),
    ((5, 7), 1),
    ((8,), None),
    ((11, 4), None),
]
SIZES = (1, 2, 3, 5, 8)
NAMES = ("shared_basis_adam", "soap")
MODES = ("auto", "owner", "blocks")


def homes(params: list[Tensor], size: int, kind: str) -> list[Home]:
    """Whole on every rank, cut by rows as FSDP2 does, or one and the other by turns."""
    cut = [Home(ranges=tuple(chunk_ranges(p.shape[0], size)), whole=False) for p in params]
    whole = [Home() for _ in params]
    mixed = [(cut if i % 2 else whole)[i] for i in range(len(params))]
    return {"whole": whole, "rows": cut, "mixed": mixed}[kind]


def planned(
    name: str,
    layers: Sequence[tuple[tuple[int, ...], int | None]],
    *,
    size: int,
    kind: str,
    mode: str,
) -> tuple[list[PlannedView], Work]:
    """All pieces of parameters of these shapes, and the plan of them."""
    params = [torch.empty(shape, device="meta") for shape, _ in layers]
    views = [[] if groups is None else [rows(shape, groups=groups)] for shape, groups in layers]
    plain = [[view.to_plain() for view in of_param] for of_param in views]
    group: dict[str, Any] = {"params": params, "views": plain}
    take_views(group)
    algorithm = resolve(name).algorithm
    pieces = pieces_of(placed_views([group], algorithm), params, max_elements=2**26)
    work = plan_work(*(pieces, params, homes(params, size, kind), algorithm), mode=mode, size=size)
    return pieces, work


def parts(shares: Sequence[Share]) -> list[tuple[Any, ...]]:
    """What the shares are. Who owns a whole view depends on what else there is."""
    return [
        (share.rank if share.view.extent else None, share.view.view, share.view.extent)
        for share in shares
    ]


@pytest.mark.parametrize("kind", ["whole", "rows", "mixed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_every_entry_of_every_view_is_worked_on_once(
    size: int, name: str, mode: str, kind: str
) -> None:
    pieces, work = planned(name, LAYERS, size=size, kind=kind, mode=mode)
    assert [piece.piece for piece in pieces] == list(range(len(pieces)))
    for piece in pieces:
        shares = [share for share in work.shares if share.view.piece == piece.piece]
        if [share.rank for share in shares] == [None]:
            assert shares[0].view == piece
            continue
        counts = torch.zeros(piece.view.shape, dtype=torch.int)
        for share in shares:
            assert share.rank in range(size)
            extent = share.view.extent
            if extent is None:
                assert share.view == piece
                counts += 1
            else:
                ranges = (extent.groups, extent.rows, extent.columns)
                assert share.view.view.shape == tuple(high - low for low, high in ranges)
                counts[tuple(slice(*pair) for pair in ranges)] += 1
        assert (counts == 1).all(), piece


@pytest.mark.parametrize("kind", ["whole", "rows"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_has_the_shares_it_would_have_alone(name: str, mode: str, kind: str) -> None:
    """What is found once for layers that are alike belongs to each of them."""
    _, work = planned(name, LAYERS, size=3, kind=kind, mode=mode)
    for index, layer in enumerate(LAYERS):
        _, alone = planned(name, [layer], size=3, kind=kind, mode=mode)
        assert work.routes[index] == alone.routes[0]
        own = [share for share in work.shares if share.view.param == index]
        assert parts(own) == parts(alone.shares)


@pytest.mark.parametrize("size", SIZES)
def test_the_costliest_go_first_each_to_the_rank_with_least(size: int) -> None:
    pieces, work = planned("soap", LAYERS, size=size, kind="whole", mode="owner")
    shares = [share for share in work.shares if share.view.extent is None]
    loads = [0] * size
    order = sorted(shares, key=lambda share: (-work_cost(share.view.view), share.view.param))
    assert len(order) == len([piece for piece in pieces if piece.view.numel < 2**14])
    for share in order:
        # Of equal ranks the first.
        assert share.rank == loads.index(min(loads))
        loads[share.rank] += work_cost(share.view.view)


@pytest.mark.parametrize("size", SIZES[1:])
def test_leaders_are_the_first_that_have_a_group(size: int) -> None:
    pieces, work = planned("shared_basis_adam", LAYERS, size=size, kind="rows", mode="auto")
    assert work.sums
    for number, leaders in work.leaders.items():
        shares = [share for share in work.shares if share.view.piece == number]
        for group, leader in enumerate(leaders):
            ranks = [share.rank for share in shares if group in range(*share.view.extent.groups)]
            assert leader == min(ranks)
    by_kind = Counter[tuple[int, int]]()
    for number, (kind, first) in work.sums.items():
        assert kind == (pieces[number].view.shape[2], 0)
        assert first == by_kind[kind]
        by_kind[kind] += pieces[number].view.shape[0]
    assert work.places == by_kind


def test_gathered_parameters_have_owners() -> None:
    _, work = planned("soap", LAYERS, size=3, kind="rows", mode="owner")
    gathered = [index for index, route in enumerate(work.routes) if route == GATHERED]
    assert gathered
    assert sorted(work.owners) == gathered
    assert set(work.owners.values()) <= set(range(3))
