"""``hf-precond train CONFIG.yaml``: one of this project's tasks, from its configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hf_precond.registry import nearest

TASKS = (
    "language_model",
    "image_classifier",
    "autoencoder",
    "tagger",
    "translation",
    "clicks",
)
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Of the command: what follows the configuration is the task's."""

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Options of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="...", help="Changes to it: --key value ...")
]
TaskOption = Annotated[str, typer.Option(help=f"What to train: {', '.join(TASKS)}.")]


def train_command(
    config: ConfigArgument, overrides: Overrides = None, task: TaskOption = TASKS[0]
) -> Callable[[], None]:
    """Train a model of ours from a YAML file, as scripts/train_*.py do."""
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}.{nearest(task, TASKS)}")
    if not Path(config).is_file():
        raise ValueError(f"there is no configuration {config!r}")
    try:
        program = importlib.import_module(f"trainer_ext.tasks.{task}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"task {task!r} needs the package {error.name!r}: pip install 'hf-precond[scripts]'"
        ) from error
    return partial(program.main, [config, *(overrides or [])])
