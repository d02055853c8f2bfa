#!/usr/bin/env python
"""Measures what optimizers send and how long they step on several ranks, against their plan.

    scripts/bench_ranks.py --preset llama-9m --ranks 1 2 --output results/bench_ranks.json

Starts the ranks itself: processes on this machine that talk by gloo, one thread each. Every rank
has all contenders, each with its own model. Bytes are those of one window of intervals, as they
are handed to collectives, beside what scripts/plan_memory.py plans for the first rank. Times are
those of optimizer.step() alone: each round runs all contenders for one cycle of steps in turn, so
that a slow minute of the machine hits all alike; the table gives medians over rounds of the slowest
rank's mean step. Gradients are random numbers, because what counts is their shapes.

On one machine the ranks share memory bandwidth and cores, and what they send goes through the
machine's own network stack: bytes carry over to other machines, times do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_precond import resolve
from trainer_ext.arguments import parse_optim_args
from trainer_ext.build import build_optimizer
from trainer_ext.data.presets import PRESETS, override_config, preset_config
from trainer_ext.memory_plan import Mesh, SharedWork, passes_traffic, rehearse, window
from trainer_ext.planned_rank import Traffic
from trainer_ext.provenance import provenance
from trainer_ext.reports import write_json
from trainer_ext.timing import now

CPU = torch.device("cpu")
ADAMW = "adamw"
# Parallelism, optimizer and options of each contender.
DEFAULT = [
    "ddp/adamw",
    "ddp/shared_basis_adam:sharding=replicated",
    "ddp/shared_basis_adam:sharding=owner",
    "ddp/shared_basis_adam:sharding=blocks",
    "fsdp2/shared_basis_adam",
    "ddp/soap:sharding=owner",
    "fsdp2/soap:sharding=owner",
]
# Where an operation has what a rank puts in; outputs come first where both are there.
_SENT = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
}
Handed = dict[str, int]
"""Kind of collective -> bytes that a rank puts in."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ranks, prints the tables and writes the JSON file."""
    args = parse_arguments(argv)
    load = os.getloadavg()[0]
    runs = {world: run_ranks(world, args) for world in args.ranks}
    result = {
        **provenance(__file__, args),
        "load_average": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
        "rows": [row_of(label, runs, args) for label in args.contenders],
    }
    print(format_report(result))
    if args.output is not None:
        write_json(args.output, result)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="llama-9m")
    parser.add_argument("--config_overrides", default="", help="of the preset, hidden_size=128,...")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=DEFAULT,
        metavar="PARALLEL/NAME[:OPTIONS]",
        help="as fsdp2/soap:sharding=owner",
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--cycle", type=int, default=10, help="steps per contender and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file, as results/bench_ranks.json")
    return parser.parse_args(argv)


# --- on the ranks ---------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Contender:
    """One optimizer with its own copy of the model.

    Attributes:
        passes: bytes of a forward and backward pass.
        steps: bytes of the steps of one window.
        rounds_s: mean seconds of a step in each round.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    passes: Handed = field(default_factory=dict)
    steps: Handed = field(default_factory=dict)
    rounds_s: list[float] = field(default_factory=list)
    number: int = 0

    def step(self) -> float:
        """Takes a step from random gradients, the same on all ranks; returns its seconds."""
        self.number += 1
        torch.manual_seed(self.number)
        for param in self.model.parameters():
            local_part(param.grad).normal_()
        dist.barrier()
        start = now(CPU)
        self.optimizer.step()
        return now(CPU) - start


class Collectives(TorchDispatchMode):
    """While it is entered, adds up what this rank puts into collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: Handed = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Counts a collective and lets it pass."""
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            if name in _SENT:
                kind, place = _SENT[name]
                self.handed[kind] += bytes_of(args[place])
        return func(*args, **(kwargs or {}))


def run_ranks(world: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts ranks and returns what each has measured: contender -> figures."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        mp.spawn(measure, args=(world, args, folder), nprocs=world)
        paths = [Path(folder) / f"rank-{rank}.pt" for rank in range(world)]
        return [torch.load(path, weights_only=True) for path in paths]


def measure(rank: int, world: int, args: argparse.Namespace, folder: str) -> None:
    """One rank: counts what each contender sends, then times all of them in turn."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=10),
    )
    contenders = {label: new_contender(label, args) for label in args.contenders}
    for contender in contenders.values():
        count_bytes(contender, args)
    for _ in range(args.rounds):
        for contender in contenders.values():
            times = [contender.step() for _ in range(args.cycle)]
            contender.rounds_s.append(sum(times) / len(times))
    found = {
        label: {"passes": c.passes, "steps": c.steps, "rounds_s": c.rounds_s}
        for label, c in contenders.items()
    }
    torch.save(found, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


def new_contender(label: str, args: argparse.Namespace) -> Contender:
    """A contender with the gradients of one batch, and what that batch sent."""
    parallel, name, options = parts_of(label)
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config_of(args))
    if parallel == "fsdp2":
        for layer in model.get_decoder().layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer: torch.optim.Optimizer
    if name == ADAMW:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        optimizer = build_optimizer(model, name, lr=1e-4, **options)
    trained = model if parallel == "fsdp2" else DistributedDataParallel(model)
    contender = Contender(model=model, optimizer=optimizer)
    tokens = torch.randint(model.config.vocab_size, (1, 16))
    with Collectives() as wire:
        trained(input_ids=tokens, labels=tokens).loss.backward()
    contender.passes = dict(wire.handed)
    return contender


def count_bytes(contender: Contender, args: argparse.Namespace) -> None:
    """Steps up to the window that is planned for, and counts in it."""
    recipe = getattr(contender.optimizer, "recipe", None)
    steps = range(2, 3) if recipe is None else window(recipe)
    while contender.number < steps[0] - 1:
        contender.step()
    total: Handed = defaultdict(int)
    for _ in steps:
        before = Collectives()
        contender.number += 1
        with before:
            contender.optimizer.step()
        for kind, handed in before.handed.items():
            total[kind] += handed
    contender.steps = {kind: round(handed / len(steps)) for kind, handed in total.items()}


def config_of(args: argparse.Namespace) -> Any:
    """The configuration of the model."""
    config = preset_config(args.preset)
    if args.config_overrides:
        override_config(config, args.config_overrides)
    return config


def parts_of(label: str) -> tuple[str, str, Mapping[str, Any]]:
    """Parallelism, name and options of a contender."""
    parallel, _, rest = label.partition("/")
    name, _, text = rest.partition(":")
    return parallel, name, {} if name == ADAMW else parse_optim_args(name, text).options


def local_part(tensor: Any) -> Tensor:
    """What this rank has of a tensor."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def bytes_of(value: Any) -> int:
    """Bytes of a tensor, or of all in nested lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_of, value))


# --- the report -----------------------------------------------------------------------------------


def planned(label: str, world: int, args: argparse.Namespace) -> tuple[Handed, Handed]:
    """Bytes of the passes and of a mean step that the plan foresees for the first rank."""
    parallel, name, options = parts_of(label)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(args))
    mesh = Mesh(ranks=world, parallel=parallel, positions=16, device="cpu")
    passes = by_kind(passes_traffic(model, mesh))
    if name == ADAMW:
        return passes, {}
    optimizer = build_optimizer(model, name, lr=1e-4, **options)
    optimizer.detach()
    _, traffic = rehearse(SharedWork(optimizer, mesh).planned_rank(0))
    return passes, by_kind(traffic)


def by_kind(traffic: Traffic) -> Handed:
    """Bytes handed to collectives of each kind, whatever for."""
    found: dict[str, float] = defaultdict(float)
    for (_, kind), sent in traffic.items():
        found[kind] += sent.handed
    return {kind: round(handed) for kind, handed in found.items()}


def row_of(
    label: str, runs: Mapping[int, Sequence[Mapping[str, Any]]], args: argparse.Namespace
) -> dict[str, Any]:
    """What was measured and planned of one contender, on each number of ranks."""
    _, name, options = parts_of(label)
    row: dict[str, Any] = {"name": label}
    if name != ADAMW:
        row["steps_counted"] = len(window(resolve(name, options)))
    for world, ranks in runs.items():
        times = [max(pair) for pair in zip(*(r[label]["rounds_s"] for r in ranks), strict=True)]
        figures: dict[str, Any] = {
            "step_ms": 1e3 * statistics.median(times),
            "rounds_ms": [1e3 * seconds for seconds in times],
        }
        if world > 1:
            passes, steps = planned(label, world, args)
            first = ranks[0][label]
            figures["passes_bytes"] = {"measured": first["passes"], "planned": passes}
            figures["step_bytes"] = {"measured": first["steps"], "planned": steps}
        row[f"ranks_{world}"] = figures
    return row


def format_report(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    worlds = [key for key in result["rows"][0] if key.startswith("ranks_")]
    lines = [
        f"load average {result['load_average']['before']} before, "
        f"{result['load_average']['after']} after",
        "",
        f"| contender | {' | '.join(f'step ms, {key[6:]} ranks' for key in worlds)} |",
        f"|---|{'---:|' * len(worlds)}",
    ]
    for row in result["rows"]:
        times = " | ".join(f"{row[key]['step_ms']:.1f}" for key in worlds)
        lines.append(f"| {row['name']} | {times} |")
    lines += ["", "| contender | ranks | collective | measured bytes | planned |"]
    lines.append("|---|---:|---|---:|---:|")
    for row in result["rows"]:
        for key in worlds:
            for part in ("passes_bytes", "step_bytes"):
                lines += byte_lines(row["name"], key[6:], part, row[key].get(part))
    return "\n".join(lines)


def byte_lines(name: str, ranks: str, part: str, found: Mapping[str, Handed] | None) -> list[str]:
    """One line for each kind of collective."""
    if found is None:
        return []
    where = "passes" if part == "passes_bytes" else "step"
    measured, planned = found["measured"], found["planned"]
    return [
        f"| {name} | {ranks} | {where}: {kind} | {measured.get(kind, 0):,} | "
        f"{planned.get(kind, 0):,} |"
        for kind in sorted({*measured, *planned})
    ]


if __name__ == "__main__":
    sys.exit(main())
