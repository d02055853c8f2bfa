"""Trains a small click-through model on a file of Criteo's with the stock Trainer.

    scripts/train_clicks.py configs/clicks/criteo_tiny.yaml --optim adamw_torch

A smoke test: a thousand rows show that embeddings and their optimizer work together, nothing else.
Every key of the YAML file and every `--key` is a field of the dataclasses below or of
`TrainingArguments`; the command line overrides the file. `import trainer_ext` makes the optimizers
of this project valid values of `--optim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch.utils.data import Subset
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from trainer_ext.data.clicks import ClicksConfig, ClicksDataset, clicks_metrics
from trainer_ext.training_script import (
    ModelChoice,
    find_checkpoint,
    new_trainer,
    one_line_errors,
    overrides_option,
    parse_training_arguments,
    preset_option,
    save_results,
    summary,
    train_and_evaluate,
)

FIGURES = (
    ("validation loss", "eval_loss", ".4f"),
    ("area under the curve", "eval_auc", ".4f"),
    ("training seconds", "train_runtime", ".0f"),
)
PRESETS = ("small",)


@dataclass(kw_only=True)
class ModelArguments(ModelChoice):
    """Which model."""

    DEFAULT_PRESET: ClassVar[str] = "small"

    preset: str | None = preset_option(PRESETS, DEFAULT_PRESET)
    config_overrides: str | None = overrides_option("num_buckets=100,hidden_sizes=[64]")


@dataclass(kw_only=True)
class DataArguments:
    """Which rows."""

    train_file: str | None = field(
        default=None, metadata={"help": "Criteo's columns with a header line; also .xz or .gz."}
    )
    validation_split_percentage: int = field(
        default=20, metadata={"help": "Share of the last rows that is held out."}
    )
    save_final_model: bool = field(
        default=True, metadata={"help": "Save model and model card in output_dir."}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.validation_split_percentage <= 99:
            raise ValueError(
                f"validation_split_percentage={self.validation_split_percentage} must be in 1..99"
            )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Parses, prepares, trains, evaluates; returns the final metrics."""
    model_args, data_args, args = parse_training_arguments(
        ModelArguments, DataArguments, argv, __doc__
    )
    with one_line_errors():
        checkpoint = find_checkpoint(args)
        trainer = build_trainer(model_args, data_args, args)
    metrics = train_and_evaluate(trainer, checkpoint)
    if data_args.save_final_model:
        save_results(
            trainer,
            task="tabular-classification",
            dataset=Path(data_args.train_file).name,
            finetuned_from=model_args.model_name_or_path,
        )
    if trainer.is_world_process_zero():
        print(summary(FIGURES, metrics, Path(args.output_dir)))
    return metrics


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> Trainer:
    """Reads the rows and builds a model.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    if data_args.train_file is None:
        raise ValueError("train_file is needed: Criteo's columns with a header line")
    if args.data_seed is None:
        args.data_seed = args.seed
    rows = ClicksDataset(data_args.train_file)
    kept = len(rows) - max(1, len(rows) * data_args.validation_split_percentage // 100)
    config = model_args.load_config(preset_config)
    set_seed(args.seed)
    if model_args.model_name_or_path is None:
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path)
    return new_trainer(
        model,
        args,
        Subset(rows, range(kept)),
        Subset(rows, range(kept, len(rows))),
        compute_metrics=clicks_metrics,
    )


def preset_config(name: str) -> ClicksConfig:
    """The configuration of the one preset.

    Raises:
        ValueError: for another name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} must be one of {', '.join(PRESETS)}")
    return ClicksConfig()
