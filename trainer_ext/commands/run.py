"""``hf-precond run SCRIPT ...``: an unmodified Hugging Face script with our optimizers."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from trainer_ext.optim_names import register

ScriptArgument = Annotated[
    str, typer.Argument(metavar="SCRIPT", help="The script, for example run_clm.py.")
]
ScriptArguments = Annotated[
    list[str] | None, typer.Argument(metavar="...", help="Its own arguments.")
]
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Of the command: what follows the script's name is the script's."""


def run_command(script: ScriptArgument, script_args: ScriptArguments = None) -> Callable[[], None]:
    """Run an unmodified Hugging Face script with our optimizers."""
    if not Path(script).is_file():
        raise ValueError(f"there is no script {script!r}")
    return partial(run_script, script, script_args or [])


def run_script(script: str, script_args: Sequence[str]) -> None:
    """Runs ``script`` as ``python SCRIPT ARGS`` would, with our optimizers registered before."""
    register()
    sys.argv = [script, *script_args]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
