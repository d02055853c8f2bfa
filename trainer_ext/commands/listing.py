"""``hf-precond list``: all optimizers, one per line."""

from __future__ import annotations

from hf_precond.registry import list_optimizers, optimizer_info
from trainer_ext.commands.output import JsonOption, print_json


def list_command(as_json: JsonOption = False) -> None:
    """All optimizers, one per line."""
    infos = [optimizer_info(name) for name in list_optimizers()]
    if as_json:
        print_json([{"name": info.name, "summary": info.summary} for info in infos])
        return
    width = max(len(info.name) for info in infos)
    for info in infos:
        print(f"{info.name:<{width}}  {info.summary}")
