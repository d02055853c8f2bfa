"""Which parameter gets which view and algorithm, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_precond.optim.layout import joint_biases
from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.optim.options import Recipe
from hf_precond.preconditioners.base import FALLBACK, GRAFT, MAIN, Placement, placement
from hf_precond.registry import assign_layers, resolve
from hf_precond.views.rules import Rule
from hf_precond.views.tiles import tile
from hf_precond.views.view import ParamView


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """One parameter of the explanation table.

    Attributes:
        view: its views, ``G x [M, B]`` each, and their tiles.
        algorithm: registry name, the graft partner's step, or the fallback's name.
        rank: rank used for each view; empty where the algorithm has none.
        state_bytes: bytes of its optimizer state.
        reason: why.
    """

    parameter: str
    shape: tuple[int, ...]
    view: str
    algorithm: str
    rank: str
    state_bytes: int
    reason: str


def explain_groups(
    model: nn.Module, name: str, *, rules: Iterable[Rule] | None = None, **options: Any
) -> list[GroupRow]:
    """Returns one row per trainable parameter of ``model`` under optimizer ``name``.

    Raises:
        ValueError: for an unknown name or option, or a value that is not allowed.
    """
    recipe = resolve(name, options)
    assigned = assign_layers(model, recipe, rules)
    optimizer = PreconditionedOptimizer(
        [
            {
                "params": [(info.name, info.param) for info, _, _ in assigned],
                "views": [[view.to_plain() for view in found.views] for _, found, _ in assigned],
                "layers": [layer for _, _, layer in assigned],
            }
        ],
        recipe,
    )
    with_weight = set(joint_biases(optimizer.param_groups, recipe.algorithm).values())
    state_bytes = [0] * len(assigned)
    for index, _, meta in optimizer.state_layout():
        state_bytes[index] += meta.numel() * meta.element_size()
    ranks = _ranks(optimizer)
    rows = []
    for index, ((info, found, _), size) in enumerate(zip(assigned, state_bytes, strict=True)):
        joint = index in with_weight
        places = [placement(recipe.algorithm, view.shape) for view in found.views]
        rows.append(
            GroupRow(
                parameter=info.name,
                shape=tuple(info.param.shape),
                view="; ".join(_words(*pair) for pair in zip(found.views, places, strict=True))
                or "-",
                algorithm=recipe.name if joint else _algorithm_words(recipe, places),
                rank="/".join(str(rank) for rank in sorted(ranks[index])),
                state_bytes=size,
                reason="; ".join(
                    dict.fromkeys(
                        ["trained with its weight" if joint else found.reason]
                        + [at.reason for at in places if at.reason]
                    )
                ),
            )
        )
    return rows


def _ranks(optimizer: PreconditionedOptimizer) -> dict[int, set[int]]:
    """The ranks of each parameter's views; empty where the algorithm has none."""
    found: dict[int, set[int]] = defaultdict(set)
    effective_rank = getattr(optimizer.recipe.algorithm, "effective_rank", None)
    for item in optimizer.placed():
        if item.place.role == MAIN and item.rank:
            found[item.param].add(item.rank)
        elif item.place.role == MAIN and effective_rank is not None:
            found[item.param].add(effective_rank(item.view.shape))
    return found


def _words(view: ParamView, place: Placement) -> str:
    """The view, and the tiles it is cut into."""
    if place.tile is None or tile(view, *place.tile) == (view,):
        return str(view)
    rows, columns = (min(pair) for pair in zip(place.tile, view.shape[1:], strict=True))
    return f"{view} in tiles of {rows}x{columns}"


def _algorithm_words(recipe: Recipe, places: list[Placement]) -> str:
    words = {
        MAIN: recipe.name,
        GRAFT: "graft step",
        FALLBACK: recipe.fallback.fallback,
    }
    return "/".join(dict.fromkeys(words[place.role] for place in places)) or words[FALLBACK]


def format_table(rows: Iterable[GroupRow]) -> str:
    """Returns the rows as an aligned text table with a header."""
    header = ("parameter", "shape", "view", "algorithm", "rank", "state", "why")
    lines = [header] + [
        (
            row.parameter,
            "x".join(map(str, row.shape)),
            row.view,
            row.algorithm,
            row.rank,
            format_bytes(row.state_bytes),
            row.reason,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def format_bytes(size: int) -> str:
    """Returns a byte count in words, for example ``"1.5 MiB"``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
