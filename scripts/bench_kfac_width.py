#!/usr/bin/env python
"""Times the K-FAC family by layer width: what is cubic, quadratic and linear in it.

    scripts/bench_kfac_width.py --output results/bench_kfac_width
    scripts/bench_kfac_width.py --methods rs_kfac b_kfac --widths 1024 2048 4096 --columns 128

Every method keeps one square layer [width, width] in float32 and takes new columns in at every
step: statistics, refresh of both forms, application to a gradient. Each round runs all methods in
turn, so that a slow minute of the machine hits all alike; the table gives medians. A method that is
expected to need more than --max_seconds for a step (its last time, tenfold per doubling) is left
out there.

The linear application of B-KFAC preconditions the columns and then multiplies them. That last
product (with the norm of the gradient, for the clip) is quadratic; any backward pass does the same
one to form the gradient, so it is listed apart.

Exponents are slopes of log time over log width, by least squares over the upper half of a method's
widths.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_precond import option_specs, resolve
from hf_precond.linalg.precision import highest_matmul_precision
from hf_precond.preconditioners.base import Columns, State, StepContext
from hf_precond.preconditioners.kronecker import SIDES, Kronecker
from trainer_ext.provenance import provenance
from trainer_ext.reports import show_report
from trainer_ext.timing import Cell, now, time_cells

LINEAR = "b_kfac_linear"
METHODS: Mapping[str, str] = {
    "kfac": "K-FAC (exact EVD)",
    "rs_kfac": "RS-KFAC",
    "sre_kfac": "SRE-KFAC",
    "b_kfac": "B-KFAC, plain application",
    LINEAR: "B-KFAC, linear application",
}
PARTS: Mapping[str, str] = {
    "statistics": "factor updates",
    "refresh": "refresh of the forms",
    "application": "application",
    "total": "total",
    "columns": "application: preconditioned columns",
    "product": "application: product that forms the step",
    "without_product": "total without that product",
}
INTERVALS = ("update_interval", "inverse_interval", "brand_interval")
WARM_UP_WIDTH = 192
SHARE_FITTED = 0.5
LINEAR_ONLY = ("columns", "product", "without_product")


@dataclass(kw_only=True)
class StepCell(Cell):
    """Steps of one method at one width.

    Attributes:
        times_s: part -> seconds of each round; empty where the estimate was above the budget.
    """

    times_s: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds_s(self) -> Sequence[float]:
        """Seconds of each step so far."""
        return self.times_s.get("total", ())

    def as_row(self) -> dict[str, Any]:
        """The cell in milliseconds, as plain data."""
        return {
            **super().as_row(),
            "median_ms": {
                part: 1e3 * statistics.median(times) for part, times in self.times_s.items()
            },
            "rounds_ms": {
                part: [round(1e3 * seconds, 4) for seconds in times]
                for part, times in self.times_s.items()
            },
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints the tables and writes JSON, markdown and plot."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    with torch.no_grad(), highest_matmul_precision():
        rows = [cell.as_row() for cell in time_widths(args, device)]
    result = report(rows, args, device)
    show_report(result, format_report(result), plot, args.output)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--columns", type=int, default=64, help="positions a step")
    parser.add_argument("--rank", type=int, default=64, help="eigenpairs kept of each factor")
    parser.add_argument("--oversampling", type=int, default=10)
    parser.add_argument("--power_iterations", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="steps of a method and width")
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=100.0,
        help="that a method may take at one width, all rounds together",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, help="path without suffix, for example results/bench_kfac_width"
    )
    args = parser.parse_args(argv)
    for name in ("columns", "rank", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not allowed: it must be >= 1")
    if args.columns + args.rank >= min(args.widths):
        parser.error(
            f"--columns {args.columns} and --rank {args.rank} must together be below the smallest "
            f"of --widths, {min(args.widths)}: B-KFAC has no form of its own there"
        )
    return args


# --- one method at one width ----------------------------------------------------------------------


def algorithm_of(method: str, args: argparse.Namespace) -> Kronecker:
    """The algorithm with everything due at odd steps and its factors alone at even ones."""
    name = "b_kfac" if method == LINEAR else method
    wanted: dict[str, Any] = {
        "update_interval": 1,
        "inverse_interval": 2,
        "brand_interval": 2,
        "max_columns": args.columns,
        "rank": args.rank,
        "oversampling": args.oversampling,
        "power_iterations": args.power_iterations,
        "application": "linear" if method == LINEAR else "plain",
        "momentum_site": "direction",
        "seed": args.seed,
    }
    specs = option_specs(name)
    recipe = resolve(name, {key: value for key, value in wanted.items() if key in specs})
    assert isinstance(recipe.algorithm, Kronecker)
    return recipe.algorithm


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Columns ``[1, n, 1, width]`` of a step and the gradient ``[1, width, width]`` they make."""

    columns: Columns
    gradient: Tensor

    @classmethod
    def draw(cls, width: int, count: int, seed: int, device: torch.device) -> Inputs:
        """With a spectrum that falls; on the CPU, so that every device has the same."""
        rng = torch.Generator().manual_seed(seed)
        scale = torch.arange(1, width + 1) ** -0.5
        a, g = (torch.randn(2, count, width, generator=rng) * scale).to(device)
        columns = Columns(inputs=a[None, :, None], outputs=g[None, :, None])
        return cls(columns=columns, gradient=(g.mT @ a).unsqueeze(0))


class Layer:
    """A layer under one method."""

    def __init__(
        self, method: str, width: int, args: argparse.Namespace, device: torch.device
    ) -> None:
        self.algorithm = algorithm_of(method, args)
        self.is_linear = method == LINEAR
        self.device = device
        shape = (1, width, width)
        self.state: State = self.algorithm.init(shape, dtype=torch.float32, device=device)
        self.has_factor = "input_factor" in self.state
        self.rounds = 0

    def step(self, inputs: Inputs) -> dict[str, float]:
        """Seconds of each part of one step.

        The refresh is an update with everything due less one with the factors alone.
        """
        odd = StepContext(step=2 * self.rounds + 1, phases=[0.0], columns=inputs.columns)
        even = StepContext(step=2 * self.rounds + 2, phases=[0.0], columns=inputs.columns)
        self.rounds += 1
        update = self._time(lambda: self.algorithm.update(self.state, inputs.gradient, odd))
        factors = 0.0
        if self.has_factor:
            factors = self._time(lambda: self.algorithm.update(self.state, inputs.gradient, even))
        application = self._time(lambda: self.algorithm.apply(self.state, inputs.gradient, odd))
        found = {
            "statistics": factors,
            "refresh": max(update - factors, 0.0),
            "application": application,
            "total": update + application,
        }
        if self.is_linear:
            found["columns"] = self._time(lambda: self._columns(inputs, odd))
            found["product"] = max(application - found["columns"], 0.0)
            found["without_product"] = update + found["columns"]
        return found

    def _columns(self, inputs: Inputs, ctx: StepContext) -> list[Tensor]:
        """The columns as the linear application has them, before it multiplies them."""
        pairs = zip(SIDES, inputs.columns.flat(), strict=True)
        return [self.algorithm.precondition(self.state, side, x.mT, ctx) for side, x in pairs]

    def _time(self, function: Callable[[], Any]) -> float:
        start = now(self.device)
        function()
        return now(self.device) - start


# --- all cells ------------------------------------------------------------------------------------


def time_widths(args: argparse.Namespace, device: torch.device) -> list[StepCell]:
    """All cells, width by width."""
    warm_up = max(WARM_UP_WIDTH, args.columns + args.rank + 1)
    for method in args.methods:
        layer = Layer(method, warm_up, args, device)
        layer.step(Inputs.draw(warm_up, args.columns, args.seed, device))
    return time_cells(
        StepCell, args.methods, args.widths, partial(time_row, args=args, device=device)
    )


def time_row(row: Sequence[StepCell], args: argparse.Namespace, device: torch.device) -> None:
    """Runs the methods of one width in turn, as often as asked and as the budget allows."""
    layers = {
        cell.method: Layer(cell.method, cell.width, args, device)
        for cell in row
        if cell.has_time(args.max_seconds)
    }
    for number in range(args.rounds):
        inputs = Inputs.draw(row[0].width, args.columns, args.seed + number, device)
        for cell in row:
            if cell.method in layers and cell.has_time(args.max_seconds):
                for part, seconds in layers[cell.method].step(inputs).items():
                    cell.times_s.setdefault(part, []).append(seconds)


# --- the report -----------------------------------------------------------------------------------


def exponent(widths: Sequence[int], times: Sequence[float]) -> float | None:
    """Slope of log time over log width, by least squares over the upper half of the widths.

    >>> exponent([1, 2, 4, 8], [9.0, 9.0, 4.0, 32.0])
    3.0

    Returns:
        None where there are fewer than two, or times that are zero.
    """
    first = min(math.floor(len(widths) * SHARE_FITTED), len(widths) - 2)
    if first < 0 or min(times[first:]) <= 0:
        return None
    xs = [math.log(width) for width in widths[first:]]
    ys = [math.log(seconds) for seconds in times[first:]]
    return round(statistics.linear_regression(xs, ys).slope, 6)


def report(
    rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Times, exponents and everything needed to repeat the run."""
    exponents = {
        method: {part: exponent(*timed_widths(rows, method, part)) for part in parts_of(method)}
        for method in args.methods
    }
    return {
        **provenance(__file__, args),
        "device": str(device),
        "columns": args.columns,
        "rank": args.rank,
        "max_seconds": args.max_seconds,
        "exponents": exponents,
        "rows": list(rows),
    }


def parts_of(method: str) -> list[str]:
    """The parts of a step that a method is measured in."""
    return [part for part in PARTS if method == LINEAR or part not in LINEAR_ONLY]


def timed_widths(
    rows: Sequence[Mapping[str, Any]], method: str, part: str
) -> tuple[list[int], list[float]]:
    """The widths at which a method ran, and the median milliseconds of a part there."""
    own = [row for row in rows if row["method"] == method and not row["left_out"]]
    return [row["width"] for row in own], [row["median_ms"][part] for row in own]


def format_report(result: Mapping[str, Any]) -> str:
    """The tables in Markdown: totals and parts by width, exponents, and what was left out."""
    rows = result["rows"]
    widths = sorted({row["width"] for row in rows})
    methods = list(result["exponents"])
    most = max(len(row["rounds_ms"].get("total", ())) for row in rows)
    head = f"{' | '.join(map(str, widths))} | exponent |"
    lines = [
        f"Milliseconds a step of one layer [width, width] in float32, {result['columns']} columns, "
        f"rank {result['rank']}, {result['threads']} thread{'s' * (result['threads'] > 1)} "
        f"({result['device']}); medians of {most} rounds (of fewer in brackets). Exponents by the "
        "upper half of the widths.",
        "",
        f"| method | part | {head}",
        f"|---|---|{'---:|' * (len(widths) + 1)}",
    ]
    for method in methods:
        own = {row["width"]: row for row in rows if row["method"] == method}
        for part in parts_of(method):
            power = result["exponents"][method][part]
            if not any(row["median_ms"].get(part) for row in own.values()):
                continue
            cells = [format_cell(own[width], part, most) for width in widths]
            cells.append("" if power is None else f"{power:.2f}")
            lines.append(f"| {METHODS[method]} | {PARTS[part]} | {' | '.join(cells)} |")
    left_out = [
        f"{METHODS[row['method']]} at {row['width']} ({row['estimate_ms'] / 1e3:.0f} s)"
        for row in rows
        if row["left_out"]
    ]
    if left_out:
        lines += [
            "",
            f"Left out, a step estimated above {result['max_seconds']:g} s: {', '.join(left_out)}",
        ]
    return "\n".join(lines)


def format_cell(row: Mapping[str, Any], part: str, most: int) -> str:
    """Median milliseconds and, where they are fewer than elsewhere, the number of rounds."""
    if row["left_out"]:
        return "left out"
    rounds = len(row["rounds_ms"][part])
    return f"{row['median_ms'][part]:.4g}" + (f" ({rounds})" if rounds < most else "")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws refresh, application and total over the width, both logarithmic, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator, ScalarFormatter

    rows = result["rows"]
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained", sharey=True)
    for axes, part in zip(panels, ("refresh", "application", "total"), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            widths, times = timed_widths(rows, method, part)
            (line,) = axes.plot(widths, times, marker="o", markersize=3, label=METHODS[method])
            if method == LINEAR and part != "refresh":
                rest = "columns" if part == "application" else "without_product"
                label = "the same without the final product"
                axes.plot(
                    *timed_widths(rows, method, rest),
                    linestyle="--",
                    color=line.get_color(),
                    label=label,
                )
        axes.set(xscale="log", yscale="log", xlabel="width", title=PARTS[part])
        axes.set_xticks(sorted({row["width"] for row in rows}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("milliseconds a step")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
