#!/usr/bin/env python
"""Turns the JSON lines of scripts/sweep.py into a markdown table and a plot.

    scripts/plot_results.py results/wikitext2_gpt2_7m.jsonl
    scripts/plot_results.py results/optimizers.jsonl --bench results/bench_step_optimizers.json

Each variant is shown with its best setting: the values of all options that its runs differ in (the
learning rate, and whatever else was searched) with the lowest mean final validation loss over its
seeds. `--times` adds what each run says of its own step, memory and state, for runs made one after
the other on a machine that does nothing else (`scripts/bench_step.py` measures interleaved).
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
from statistics import fmean, median, stdev
from typing import Any

from trainer_ext.reports import Curve, read_records, steps_to_reach
from trainer_ext.step_times import ELAPSED

COST_COLUMNS = ("optimizer step, of AdamW's", "whole step", "state")
TIME_COLUMNS = (
    *("forward ms", "backward ms", "optimizer ms", "step, of {baseline}'s"),
    *("peak memory MiB", "state MiB", "seconds to the loss of {baseline}"),
)
RATE = "learning_rate"
Setting = tuple[tuple[str, Any], ...]
"""(option, value) of what a variant's runs differ in beside the seed, the learning rate first."""
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """A variant at its best setting, averaged over seeds.

    Attributes:
        curve: mean validation loss by step; of steps that all seeds have.
        spread: standard deviation over seeds of the final loss, None for a single seed.
        accuracy: of a classifier, at the end.
        tried: setting -> mean final validation loss, infinite for a diverged one.
        runs: the records at the best setting.
    """

    name: str
    setting: Setting
    curve: Curve
    tried: Mapping[Setting, float]
    runs: Sequence[Record]
    spread: float | None = None
    accuracy: float | None = None

    @property
    def final_loss(self) -> float:
        """Mean validation loss of the last evaluation."""
        return self.curve[-1][1]

    @property
    def seeds(self) -> int:
        """How many runs are averaged."""
        return len(self.runs)

    @property
    def learning_rate(self) -> float:
        """Of the best setting."""
        return float(dict(self.setting)[RATE])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the table and the plot beside the results file."""
    args = parse_arguments(argv)
    try:
        results = summarise(read_runs(args.results))
        costs: dict[str, tuple[str, ...]] = {}
        for path in args.bench:
            # The first file's AdamW counts: each ratio is to the AdamW of its own file.
            costs = {**read_costs(path, args.baseline), **costs}
        table = markdown_table(results, baseline=args.baseline, costs=costs, times=args.times)
    except ValueError as error:
        print(f"plot_results.py: error: {error}", file=sys.stderr)
        return 2
    stem = args.output or args.results.with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    markdown, image = Path(f"{stem}.md"), Path(f"{stem}.png")
    markdown.write_text(f"{table}\n\n{settings_table(results)}\n", encoding="utf-8")
    plot(results, image, title=args.title or args.results.stem, times=args.times)
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
    parser.add_argument(
        "--times", action="store_true", help="add the runs' own times, memory and state"
    )
    parser.add_argument("--title", help="title of the plot")
    return parser.parse_args(argv)


# --- figures --------------------------------------------------------------------------------------


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file.

    Raises:
        ValueError: no file, or a file without runs.
    """
    if not path.is_file():
        raise ValueError(f"results file {str(path)!r} does not exist")
    records = read_records(path)
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


def summarise(records: Sequence[Record]) -> list[VariantResult]:
    """One result per variant, in the order of the file.

    Raises:
        ValueError: a variant whose runs all diverged.
    """
    by_variant: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_variant[record["variant"]].append(record)
    return [best_setting(name, runs) for name, runs in by_variant.items()]


def best_setting(name: str, records: Sequence[Record]) -> VariantResult:
    """The variant at the setting with the lowest mean final validation loss.

    Raises:
        ValueError: all of them diverged.
    """
    by_setting: dict[Setting, list[Record]] = defaultdict(list)
    varied = varied_options(records)
    for record in records:
        by_setting[tuple((key, record["options"].get(key)) for key in varied)].append(record)
    tried = {setting: fmean(map(final_loss, runs)) for setting, runs in by_setting.items()}
    best = min(tried, key=tried.__getitem__)
    if not math.isfinite(tried[best]):
        raise ValueError(f"variant {name!r}: every learning rate diverged")
    runs = by_setting[best]
    losses = [final_loss(run) for run in runs]
    return VariantResult(
        name=name,
        setting=best,
        curve=mean_curve([to_curve(run["eval_loss"]) for run in runs]),
        spread=stdev(losses) if len(losses) > 1 else None,
        accuracy=mean_accuracy(runs),
        tried=tried,
        runs=runs,
    )


def varied_options(records: Sequence[Record]) -> list[str]:
    """Options whose values differ among runs, but the seed; the learning rate always, and first."""
    values: dict[str, set[str]] = defaultdict(set)
    for key in {key for record in records for key in record["options"]}:
        values[key] = {json.dumps(record["options"].get(key)) for record in records}
    varied = {key for key, found in values.items() if len(found) > 1 and key != "seed"}
    return [RATE, *sorted(varied - {RATE})]


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
    return [(step or 0, math.inf if loss is None else loss) for step, loss in points]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean loss over curves, at the steps that all of them have.

    >>> mean_curve([[(1, 2.0), (2, 1.0)], [(1, 4.0)]])
    [(1, 3.0)]
    """
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, fmean(table[step] for table in tables)) for step in steps]


def loss_by_second(record: Record) -> Curve:
    """Validation loss by seconds of training, as far as the run has both.

    >>> elapsed = {"train_elapsed_s": [[100, 7.0], [200, 14.0]]}
    >>> loss_by_second({"eval_loss": [[100, 5.0], [150, 4.5]], **elapsed})
    [(7.0, 5.0)]
    """
    seconds = dict(to_curve(record.get(ELAPSED, [])))
    return [(seconds[at], loss) for at, loss in to_curve(record["eval_loss"]) if at in seconds]


def run_median(result: VariantResult, metric: str) -> float:
    """Median over the runs of a figure that each has measured of itself.

    Raises:
        ValueError: a run without it.
    """
    found = [run["metrics"].get(f"train_{metric}") for run in result.runs]
    if None in found:
        raise ValueError(f"--times: a run of variant {result.name!r} has no train_{metric}")
    return median(found)


def seconds_to_reach(result: VariantResult, loss: float) -> float | None:
    """Median over seeds of the seconds of training to a validation loss; None where one has not."""
    found = [steps_to_reach(loss_by_second(run), loss) for run in result.runs]
    return None if None in found else median(found)


# --- output ---------------------------------------------------------------------------------------


def markdown_table(
    results: Sequence[VariantResult],
    *,
    baseline: str,
    costs: Mapping[str, tuple[str, ...]] | None = None,
    times: bool = False,
) -> str:
    """One row per variant; steps to the baseline's final loss, as a share of its steps.

    Args:
        costs: further cells per variant, see :func:`read_costs`.
        times: further cells of what the runs have measured of themselves.

    Raises:
        ValueError: the baseline is not among the variants, or a run has no times.
    """
    by_name = {result.name: result for result in results}
    if baseline not in by_name:
        raise ValueError(f"--baseline {baseline!r} must be one of {', '.join(by_name)}")
    target = by_name[baseline]
    quality = quality_of(target)
    columns = (
        *("best " + ("setting" if _searched(results) else "learning rate"), "seeds", "steps"),
        "validation loss",
        *((quality,) if quality else ()),
        f"steps to the loss of {baseline}",
        *(COST_COLUMNS if costs else ()),
        *((column.format(baseline=baseline) for column in TIME_COLUMNS) if times else ()),
    )
    rows = [f"| optimizer | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for result in results:
        cells = (
            *(setting_text(result.setting), result.seeds, f"{result.curve[-1][0]:.0f}"),
            _loss_with_spread(result),
            *((_quality_cell(result),) if quality else ()),
            _steps_cell(result, target),
            *_cost_cells(result.name, costs),
            *(_time_cells(result, target) if times else ()),
        )
        rows.append(f"| {result.name} | {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def quality_of(result: VariantResult) -> str:
    """What is shown beside the loss: accuracy, perplexity of language models, or nothing."""
    if result.accuracy is not None:
        return "accuracy"
    has_perplexity = any("eval_perplexity" in run["metrics"] for run in result.runs)
    return "perplexity" if has_perplexity else ""


def setting_text(setting: Setting) -> str:
    """The values of a setting; the learning rate without its name.

    >>> setting_text((("learning_rate", 0.001), ("adam_beta2", 0.95)))
    '0.001, adam_beta2=0.95'
    """
    (_, rate), *others = setting
    return ", ".join([f"{rate:g}", *(f"{key}={value}" for key, value in others)])


def _searched(results: Sequence[VariantResult]) -> bool:
    """Whether more than the learning rate was varied."""
    return any(len(result.setting) > 1 for result in results)


def _loss_with_spread(result: VariantResult) -> str:
    spread = "" if result.spread is None else f" ± {result.spread:.4f}"
    return f"{result.final_loss:.4f}{spread}"


def _quality_cell(result: VariantResult) -> str:
    if result.accuracy is not None:
        return f"{100 * result.accuracy:.1f} %"
    return f"{math.exp(result.final_loss):.1f}"


def settings_table(results: Sequence[VariantResult]) -> str:
    """Final validation loss of every setting that was tried, the best one of a variant in bold.

    One row a variant where only the learning rate was varied, else one row a setting.
    """
    if not _searched(results):
        return learning_rate_table(results)
    rows = ["| optimizer | setting | validation loss |", "|---|---|---:|"]
    for result in results:
        for setting in sorted(result.tried, key=result.tried.__getitem__):
            cell = _loss_cell(result, setting)
            rows.append(f"| {result.name} | {setting_text(setting)} | {cell} |")
    return "\n".join(rows)


def learning_rate_table(results: Sequence[VariantResult]) -> str:
    """Final validation loss of every learning rate, one row a variant."""
    settings = sorted({setting for result in results for setting in result.tried})
    rows = [
        f"| optimizer | {' | '.join(setting_text(setting) for setting in settings)} |",
        f"|---|{'---:|' * len(settings)}",
    ]
    for result in results:
        cells = (_loss_cell(result, setting) for setting in settings)
        rows.append(f"| {result.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(results: Sequence[VariantResult], path: Path, *, title: str, times: bool = False) -> None:
    """Draws validation loss by step, and by second of training, one line per variant, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    many = len(results) > 8
    panels = 2 if times else 1
    size = (9 if many else 7) + 5 * (panels - 1), 5 if many else 4.5
    figure, all_axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    by_step, *by_second = all_axes[0]
    for axes in all_axes[0]:
        axes.set_prop_cycle(color=plt.get_cmap("tab20" if many else "tab10").colors)
        axes.grid(alpha=0.3)
    for result in sorted(results, key=lambda result: -result.final_loss) if many else results:
        by_step.plot(*zip(*result.curve, strict=True), marker="o", ms=3, label=_legend(result))
        for axes in by_second:
            axes.plot(*zip(*loss_by_second(result.runs[0]), strict=True), marker="o", ms=3)
    by_step.set(xlabel="step", ylabel="validation loss", title=title)
    for axes in by_second:
        axes.set(xlabel="seconds of training", title="first seed")
    tokens = tokens_per_step(results)
    if tokens is not None:
        by_step.set_ylabel("validation loss [nats / token]")
        millions = tokens / 1e6
        above = by_step.secondary_xaxis("top", (lambda x: x * millions, lambda x: x / millions))
        above.set_xlabel("million tokens")
    if many:
        figure.legend(loc="outside right upper", fontsize="small")
    else:
        by_step.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tokens_per_step(results: Sequence[VariantResult]) -> int | None:
    """Tokens of a step where all runs are of language models with the same; else None."""
    found = {
        options.get("block_size", 0)
        * options.get("per_device_train_batch_size", 0)
        * options.get("gradient_accumulation_steps", 1)
        for result in results
        for options in (run["options"] for run in result.runs)
    }
    return found.pop() or None if len(found) == 1 else None


def _time_cells(result: VariantResult, target: VariantResult) -> tuple[str, ...]:
    parts = ("forward_ms", "backward_ms", "optimizer_ms")
    ratio = run_median(result, "step_ms") / run_median(target, "step_ms")
    sizes = ("peak_memory_bytes", "optimizer_state_bytes")
    own, base = (seconds_to_reach(each, target.final_loss) for each in (result, target))
    reached = "not reached"
    if own is not None and base is not None:
        reached = f"{own:.0f} ({own / base:.0%})"
    return (
        *(f"{run_median(result, part):.1f}" for part in parts),
        f"{ratio:.2f}",
        *(f"{run_median(result, size) / 2**20:.1f}" for size in sizes),
        reached,
    )


def _cost_cells(name: str, costs: Mapping[str, tuple[str, ...]] | None) -> tuple[str, ...]:
    return costs.get(name, ("",) * len(COST_COLUMNS)) if costs else ()


def _steps_cell(result: VariantResult, target: VariantResult) -> str:
    steps = steps_to_reach(result.curve, target.final_loss)
    return "not reached" if steps is None else f"{steps:.0f} ({steps / target.curve[-1][0]:.0%})"


def _loss_cell(result: VariantResult, setting: Setting) -> str:
    if setting not in result.tried:
        return ""
    loss = result.tried[setting]
    cell = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
    return f"**{cell}**" if setting == result.setting else cell


def _legend(result: VariantResult) -> str:
    return f"{result.name}, lr {setting_text(result.setting)}: {result.final_loss:.3f}"


if __name__ == "__main__":
    sys.exit(main())
