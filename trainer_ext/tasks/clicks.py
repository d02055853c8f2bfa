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
    Task,
    new_trainer,
    overrides_option,
    preset_option,
    run_task,
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


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> Trainer:
    """Reads the rows and builds a model.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    if data_args.train_file is None:
        raise ValueError("train_file is needed: Criteo's columns with a header line")
    rows = ClicksDataset(data_args.train_file)
    kept = len(rows) - max(1, len(rows) * data_args.validation_split_percentage // 100)
    if kept < 1:
        raise ValueError(f"{data_args.train_file!r} has too few rows to hold some out: {len(rows)}")
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


TASK = Task(
    description=__doc__ or "",
    model_type=ModelArguments,
    data_type=DataArguments,
    build_trainer=build_trainer,
    figures=FIGURES,
    hub_task="tabular-classification",
    data_name=lambda data: Path(data.train_file).name,
)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the task; returns the final metrics."""
    return run_task(TASK, argv)
