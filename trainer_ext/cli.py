"""The command line: ``hf-precond COMMAND ...`` and ``python -m trainer_ext SCRIPT or COMMAND ...``.

A mistake of the command line ends with one line on stderr and exit status 2. Errors inside a script
that is run are the script's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from trainer_ext.commands import diagnose, run, train
from trainer_ext.commands.card import card_command
from trainer_ext.commands.convert import convert_command
from trainer_ext.commands.estimate import estimate_command
from trainer_ext.commands.explain import explain_command
from trainer_ext.commands.info import info_command
from trainer_ext.commands.inspect import inspect_command
from trainer_ext.commands.listing import list_command
from trainer_ext.commands.push import push_command
from trainer_ext.commands.suggest import suggest_command

app = typer.Typer(
    name="hf-precond",
    help="Preconditioned optimizers for transformers.",
    no_args_is_help=True,
    add_completion=False,
)
app.command("list")(list_command)
app.command("info")(info_command)
app.command("explain")(explain_command)
app.command("estimate")(estimate_command)
app.command("suggest")(suggest_command)
app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.command("card")(card_command)
app.command("push")(push_command)
app.command("train", context_settings=train.SETTINGS)(train.train_command)
app.command("diagnose", context_settings=diagnose.SETTINGS)(diagnose.diagnose_command)
app.command("run", context_settings=run.SETTINGS)(run.run_command)


def main(argv: Sequence[str] | None = None, program: str = "hf-precond") -> None:
    """Entry point of ``hf-precond``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        action = app(args=arguments, prog_name=program, standalone_mode=False)
    except TyperException as error:
        message = error.format_message()
        if not message:  # the help has been printed
            sys.exit(2)
        _fail(program, message)
    except (ValueError, OSError) as error:
        _fail(program, str(error))
    if callable(action):
        action()


def run_main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m trainer_ext``, also under torchrun and accelerate launch.

    A first word that is no command is a script: ``python -m trainer_ext run_clm.py ...``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else "--help"
    if not first.startswith("-") and first not in command_names():
        arguments.insert(0, "run")
    main(arguments, program="python -m trainer_ext")


def command_names() -> list[str]:
    """The names of all commands."""
    return [str(command.name) for command in app.registered_commands]


def _fail(program: str, message: str) -> None:
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
