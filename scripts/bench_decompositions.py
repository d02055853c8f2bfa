#!/usr/bin/env python
"""Times decompositions by width, or training steps with and without stagger.

    scripts/bench_decompositions.py --output results/bench_decompositions_cpu.json
    scripts/bench_decompositions.py --step_times adadiag shampoo --interval 20 \\
        --output results/bench_decompositions_cpu.json

Without --step_times every method factors one square matrix of each width, in float32. Each
repetition calls all methods in turn, so that a slow minute of the machine hits all alike. A method
that is expected to need more than --max_seconds at a width (its last time, tenfold per doubling) is
left out there, and the table says so.

With --step_times a small model is trained by every named optimizer, once with its refreshes spread
over the interval and once with all of them in the same step, in turn from step to step. The table
gives median, maximum and their ratio, of the whole step and of the optimizer's alone.

The two write different parts of the same JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_precond import PreconditionedOptimizer, option_specs
from hf_precond.linalg.eigen import eigh
from hf_precond.linalg.precision import highest_matmul_precision
from hf_precond.linalg.roots import inverse_root, positive_inverse
from hf_precond.linalg.subspace import orthogonal_iteration, orthonormal
from hf_precond.linalg.svd import thin_svd
from trainer_ext.arguments import parse_optim_args
from trainer_ext.build import build_optimizer
from trainer_ext.data.presets import PRESETS, override_config, preset_config
from trainer_ext.provenance import provenance
from trainer_ext.reports import write_json
from trainer_ext.timing import Cell, now, time_cells

WARM_UP_WIDTH = 16
INTERVALS = ("projection_interval", "inverse_interval", "basis_interval", "root_interval")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the two benchmarks, prints its table and writes its part of the JSON file."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    part = "step_times" if args.step_times else "decompositions"
    if args.step_times:
        rows = time_training(args, device)
        print(format_steps(rows))
    else:
        rows = [cell.as_row() for cell in time_widths(args, device)]
        print(format_widths(rows, args.max_seconds))
    if args.output is not None:
        content = {**provenance(__file__, args), "seed": args.seed, "device": str(device)}
        write_part(args.output, part, {**content, "rows": rows})
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--repetitions", type=int, default=5, help="calls of a method and width")
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=60.0,
        help="that a method may take at one width, all repetitions together",
    )
    parser.add_argument(
        "--step_times",
        nargs="+",
        metavar="NAME[:OPTIONS]",
        help="optimizers to train with, their options as in optim_args: adadiag:basis_method=qr",
    )
    parser.add_argument("--interval", type=int, default=20, help="steps between refreshes")
    parser.add_argument("--intervals", type=int, default=3, help="timed, after one to warm up")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="gpt2-7m")
    parser.add_argument("--config_overrides", default="", help="of the preset, n_embd=128,...")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per step")
    parser.add_argument("--block_size", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file; the other part of it is kept")
    args = parser.parse_args(argv)
    least = {"repetitions": 1, "interval": 1, "intervals": 2}
    for name, low in least.items():
        if getattr(args, name) < low:
            parser.error(f"--{name} {getattr(args, name)} is not allowed: it must be >= {low}")
    return args


# --- decompositions by width ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the methods factor, each ``[1, N, N]``.

    Attributes:
        gradient: with singular values that fall like those of a layer's gradient.
        factor: gradient times its transpose, of trace one.
        damped: the factor and a hundredth of its mean eigenvalue.
        basis: an orthonormal one, as if from the refresh before.
        ridge: a thousandth of the factor's mean eigenvalue, ``[1]``.
    """

    gradient: Tensor
    factor: Tensor
    damped: Tensor
    basis: Tensor
    ridge: Tensor

    @classmethod
    def draw(cls, width: int, seed: int, device: torch.device) -> Inputs:
        """Drawn on the CPU, so that every device factors the same matrices."""
        rng = torch.Generator().manual_seed(seed)
        gradient, other = torch.randn(2, 1, width, width, generator=rng)
        gradient = gradient * torch.arange(1, width + 1) ** -0.5
        factor = gradient @ gradient.mT
        factor = factor / factor.diagonal(dim1=-2, dim2=-1).sum()
        return cls(
            gradient=gradient.to(device),
            factor=factor.to(device),
            damped=(factor + 1e-2 / width * torch.eye(width)).to(device),
            basis=orthonormal(other.to(device)),
            ridge=torch.full((1,), 1e-3 / width, device=device),
        )


METHODS: Mapping[str, Callable[[Inputs], Any]] = {
    "svd": lambda x: thin_svd(x.gradient),
    "eigh": lambda x: eigh(x.factor),
    "qr": lambda x: orthogonal_iteration(x.factor, x.basis),
    "cholesky": lambda x: positive_inverse(x.damped),
    "root_eigh": lambda x: inverse_root(x.factor, 0.25, x.ridge, method="eigh"),
    "root_newton": lambda x: inverse_root(x.factor, 0.25, x.ridge, method="newton"),
}
WORDS: Mapping[str, str] = {
    "svd": "SVD",
    "eigh": "eigh",
    "qr": "QR (orthogonal iteration)",
    "cholesky": "inverse by Cholesky",
    "root_eigh": "inverse 4th root by eigh",
    "root_newton": "inverse 4th root by Newton",
}


@dataclass(kw_only=True)
class CallCell(Cell):
    """Calls of one method at one width.

    Attributes:
        calls_s: the times; none where the estimate was above the budget.
    """

    calls_s: list[float] = field(default_factory=list)

    @property
    def rounds_s(self) -> Sequence[float]:
        """Seconds of each call so far."""
        return self.calls_s

    def as_row(self) -> dict[str, Any]:
        """The cell in milliseconds, as plain data."""
        return {
            **super().as_row(),
            "median_ms": 1e3 * statistics.median(self.calls_s) if self.calls_s else None,
            "calls_ms": [1e3 * seconds for seconds in self.calls_s],
        }


def time_widths(args: argparse.Namespace, device: torch.device) -> list[CallCell]:
    """All cells, width by width."""
    call_all(args.methods, Inputs.draw(WARM_UP_WIDTH, args.seed, device))
    return time_cells(
        CallCell, args.methods, args.widths, partial(time_row, args=args, device=device)
    )


def call_all(methods: Sequence[str], inputs: Inputs) -> None:
    """Loads the libraries behind the methods."""
    for method in methods:
        METHODS[method](inputs)


def time_row(row: Sequence[CallCell], args: argparse.Namespace, device: torch.device) -> None:
    """Calls the methods of one width in turn, as often as asked and as the budget allows."""
    if not any(cell.has_time(args.max_seconds) for cell in row):
        return
    inputs = Inputs.draw(row[0].width, args.seed, device)
    with torch.no_grad(), highest_matmul_precision():
        for _ in range(args.repetitions):
            for cell in row:
                if cell.has_time(args.max_seconds):
                    start = now(device)
                    METHODS[cell.method](inputs)
                    cell.calls_s.append(now(device) - start)


def format_widths(rows: Sequence[Mapping[str, Any]], max_seconds: float) -> str:
    """The table in Markdown: a line per method, a column per width, and what was left out."""
    widths = sorted({row["width"] for row in rows})
    most = max(len(row["calls_ms"]) for row in rows)
    lines = [
        f"Milliseconds in float32, medians of {most} calls (of fewer in brackets)",
        "",
        f"| method | {' | '.join(map(str, widths))} |",
        f"|---|{'---:|' * len(widths)}",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        shown_cells = [format_cell(row, most) for row in rows if row["method"] == method]
        lines.append(f"| {WORDS[method]} | {' | '.join(shown_cells)} |")
    left_out = [
        f"{row['method']} at {row['width']} ({float(format(row['estimate_ms'] / 1e3, '.2g')):g} s)"
        for row in rows
        if row["left_out"]
    ]
    if left_out:
        lines += ["", f"Left out, estimated above {max_seconds:g} s: {', '.join(left_out)}"]
    return "\n".join(lines)


def format_cell(row: Mapping[str, Any], most: int) -> str:
    """Median milliseconds and, where they are fewer than elsewhere, the number of calls."""
    if row["left_out"]:
        return "left out"
    calls = len(row["calls_ms"])
    return f"{row['median_ms']:.1f}" + (f" ({calls})" if calls < most else "")


# --- whole steps ----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Contender:
    """One optimizer with its own copy of the model, and the times of its steps in seconds."""

    label: str
    stagger: bool
    interval: int
    model: nn.Module
    optimizer: PreconditionedOptimizer
    whole_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        """The times in milliseconds, as plain data."""
        return {
            "name": self.label,
            "stagger": self.stagger,
            "interval": self.interval,
            "whole_step": spread(self.whole_s),
            "optimizer_step": spread(self.optimizer_s),
            "whole_step_ms": [round(1e3 * seconds, 3) for seconds in self.whole_s],
            "optimizer_step_ms": [round(1e3 * seconds, 3) for seconds in self.optimizer_s],
        }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, maximum and their ratio."""
    median, largest = statistics.median(seconds), max(seconds)
    return {"median_ms": 1e3 * median, "max_ms": 1e3 * largest, "max_over_median": largest / median}


def time_training(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Trains all contenders, in turn from step to step, and returns their rows."""
    contenders = [
        build_contender(label, args, device, stagger=stagger)
        for label in args.step_times
        for stagger in (True, False)
    ]
    torch.manual_seed(args.seed)
    vocab_size = contenders[0].model.config.vocab_size
    batch = torch.randint(vocab_size, (args.batch_size, args.block_size)).to(device)
    warm_up, timed = step_counts(contenders, args.intervals)
    for step in range(warm_up + timed):
        for contender in contenders:
            train_step(contender, batch, device, keep=step >= warm_up)
        if (step + 1) % 10 == 0:
            print(f"step {step + 1} of {warm_up + timed}", file=sys.stderr)
    return [contender.as_row() for contender in contenders]


def build_contender(
    label: str, args: argparse.Namespace, device: torch.device, *, stagger: bool
) -> Contender:
    """An optimizer ``NAME[:OPTIONS]`` on a freshly initialised model, the same for all.

    Raises:
        ValueError: for an optimizer without ``stagger``, or a bad option.
    """
    name, _, text = label.partition(":")
    specs = option_specs(name)
    if "stagger" not in specs:
        raise ValueError(f"--step_times {label}: {name} has no option 'stagger'")
    option = next(option for option in INTERVALS if option in specs)
    options = {option: args.interval, **parse_optim_args(name, text).options, "stagger": stagger}
    torch.manual_seed(args.seed)
    config = preset_config(args.preset)
    if args.config_overrides:
        override_config(config, args.config_overrides)
    model = AutoModelForCausalLM.from_config(config).to(device)
    return Contender(
        label=label,
        stagger=stagger,
        interval=options[option],
        model=model,
        optimizer=build_optimizer(model, name, lr=1e-4, **options),
    )


def step_counts(contenders: Sequence[Contender], intervals: int) -> tuple[int, int]:
    """(to warm up, timed): one interval, until every group has been refreshed, then the others."""
    longest = max(contender.interval for contender in contenders)
    start = max(contender.optimizer.recipe.stages.start_step for contender in contenders)
    return max(longest + 2, start), intervals * longest


def train_step(contender: Contender, batch: Tensor, device: torch.device, *, keep: bool) -> None:
    """Forward, backward and step; keeps the times."""
    start = now(device)
    contender.model(input_ids=batch, labels=batch).loss.backward()
    middle = now(device)
    contender.optimizer.step()
    end = now(device)
    contender.optimizer.zero_grad()
    if keep:
        contender.whole_s.append(end - start)
        contender.optimizer_s.append(end - middle)


def format_steps(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| optimizer | interval | stagger | step ms: median | max | ratio "
        "| optimizer ms: median | max | ratio |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = [
            f"{part['median_ms']:.1f} | {part['max_ms']:.1f} | {part['max_over_median']:.2f}"
            for part in (row["whole_step"], row["optimizer_step"])
        ]
        stagger = "yes" if row["stagger"] else "no"
        lines.append(f"| {row['name']} | {row['interval']} | {stagger} | {' | '.join(figures)} |")
    return "\n".join(lines)


# --- the file -------------------------------------------------------------------------------------


def write_part(path: Path, part: str, content: Mapping[str, Any]) -> None:
    """Replaces one part of the JSON file and keeps the other."""
    known = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**known, part: content})


if __name__ == "__main__":
    sys.exit(main())
