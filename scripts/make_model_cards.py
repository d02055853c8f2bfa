#!/usr/bin/env python
"""Renders model_cards/ from results/: the cards of the runs that docs/results.md speaks of.

    scripts/make_model_cards.py

Each card is of one optimizer at its best setting, beside AdamW at its own.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from huggingface_hub import ModelCardData

from hf_precond.registry import optimizer_info
from trainer_ext.citations import bibtex
from trainer_ext.model_card import TAG, evaluation_results, render
from trainer_ext.reports import steps_to_reach
from trainer_ext.sweep_results import VariantResult, read_runs, summarise

REPOSITORY = Path(__file__).resolve().parents[1]
BASELINE = "adamw_torch"
_SHOWN_OPTIONS = (
    *("optim", "optim_args", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm", "max_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "block_size", "max_length"),
    *("preset", "config_overrides", "vocab_size"),
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A task whose runs get cards.

    Attributes:
        name: of results/NAME.jsonl.
        metrics: key of a run's metrics -> the Hub's name of it, the loss first.
        registers: module that tells transformers of the model's class, where it is not its own.
    """

    name: str
    variants: tuple[str, ...]
    task: str
    dataset: str
    summary: str
    auto_class: str
    metrics: Mapping[str, str]
    language: tuple[str, ...] = ()
    registers: str = ""


SUBJECTS = (
    Subject(
        name="c4_gpt2",
        variants=("two_sided_basis", "shared_basis_adam"),
        task="text-generation",
        dataset="allenai/c4",
        summary="GPT-2 with 4 layers of width 128, trained on a sample of C4.",
        auto_class="AutoModelForCausalLM",
        metrics={"eval_loss": "loss", "eval_perplexity": "perplexity"},
        language=("en",),
    ),
    Subject(
        name="translation_multi30k",
        variants=("two_sided_basis", "ng_plus"),
        task="translation",
        dataset="multi30k",
        summary="A Marian model with 2 + 2 layers of width 128, German to English.",
        auto_class="AutoModelForSeq2SeqLM",
        metrics={"eval_loss": "loss", "eval_accuracy": "accuracy"},
        language=("de", "en"),
    ),
    Subject(
        name="tagger_ewt",
        variants=("two_sided_basis",),
        task="token-classification",
        dataset="universal_dependencies",
        summary="A Transformer with 3 layers of width 128 that tags parts of speech (UD EWT).",
        registers="trainer_ext.data.tagger",
        auto_class="AutoModelForTokenClassification",
        metrics={"eval_loss": "loss", "eval_accuracy": "accuracy"},
        language=("en",),
    ),
    Subject(
        name="autoencoder_mnist",
        variants=("two_sided_basis", "kfac"),
        task="feature-extraction",
        dataset="mnist",
        summary="The deep autoencoder 784-1000-500-250-30 and back, on MNIST.",
        auto_class="AutoModel",
        registers="trainer_ext.data.autoencoder",
        metrics={"eval_loss": "loss"},
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes all cards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=REPOSITORY / "model_cards")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, content in cards().items():
        (args.output / name).write_text(content, encoding="utf-8")
        print(args.output / name)
    return 0


def cards() -> dict[str, str]:
    """File name -> content of every card."""
    found = {}
    for subject in SUBJECTS:
        results = {
            result.name: result
            for result in summarise(read_runs(REPOSITORY / "results" / f"{subject.name}.jsonl"))
        }
        for variant in subject.variants:
            content = card(subject, results[variant], results[BASELINE])
            found[f"{subject.name}-{variant}.md"] = content
    return found


def card(subject: Subject, result: VariantResult, baseline: VariantResult) -> str:
    """The card of a variant at its best setting."""
    run = result.runs[0]
    options = run["options"]
    info = optimizer_info(options["optim"])
    title = f"{subject.name}-{result.name}"
    means = {key: fmean(values_of(result, key)) for key in subject.metrics}
    data = ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag=subject.task,
        language=list(subject.language) or None,
        datasets=[subject.dataset],
        metrics=list(subject.metrics.values()),
        tags=[TAG, info.name],
        eval_results=evaluation_results(
            means, task=subject.task, dataset=subject.dataset, metric_names=subject.metrics
        ),
    )
    hardware, packages = run["hardware"], run["packages"]
    return render(
        "result_card.md",
        metadata=data.to_yaml().strip(),
        title=title,
        summary=subject.summary,
        optimizer=info.name,
        about=info.summary,
        options={key: options[key] for key in _SHOWN_OPTIONS if key in options},
        hardware=f"{hardware['cores']} cores of {hardware['cpu']}",
        software=", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers")),
        revision=run["git_revision"],
        command=command_of(run),
        metric_names=[f"validation {name}" for name in subject.metrics.values()] + ["seeds"],
        rows=[
            (label, [*(cell(each, key) for key in subject.metrics), str(each.seeds)])
            for label, each in ((f"`{info.name}`", result), ("AdamW", baseline))
        ],
        reached=reached_words(result, baseline),
        table=f"../results/{subject.name}.md",
        runs=f"../results/{subject.name}.jsonl",
        plot=f"../results/{subject.name}.png",
        auto_class=subject.auto_class,
        registers=subject.registers,
        bibtex=bibtex(info.name),
    )


def command_of(run: Mapping[str, Any]) -> str:
    """The command of a run, one option a line, with a folder for its files."""
    script, *arguments = run["command"]
    kept = [part for part in arguments if not part.startswith(("--save", "--output_dir"))]
    parts = [f"python {script}", *map(shlex.quote, kept), "--output_dir=outputs/run"]
    return " \\\n  ".join(parts)


def values_of(result: VariantResult, key: str) -> list[float]:
    """A final metric of every seed."""
    return [float(run["metrics"][key]) for run in result.runs]


def cell(result: VariantResult, key: str) -> str:
    """Mean and spread over seeds."""
    values = values_of(result, key)
    mean = f"{fmean(values):.4g}"
    return f"{mean} ± {stdev(values):.2g}" if len(values) > 1 else mean


def reached_words(result: VariantResult, baseline: VariantResult) -> str:
    """When the run was where AdamW ended."""
    steps = steps_to_reach(result.curve, baseline.final_loss)
    if steps is None:
        return "AdamW's final validation loss was not reached."
    return (
        f"AdamW's final validation loss was reached after {steps:.0f} steps, "
        f"{steps / baseline.curve[-1][0]:.0%} of its own."
    )


if __name__ == "__main__":
    raise SystemExit(main())
