"""``hf-precond list``: all optimizers, one per line."""

from __future__ import annotations

from hf_precond.preconditioners.base import layer_needs
from hf_precond.registry import list_optimizers, optimizer_info, resolve
from trainer_ext.commands.output import JsonOption, print_json, print_table

NEEDS_LAYERS = "layers"
"""What methods need that look at the inputs of layers and at the gradients of their outputs."""


def list_command(as_json: JsonOption = False) -> None:
    """All optimizers, one per line: name, what it is, what it needs beside gradients, paper."""
    infos = [optimizer_info(name) for name in list_optimizers()]
    rows = [(info.name, info.summary, needs(info.name), info.paper) for info in infos]
    if as_json:
        keys = ("name", "summary", "needs", "paper")
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        print_table(("name", "what it is", "needs", "paper"), rows, wrap=1)


def needs(name: str) -> str:
    """What an optimizer needs beside gradients, empty for most."""
    return "" if layer_needs(resolve(name).algorithm) is None else NEEDS_LAYERS
