"""``hf-precond explain``: which parameter gets which algorithm, and why."""

from __future__ import annotations

from dataclasses import asdict

from hf_precond.explain import format_table
from trainer_ext.arguments import parse_optim_args
from trainer_ext.build import explain_groups
from trainer_ext.commands.models import ModelOption, OptimArgsOption, OptimOption, meta_model
from trainer_ext.commands.output import JsonOption, print_json


def explain_command(
    model: ModelOption,
    optim: OptimOption,
    optim_args: OptimArgsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Which parameter gets which algorithm, and why."""
    options = parse_optim_args(optim, optim_args).options
    rows = explain_groups(meta_model(model), optim, **options)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        print(format_table(rows))
