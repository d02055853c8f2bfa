"""A finished run in its model card: curves, figures, and a baseline beside them.

Everything is read from the files that the Trainer leaves; no model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from trainer_ext.model_card import evaluation_results, put_section, render
from trainer_ext.reports import Curve, steps_to_reach

STATE = "trainer_state.json"
METRICS = "all_results.json"
IMAGE = "training_curves.png"
LOSSES = {"eval_loss": "validation loss", "loss": "training loss"}
# Figures worth showing, of those that a run has: label and form.
_FIGURES = {
    "eval_loss": ("validation loss", ".4f"),
    "eval_perplexity": ("perplexity", ".2f"),
    "eval_accuracy": ("accuracy", ".4f"),
    "eval_bleu": ("BLEU", ".2f"),
    "train_step_ms": ("milliseconds of a training step", ".1f"),
    "train_optimizer_ms": ("of these in the optimizer", ".1f"),
    "train_optimizer_state_bytes": ("bytes of optimizer state", ",.0f"),
    "train_peak_memory_bytes": ("peak memory in bytes", ",.0f"),
    "train_runtime": ("seconds", ".0f"),
}

# Key of a run's metrics -> the Hub's name.
_HUB_METRICS = {
    "eval_loss": "loss",
    "eval_perplexity": "perplexity",
    "eval_accuracy": "accuracy",
    "eval_bleu": "bleu",
}


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What the Hub is to know of a model beyond what the Trainer has said; None leaves it as it is.

    Attributes:
        license: as the Hub writes it, ``apache-2.0``.
        language: codes, ``en``.
        datasets: names on the Hub, or any name.
        task: the Hub's name of it, ``text-generation``; from the card where it has one.
    """

    license: str | None = None
    language: Sequence[str] | None = None
    datasets: Sequence[str] | None = None
    task: str | None = None


def add_training_section(
    folder: str | Path, baseline: str | Path | None = None, metadata: Metadata | None = None
) -> Path:
    """Puts curves and figures into the README.md of a finished run; replaces an earlier section.

    Where the task is known, the final metrics go into the metadata, too (the Hub's model index).

    Args:
        baseline: folder of another run, to which this one is compared.

    Returns:
        the card.

    Raises:
        ValueError: a folder without a card, or without the files of a run.
    """
    folder = Path(folder)
    card = folder / "README.md"
    if not card.is_file():
        raise ValueError(
            f"{str(folder)!r} has no README.md: trainer.create_model_card() writes one"
        )
    runs = {"this run": read_run(folder)}
    if baseline is not None:
        runs["baseline"] = read_run(Path(baseline))
    plot_curves({name: curves for name, (curves, _) in runs.items()}, folder / IMAGE)
    section = render(
        "training_section.md",
        image=IMAGE,
        columns=list(runs),
        rows=figure_rows([metrics for _, metrics in runs.values()]),
        reached=reached_words([curves for curves, _ in runs.values()]),
    )
    put_section(card, "training", section)
    add_metadata(card, metadata or Metadata(), runs["this run"][1])
    return card


def add_metadata(path: Path, metadata: Metadata, metrics: Mapping[str, Any]) -> None:
    """Puts what is known of a model into the metadata of its card."""
    card = ModelCard.load(path)
    data = card.data
    for name in ("license", "language", "datasets"):
        value = getattr(metadata, name)
        if value:
            setattr(data, name, value if isinstance(value, str) else list(value))
    data.pipeline_tag = metadata.task or data.pipeline_tag
    measured = [name for key, name in _HUB_METRICS.items() if key in metrics]
    if measured:
        data.metrics = measured
    datasets = [data.datasets] if isinstance(data.datasets, str) else data.datasets
    if data.pipeline_tag and datasets:
        data.model_name = data.model_name or path.resolve().parent.name
        data.eval_results = evaluation_results(
            metrics, task=data.pipeline_tag, dataset=datasets[0], metric_names=_HUB_METRICS
        )
    card.save(path)


def read_run(folder: Path) -> tuple[dict[str, Curve], dict[str, Any]]:
    """Curves by the name of the loss, and the final metrics.

    Raises:
        ValueError: the folder is none of a run that has ended.
    """
    try:
        history = json.loads((folder / STATE).read_text(encoding="utf-8"))["log_history"]
        curves = {name: curve_of(history, name) for name in LOSSES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder)!r} is no folder of a run: {STATE}: {error}") from error
    metrics = {}
    if (folder / METRICS).is_file():
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return {name: curve for name, curve in curves.items() if curve}, metrics


def curve_of(history: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """A loss by step; the last entry counts where a step was logged twice.

    >>> curve_of([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2}], "loss")
    [(1, 2.0), (2, 1.5)]
    """
    return sorted({entry["step"]: entry[name] for entry in history if name in entry}.items())


def figure_rows(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Label and one cell a run, of the figures that the first run has."""
    return [
        (label, [format(run[key], form) if key in run else "" for run in metrics])
        for key, (label, form) in _FIGURES.items()
        if key in metrics[0]
    ]


def reached_words(curves: Sequence[Mapping[str, Curve]]) -> str:
    """When this run was where the baseline ended; nothing without a baseline to compare with."""
    if len(curves) < 2 or not all("eval_loss" in run for run in curves):
        return ""
    own, base = (run["eval_loss"] for run in curves)
    last_step, target = base[-1]
    steps = steps_to_reach(own, target)
    if steps is None:
        return f"The baseline's final validation loss of {target:.4f} was not reached."
    share = steps / last_step
    return (
        f"The baseline's final validation loss of {target:.4f} was reached after {steps:.0f} "
        f"steps, {share:.0%} of its own."
    )


def plot_curves(runs: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draws validation and training loss against the step, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in LOSSES if any(name in curves for curves in runs.values())]
    figure, all_axes = plt.subplots(
        1,
        max(1, len(shown)),
        figsize=(5 * max(1, len(shown)), 3.5),
        layout="constrained",
        squeeze=False,
    )
    for axes, name in zip(all_axes[0], shown, strict=False):
        for run, curves in runs.items():
            if name in curves:
                axes.plot(*zip(*curves[name], strict=True), marker="o", ms=3, label=run)
        axes.set(xlabel="step", ylabel=LOSSES[name])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
