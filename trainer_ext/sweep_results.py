"""What the runs of a sweep say: each variant at its best setting, averaged over seeds."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from trainer_ext.reports import Curve, read_records, steps_to_reach
from trainer_ext.step_times import ELAPSED

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
        bleu: of a translator, at the end.
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
    bleu: float | None = None

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
        bleu=mean_metric(runs, "eval_bleu"),
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
    of_text = any("eval_perplexity" in run["metrics"] for run in runs)
    return None if of_text else mean_metric(runs, "eval_accuracy")


def mean_metric(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a metric at the end, None where a run has none."""
    found = [run["metrics"].get(name) for run in runs]
    return None if None in found else fmean(found)


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
    reached = [seconds for seconds in found if seconds is not None]
    return median(reached) if len(reached) == len(found) else None
