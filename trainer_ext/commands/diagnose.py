"""``hf-precond diagnose``: what a training's own gradients say about the choice of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from trainer_ext.callbacks import FOR_EVERY_TRAINER
from trainer_ext.commands.run import ScriptArguments, run_command
from trainer_ext.commands.train import TASKS, TaskOption, train_command
from trainer_ext.diagnostics.callback import DiagnosticsCallback

SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Of the command: what follows the script's name is the script's."""

ProgramArgument = Annotated[
    str,
    typer.Argument(
        metavar="SCRIPT|CONFIG.yaml", help="A Trainer script, or a configuration as of `train`."
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the report; default: diagnostics in the run's own."),
]
StartOption = Annotated[
    list[int] | None, typer.Option(help="Steps done before a look; may be given several times.")
]
StepsOption = Annotated[int, typer.Option(help="Steps of a look.")]
LayersOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Names of kernels, as `*.attn.*`; default: of each kind the first, a middle, the last."
    ),
]
RankOption = Annotated[int, typer.Option(help="Rank at which the shared basis is run.")]
KFacOption = Annotated[bool, typer.Option("--kfac", help="Look at K-FAC variants, too (slow).")]


def diagnose_command(
    program: ProgramArgument,
    program_args: ScriptArguments = None,
    output: OutputOption = None,
    start: StartOption = None,
    steps: StepsOption = 32,
    layers: LayersOption = None,
    rank: RankOption = 8,
    kfac: KFacOption = False,
    task: TaskOption = TASKS[0],
) -> Callable[[], None]:
    """Begin a training, look at its gradients, write a report and stop; nothing else is saved.

    The report (index.html) says how well a shared basis, a diagonal, rotations and K-FAC fit the
    model, and which rank and grouping follow.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("diagnose needs the package 'matplotlib': pip install 'hf-precond[plots]'")
    new_callback = partial(
        DiagnosticsCallback,
        output,
        starts=tuple(start or (0,)),
        steps=steps,
        layers=layers,
        rank=rank,
        kfac=kfac,
        then_exit=True,
    )
    new_callback()  # a mistake shows now, not after the data is read
    if program.endswith((".yaml", ".yml")):
        action = train_command(program, program_args, task)
    else:
        action = run_command(program, program_args)
    return partial(_with_callback, new_callback, action)


def _with_callback(
    new_callback: Callable[[], DiagnosticsCallback], action: Callable[[], None]
) -> None:
    FOR_EVERY_TRAINER.append(new_callback)
    try:
        action()
    finally:
        FOR_EVERY_TRAINER.remove(new_callback)
