#!/usr/bin/env python
"""Turns the JSON lines of scripts/sweep.py into a markdown table and a plot.

    scripts/plot_results.py results/wikitext2_gpt2_7m.jsonl
    scripts/plot_results.py results/optimizers.jsonl --bench results/bench_step_optimizers.json

Each variant is shown with its best learning rate: the one with the lowest mean final validation
loss over its seeds. Times are not compared here: runs of a sweep may share the machine
(`scripts/bench_step.py` measures them interleaved).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

COST_COLUMNS = ("optimizer step, of AdamW's", "whole step", "state")
Curve = list[tuple[int, float]]
"""Validation loss by step, ascending."""


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """A variant at its best learning rate, averaged over seeds.

    Attributes:
        curve: mean validation loss; of steps that all seeds have.
        accuracy: of a classifier, at the end.
        tried: learning rate -> mean final validation loss, infinite for a diverged rate.
    """

    name: str
    learning_rate: float
    seeds: int
    curve: Curve
    tried: Mapping[float, float]
    accuracy: float | None = None

    @property
    def final_loss(self) -> float:
        """Mean validation loss of the last evaluation."""
        return self.curve[-1][1]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the table and the plot beside the results file."""
    args = parse_arguments(argv)
    try:
        results = summarise(read_records(args.results))
        costs: dict[str, tuple[str, ...]] = {}
        for path in args.bench:
            # The first file's AdamW counts: each ratio is to the AdamW of its own file.
            costs = {**read_costs(path, args.baseline), **costs}
        table = markdown_table(results, baseline=args.baseline, costs=costs)
    except ValueError as error:
        print(f"plot_results.py: error: {error}", file=sys.stderr)
        return 2
    stem = args.output or args.results.with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    markdown, image = Path(f"{stem}.md"), Path(f"{stem}.png")
    markdown.write_text(f"{table}\n\n{learning_rate_table(results)}\n", encoding="utf-8")
    plot(results, image, title=args.title or args.results.stem)
    print(table, f"\nwritten: {markdown}, {image}", sep="\n")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON lines of scripts/sweep.py")
    parser.add_argument("--output", type=Path, help="path without suffix; that of the results")
    parser.add_argument("--baseline", default="adamw_torch", help="variant the others are set to")
    parser.add_argument(
        "--bench",
        type=Path,
        nargs="+",
        default=[],
        help="JSON files of scripts/bench_step.py: add their columns",
    )
    parser.add_argument("--title", help="title of the plot")
    return parser.parse_args(argv)


# --- figures --------------------------------------------------------------------------------------


def read_records(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file.

    Raises:
        ValueError: no file, or a file without runs.
    """
    if not path.is_file():
        raise ValueError(f"results file {str(path)!r} does not exist")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    if not records:
        raise ValueError(f"results file {str(path)!r} holds no run")
    return records


def read_costs(path: Path, baseline: str) -> dict[str, tuple[str, ...]]:
    """Cells of a benchmark per optimizer: its step, a whole step and its state, of AdamW's.

    The benchmark's first row, fused AdamW, is the baseline's.

    Raises:
        ValueError: no such file.
    """
    if not path.is_file():
        raise ValueError(f"benchmark file {str(path)!r} does not exist")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    state = rows[0]["state_bytes"]
    names = [baseline, *(row["name"].partition(":")[0] for row in rows[1:])]
    return {
        name: (
            f"{row['optimizer_ratio']:.1f}",
            f"{row['whole_step_ratio']:.2f}",
            f"{row['state_bytes'] / state:.2f}",
        )
        for name, row in zip(names, rows, strict=True)
    }


def summarise(records: Sequence[Mapping[str, Any]]) -> list[VariantResult]:
    """One result per variant, in the order of the file.

    Raises:
        ValueError: a variant whose runs all diverged.
    """
    by_variant: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for record in records:
        rates = by_variant.setdefault(record["variant"], defaultdict(list))
        rates[float(record["options"]["learning_rate"])].append(record)
    return [best_rate(name, rates) for name, rates in by_variant.items()]


def best_rate(name: str, rates: Mapping[float, Sequence[Mapping[str, Any]]]) -> VariantResult:
    """The variant at the learning rate with the lowest mean final validation loss.

    Raises:
        ValueError: all of them diverged.
    """
    tried = {rate: fmean(map(final_loss, runs)) for rate, runs in sorted(rates.items())}
    best = min(tried, key=tried.__getitem__)
    if not math.isfinite(tried[best]):
        raise ValueError(f"variant {name!r}: every learning rate diverged")
    runs = rates[best]
    return VariantResult(
        name=name,
        learning_rate=best,
        seeds=len(runs),
        curve=mean_curve([to_curve(run["eval_loss"]) for run in runs]),
        accuracy=mean_accuracy(runs),
        tried=tried,
    )


def mean_accuracy(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean final accuracy of classifiers, None for language models, which have a perplexity."""
    found = [run["metrics"].get("eval_accuracy") for run in runs]
    of_text = any("eval_perplexity" in run["metrics"] for run in runs)
    return None if of_text or None in found else fmean(found)


def final_loss(record: Mapping[str, Any]) -> float:
    """The last validation loss of a run, infinite where it diverged or was never evaluated."""
    curve = to_curve(record["eval_loss"])
    return curve[-1][1] if curve else math.inf


def to_curve(points: Sequence[Sequence[float | None]]) -> Curve:
    """[step, loss] pairs of a record; a missing loss is that of a diverged run: infinite."""
    return [(int(step or 0), math.inf if loss is None else loss) for step, loss in points]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean loss over curves, at the steps that all of them have.

    >>> mean_curve([[(1, 2.0), (2, 1.0)], [(1, 4.0)]])
    [(1, 3.0)]
    """
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, fmean(table[step] for table in tables)) for step in steps]


def steps_to_reach(curve: Curve, loss: float) -> float | None:
    """The first step at which the curve, joined by straight lines, is at or below `loss`.

    >>> steps_to_reach([(100, 5.0), (200, 4.0)], 4.5)
    150.0
    """
    previous: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if previous is None:
                return float(step)
            last_step, last_value = previous
            share = (last_value - loss) / (last_value - value)
            return last_step + share * (step - last_step)
        previous = (step, value)
    return None


# --- output ---------------------------------------------------------------------------------------


def markdown_table(
    results: Sequence[VariantResult],
    *,
    baseline: str,
    costs: Mapping[str, tuple[str, ...]] | None = None,
) -> str:
    """One row per variant; steps to the baseline's final loss, as a share of its steps.

    Args:
        costs: further cells per variant, see :func:`read_costs`.

    Raises:
        ValueError: the baseline is not among the variants.
    """
    by_name = {result.name: result for result in results}
    if baseline not in by_name:
        raise ValueError(f"--baseline {baseline!r} must be one of {', '.join(by_name)}")
    target = by_name[baseline]
    columns = (
        *("best learning rate", "seeds", "steps", "validation loss"),
        "perplexity" if target.accuracy is None else "accuracy",
        f"steps to the loss of {baseline}",
        *(COST_COLUMNS if costs else ()),
    )
    rows = [f"| optimizer | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for result in results:
        steps = result.curve[-1][0]
        rows.append(
            f"| {result.name} | {result.learning_rate:g} | {result.seeds} | {steps} "
            f"| {result.final_loss:.4f} | {_quality_cell(result)} "
            f"| {_steps_cell(result, target)} |"
            + "".join(f" {cell} |" for cell in _cost_cells(result.name, costs))
        )
    return "\n".join(rows)


def _quality_cell(result: VariantResult) -> str:
    if result.accuracy is not None:
        return f"{100 * result.accuracy:.1f} %"
    return f"{math.exp(result.final_loss):.1f}"


def learning_rate_table(results: Sequence[VariantResult]) -> str:
    """Final validation loss of every learning rate that was tried, the best one in bold."""
    rates = sorted({rate for result in results for rate in result.tried})
    rows = [
        f"| optimizer | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"|---|{'---:|' * len(rates)}",
    ]
    for result in results:
        cells = (_loss_cell(result, rate) for rate in rates)
        rows.append(f"| {result.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(results: Sequence[VariantResult], path: Path, *, title: str) -> None:
    """Draws validation loss by step, one line per variant, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    many = len(results) > 8
    figure, axes = plt.subplots(figsize=(9, 5) if many else (7, 4.5), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20" if many else "tab10").colors)
    for result in sorted(results, key=lambda result: -result.final_loss) if many else results:
        steps, losses = zip(*result.curve, strict=True)
        axes.plot(steps, losses, marker="o", markersize=3, label=_legend(result))
    axes.set(xlabel="step", ylabel="validation loss [nats / token]", title=title)
    axes.grid(alpha=0.3)
    if many:
        figure.legend(loc="outside right upper", fontsize="small")
    else:
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _cost_cells(name: str, costs: Mapping[str, tuple[str, ...]] | None) -> tuple[str, ...]:
    return costs.get(name, ("",) * len(COST_COLUMNS)) if costs else ()


def _steps_cell(result: VariantResult, target: VariantResult) -> str:
    steps = steps_to_reach(result.curve, target.final_loss)
    return "not reached" if steps is None else f"{steps:.0f} ({steps / target.curve[-1][0]:.0%})"


def _loss_cell(result: VariantResult, rate: float) -> str:
    if rate not in result.tried:
        return ""
    loss = result.tried[rate]
    cell = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
    return f"**{cell}**" if rate == result.learning_rate else cell


def _legend(result: VariantResult) -> str:
    return f"{result.name}, lr {result.learning_rate:g}: {result.final_loss:.3f}"


if __name__ == "__main__":
    sys.exit(main())
