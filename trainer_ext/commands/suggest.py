"""``hf-precond suggest``: the largest rank that fits a budget of optimizer state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from torch import nn

from hf_precond.explain import format_bytes
from hf_precond.registry import list_optimizers, nearest, option_specs
from trainer_ext.arguments import parse_optim_args
from trainer_ext.build import build_optimizer
from trainer_ext.commands.models import ModelOption, OptimArgsOption, meta_model
from trainer_ext.commands.output import JsonOption, print_json
from trainer_ext.memory_plan import Mesh, plan_adamw

RANK = "rank"
# More columns than this bring nothing but time.
MAX_RANK = 1024
# A basis of many columns is updated less often: its updates are most of a step's operations.
INTERVALS = ((64, 1), (128, 2), (MAX_RANK, 5))
_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_BUDGET = re.compile(r"([0-9.]+) *([a-zA-Z]+)")

BudgetOption = Annotated[
    str,
    typer.Option(help="State to spend: 1.0x is AdamW's, or a size such as 800MiB."),
]
RankedOption = Annotated[str, typer.Option(help="An optimizer that has a rank.")]


def suggest_command(
    model: ModelOption,
    budget: BudgetOption = "1.1x",
    optim: RankedOption = "two_sided_basis",
    optim_args: OptimArgsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The largest rank that fits a budget of optimizer state, and an interval that suits it."""
    check_ranked(optim)
    options = parse_optim_args(optim, optim_args).options
    if RANK in options:
        raise ValueError(f"optim_args={optim_args!r} has a rank already; suggest is to find it")
    network = meta_model(model)
    adamw = plan_adamw(network, Mesh(ranks=1)).state_bytes[0]
    limit = budget_bytes(budget, adamw)
    rank, size = largest_rank(network, optim, options, limit)
    interval = next(interval for most, interval in INTERVALS if rank <= most)
    text = ",".join([f"{RANK}={rank}", f"update_interval={interval}", *filter(None, [optim_args])])
    if as_json:
        print_json(
            {
                "optim": optim,
                "optim_args": text,
                "rank": rank,
                "update_interval": interval,
                "state_bytes": size,
                "budget_bytes": limit,
                "adamw_state_bytes": adamw,
            }
        )
        return
    print(f"--optim {optim} --optim_args {text}")
    print(
        f"state {format_bytes(size)}, {size / adamw:.2f} of AdamW's {format_bytes(adamw)}; budget "
        f"{format_bytes(limit)}"
    )


def check_ranked(name: str) -> None:
    """Raises ValueError for an optimizer without a rank or an interval of its updates."""
    able = [
        other for other in list_optimizers() if {RANK, "update_interval"} <= {*option_specs(other)}
    ]
    if name not in able:
        option_specs(name)  # an unknown name has its own message
        raise ValueError(
            f"optim={name!r} has no rank.{nearest(name, able)} Those that have: {', '.join(able)}"
        )


def budget_bytes(text: str, adamw: int) -> int:
    """The bytes that a budget means.

    Raises:
        ValueError: neither a multiple of AdamW's state nor a size.

    >>> budget_bytes("1.5x", 100), budget_bytes("2KiB", 100)
    (150, 2048)
    """
    found = _BUDGET.fullmatch(text.strip())
    unit = found[2].upper() if found else ""
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if number <= 0 or unit not in {"X", *_UNITS}:
        raise ValueError(
            f"budget={text!r} must be a multiple of AdamW's state such as 1.0x, or a size in "
            f"{', '.join(('B', 'KiB', 'MiB', 'GiB', 'TiB'))}"
        )
    return round(number * (adamw if unit == "X" else _UNITS[unit]))


def largest_rank(
    model: nn.Module, name: str, options: Mapping[str, Any], limit: int
) -> tuple[int, int]:
    """The largest rank whose planned state is within a limit, and that state's bytes.

    Raises:
        ValueError: not even rank 1 is.
    """
    low, high = 0, MAX_RANK + 1
    sizes = {1: planned_state(model, name, {**options, RANK: 1})}
    if sizes[1] > limit:
        raise ValueError(
            f"{name} with rank=1 has {format_bytes(sizes[1])} of state, above the budget of "
            f"{format_bytes(limit)}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        sizes[middle] = planned_state(model, name, {**options, RANK: middle})
        low, high = (middle, high) if sizes[middle] <= limit else (low, middle)
    # Ranks above those that matrices can have change nothing more.
    smallest = min(rank for rank, size in sizes.items() if size == sizes[low] and rank <= low)
    return smallest, sizes[low]


def planned_state(model: nn.Module, name: str, options: Mapping[str, Any]) -> int:
    """Bytes of the state that a first step makes."""
    optimizer = build_optimizer(model, name, lr=1e-3, **options)
    optimizer.detach()
    return sum(row.state_bytes for row in optimizer.plan())
