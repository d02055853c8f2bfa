"""``hf-precond estimate``: state, operations and communication of optimizers, before a run."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from trainer_ext.arguments import parse_optim_args
from trainer_ext.commands.models import ModelOption, OptimArgsOption, OptimOption, meta_model
from trainer_ext.commands.output import JsonOption, print_json
from trainer_ext.memory_plan import PARALLEL, Mesh
from trainer_ext.plan_report import format_report, plan_result

DTYPES = ("float32", "bfloat16")
RanksOption = Annotated[int, typer.Option(help="Number of all ranks.", min=1)]
ParallelOption = Annotated[str, typer.Option(help=f"How they train: {', '.join(PARALLEL)}.")]
ReplicasOption = Annotated[int, typer.Option(help="Of the rows, in hsdp.", min=1)]
PositionsOption = Annotated[int, typer.Option(help="Tokens of a rank and step.", min=1)]
DtypeOption = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]


def estimate_command(
    model: ModelOption,
    optim: OptimOption,
    optim_args: OptimArgsOption = None,
    ranks: RanksOption = 1,
    parallel: ParallelOption = "ddp",
    replicas: ReplicasOption = 1,
    positions: PositionsOption = 4096,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """State, operations and bytes sent per step and rank, beside AdamW's. Nothing is allocated."""
    options = parse_optim_args(optim, optim_args).options
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    mesh = Mesh(ranks=ranks, parallel=parallel, replicas=replicas, positions=positions)
    planned = [(optim, optim_args or "", options)]
    result = plan_result(meta_model(model, getattr(torch, dtype)), mesh, planned)
    if as_json:
        print_json(result)
    else:
        print(format_report(result))
