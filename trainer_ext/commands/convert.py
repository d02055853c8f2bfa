"""``hf-precond convert``: optimizer.pt to optimizer.safetensors and back, never executing code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.registry import option_specs
from trainer_ext import checkpoint
from trainer_ext.arguments import as_text, parse_optim_args
from trainer_ext.build import build_optimizer
from trainer_ext.checkpoint import load_optimizer, read_contents, save_optimizer
from trainer_ext.commands.models import ModelOption, OptimArgsOption, load_config, model_of
from trainer_ext.commands.output import JsonOption, print_json
from trainer_ext.resume import load_pickled, load_plain
from trainer_ext.state_files import write_atomically

SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="optimizer.pt, or a folder with safetensors.")
]
TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="A folder for safetensors, or optimizer.pt.")
]
OverwriteOption = Annotated[bool, typer.Option(help="Replace what is there.")]


def convert_command(
    source: SourceArgument,
    target: TargetArgument,
    model: ModelOption,
    optim_args: OptimArgsOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Optimizer state from optimizer.pt to optimizer.safetensors, or back. Runs no code of a file.

    An optimizer.pt does not hold the optimizer's options: give them as the run had them.
    """
    start, end = Path(source), Path(target)
    network = model_of(load_config(model))
    if start.suffix == ".pt":
        optimizer = from_pickled(start, network, optim_args)
        _refuse_what_is_there(checkpoint.has_optimizer(end), end, overwrite=overwrite)
        save_optimizer(optimizer, end)
    elif end.suffix == ".pt":
        optimizer = from_safetensors(start, network)
        _refuse_what_is_there(end.exists(), end, overwrite=overwrite)
        end.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(end, lambda path: torch.save(optimizer.state_dict(), path))
    else:
        raise ValueError(f"one of {source!r} and {target!r} must be a .pt file")
    if as_json:
        print_json({"optim": optimizer.algorithm_name, "written": str(end)})
    else:
        print(f"{optimizer.algorithm_name}: {source} -> {target}")


def from_pickled(path: Path, model: nn.Module, optim_args: str | None) -> PreconditionedOptimizer:
    """An optimizer of a model with the state of an optimizer.pt of ours.

    Raises:
        ValueError: no such file, a state of another optimizer or model, anything but plain data.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    groups = load_plain(path).get("param_groups") or [{}]
    name = groups[0].get("algorithm")
    if name is None:
        raise ValueError(f"{str(path)!r} is not of an optimizer of this package")
    options = parse_optim_args(name, optim_args).options
    optimizer = _like(groups, model, name, options)
    load_pickled(optimizer, path)
    return optimizer


def from_safetensors(folder: Path, model: nn.Module) -> PreconditionedOptimizer:
    """An optimizer of a model with the state and the options of a checkpoint's folder.

    Raises:
        ValueError: there is none, or it is damaged or of another model.
    """
    folder = folder.parent if folder.is_file() else folder
    if not checkpoint.has_optimizer(folder):
        raise ValueError(f"{str(folder)!r} holds no {checkpoint.FILE_NAME}")
    header, _ = read_contents(folder)
    groups = header["param_groups"]
    name = header["algorithm"]
    options = saved_options(name, header["hyperparameters"])
    optimizer = _like(groups, model, name, options)
    load_optimizer(optimizer, folder)
    return optimizer


def _like(
    groups: list[dict[str, Any]], model: nn.Module, name: str, options: Mapping[str, Any]
) -> PreconditionedOptimizer:
    """An optimizer with the groups of a saved one: those with decay and those without."""
    decay = max(group.get("weight_decay", 0.0) for group in groups)
    return build_optimizer(model, name, weight_decay=decay, lr=groups[0]["lr"], **options)


def saved_options(name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of an optimizer from the hyperparameters of a header, plain as JSON is."""
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    text = ",".join(f"{key}={as_text(plain[key])}" for key in option_specs(name) if key in plain)
    return parse_optim_args(name, text).options


def _refuse_what_is_there(exists: bool, path: Path, *, overwrite: bool) -> None:
    if exists and not overwrite:
        raise ValueError(f"{str(path)!r} has optimizer state already; --overwrite replaces it")
