"""``hf-precond info NAME``: all about one optimizer."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import nn

from hf_precond import create_optimizer
from hf_precond.optim.work import rows_may_split
from hf_precond.registry import OptionSpec, optimizer_info, option_specs, resolve
from trainer_ext.arguments import as_text
from trainer_ext.commands.listing import needs
from trainer_ext.commands.output import JsonOption, print_json, print_table

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="As in `--optim NAME`.")]
# Sizes of an example layer: products and quotients of them, and ranks, are told apart. The second
# is for methods that take small tensors only.
_EXAMPLES = ((600, 840), (24, 40))


def info_command(name: NameArgument, as_json: JsonOption = False) -> None:
    """Formula in words, state, options and paper of one optimizer."""
    info, specs = optimizer_info(name), option_specs(name)
    memory = state_tensors(name)
    if as_json:
        print_json(
            {
                "name": info.name,
                "summary": info.summary,
                "formula": info.formula,
                "paper": info.paper,
                "needs": needs(name),
                "rows_may_split": rows_may_split(resolve(name).algorithm),
                "state": memory,
                "options": [option_row(spec) for spec in specs.values()],
            }
        )
        return
    print(f"{info.name}: {info.summary}\n\n{info.formula}\n")
    print(f"Paper: {info.paper}")
    if needs(name):
        print(
            "Needs: inputs of linear and convolution layers and gradients of their outputs, which"
        )
        print("       hooks on the model take (PrecondTrainer and --optim do that by themselves)")
    split = rows_may_split(resolve(name).algorithm)
    how = "on each rank's rows as they lie" if split else "by whole matrices, each on one rank"
    print(f"Several ranks: works {how}\n")
    print("State of a kernel [m outputs, n inputs], beside the weights:\n")
    print_table(("tensor", "shape"), [(key, " x ".join(sizes)) for key, sizes in memory.items()])
    numbers = numbers_per_weight(name)
    print(f"\nThat is {numbers:.2f} numbers a weight at {_EXAMPLES[0]}; AdamW has 2.\n")
    header = ("option", "default", "allowed", "what it is")
    rows = [tuple(map(str, option_row(spec).values())) for spec in specs.values()]
    print_table(header, rows)


def option_row(spec: OptionSpec) -> dict[str, str]:
    """An option as text, in the notation of ``optim_args``."""
    return {
        "name": spec.name,
        "default": as_text(spec.default),
        "allowed": spec.allowed or spec.type.__name__,
        "help": spec.help,
    }


def state_tensors(name: str) -> dict[str, list[str]]:
    """The state of one kernel, with its sizes in terms of m and n.

    >>> state_tensors("muon")
    {'exp_avg': ['m', 'n']}
    """
    shape, layout = _example_layout(name)
    return {key: _symbols(sizes, shape) for key, sizes in layout.items()}


def numbers_per_weight(name: str) -> float:
    """State of an example layer of 600 x 840 weights, in numbers for each weight."""
    shape, layout = _example_layout(name)
    return sum(torch.Size(sizes).numel() for sizes in layout.values()) / torch.Size(shape).numel()


def _example_layout(name: str) -> tuple[tuple[int, int], dict[str, tuple[int, ...]]]:
    for shape in _EXAMPLES:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
        optimizer = create_optimizer(model, name)
        if optimizer.plan()[0].algorithm == name:
            layout = {key: tuple(x.shape) for _, key, x in optimizer.state_layout() if x.ndim}
            return shape, layout
    raise AssertionError(f"no example layer is one of {name}'s")


def _symbols(sizes: tuple[int, ...], shape: tuple[int, int]) -> list[str]:
    m, n = shape
    known: dict[int, str] = {m: "m", n: "n", m * n: "m n", m // 4: "m/4", n // 8: "n/8"}
    # The first size counts groups: heads, or blocks of a neuron.
    kept: Any = sizes[1:] if len(sizes) > 1 and sizes[0] == 1 else sizes
    return [known.get(size, str(size)) for size in kept]
