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
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer_ext.reports import steps_to_reach
from trainer_ext.sweep_results import (
    Setting,
    VariantResult,
    loss_by_second,
    read_runs,
    run_median,
    seconds_to_reach,
    summarise,
)

COST_COLUMNS = ("optimizer step, of AdamW's", "whole step", "state")
TIME_COLUMNS = (
    *("forward ms", "backward ms", "optimizer ms", "step, of {baseline}'s"),
    *("peak memory MiB", "state MiB", "seconds to the loss of {baseline}"),
)


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
    """What is shown beside the loss: BLEU, accuracy, perplexity of language models, or nothing."""
    if result.bleu is not None:
        return "BLEU"
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
    if result.bleu is not None:
        return f"{result.bleu:.1f}"
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
