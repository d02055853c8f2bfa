"""The command line: ``hf-precond list | explain | run`` and ``python -m trainer_ext SCRIPT ...``.

A mistake of the command line ends with one line on stderr and exit status 2. Errors inside a script
that is run are the script's own.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_precond.explain import format_table
from hf_precond.registry import list_optimizers, optimizer_info
from trainer_ext.arguments import parse_optim_args
from trainer_ext.build import explain_groups
from trainer_ext.optim_names import register


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``hf-precond``."""
    parser = _Parser(prog="hf-precond", description="Preconditioned optimizers for transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all optimizers, one per line")
    explain = commands.add_parser("explain", help="which parameter gets which algorithm, and why")
    explain.add_argument("--model", required=True, help="folder or Hub name of a model or config")
    explain.add_argument("--optim", required=True, help="name of the optimizer")
    explain.add_argument("--optim_args", help="its options, as rank=32,update_interval=10")
    _add_script(commands.add_parser("run", help="run a Hugging Face script with our optimizers"))
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            print(list_text())
        elif args.command == "explain":
            print(explain_text(args.model, args.optim, args.optim_args))
        else:
            _check_script(args.script)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.command == "run":
        run_script(args.script, args.script_args)


def run_main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m trainer_ext``, also under torchrun and accelerate launch."""
    parser = _Parser(prog="python -m trainer_ext", description="Runs a Hugging Face script.")
    _add_script(parser)
    args = parser.parse_args(argv)
    try:
        _check_script(args.script)
    except ValueError as error:
        parser.error(str(error))
    run_script(args.script, args.script_args)


def run_script(script: str, script_args: Sequence[str]) -> None:
    """Runs ``script`` as ``python SCRIPT ARGS`` would, with our optimizers registered before."""
    register()
    sys.argv = [script, *script_args]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def list_text() -> str:
    """Returns one line per optimizer: name and summary."""
    names = list_optimizers()
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {optimizer_info(name).summary}" for name in names)


def explain_text(model: str, name: str, optim_args: str | None) -> str:
    """Returns the table of all parameters of a model under one optimizer.

    Raises:
        ValueError: unknown name or option.
        OSError: the model's config cannot be found.
    """
    options = parse_optim_args(name, optim_args).options
    return format_table(explain_groups(meta_model(model), name, **options))


def meta_model(name: str) -> nn.Module:
    """Returns the model of a config, without memory for its weights."""
    config = AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, None)
    with torch.device("meta"):
        return (
            AutoModelForCausalLM.from_config(config) if model_class is None else model_class(config)
        )


def _add_script(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", help="the script, for example run_clm.py")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, help="its own arguments")


def _check_script(script: str) -> None:
    if not Path(script).is_file():
        raise ValueError(f"there is no script {script!r}")
