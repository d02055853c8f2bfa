"""Trains the deep autoencoder of optimizer papers with the stock Trainer.

    scripts/train_autoencoder.py configs/autoencoder/mnist.yaml --data_dir FOLDER
    scripts/train_autoencoder.py --preset tiny --max_steps 200 --optim shared_basis_adagrad

FOLDER holds MNIST's idx files or CIFAR-10's binary files, packed or not; without data it draws its
own images (`shapes`). The loss is the sigmoid cross-entropy summed over pixels. At the end it is
also given for all training images, which is what papers compare. Every key of the YAML file and
every `--key` is a field of the dataclasses below or of `TrainingArguments`; the command line
overrides the file. `import trainer_ext` makes the optimizers of this project valid values of
`--optim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import AutoModel, PreTrainedModel, Trainer, TrainingArguments, set_seed

from trainer_ext.data.autoencoder import (
    AUTOENCODER_PRESETS,
    PixelDataset,
    as_it_is,
    autoencoder_preset_config,
)
from trainer_ext.data.image_arguments import ImageArguments
from trainer_ext.data.images import ImageData
from trainer_ext.training_script import (
    Metrics,
    ModelChoice,
    Task,
    new_trainer,
    overrides_option,
    preset_option,
    run_task,
)

TRAIN_SET = "train_set"
FIGURES = (
    ("loss of the training images", f"{TRAIN_SET}_loss", ".3f"),
    ("validation loss", "eval_loss", ".3f"),
    ("training seconds", "train_runtime", ".0f"),
)


@dataclass(kw_only=True)
class ModelArguments(ModelChoice):
    """Which model."""

    DEFAULT_PRESET: ClassVar[str] = "paper"

    preset: str | None = preset_option(AUTOENCODER_PRESETS, DEFAULT_PRESET)
    config_overrides: str | None = overrides_option("hidden_sizes=[256,64,16]")


@dataclass(kw_only=True)
class DataArguments(ImageArguments):
    """Which images; their labels do not count."""


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> Trainer:
    """Loads the images and builds a model for them.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    # The data set gives whole batches, from which nothing is to be taken out.
    args.remove_unused_columns = False
    with args.main_process_first(desc="images"):
        data = data_args.load()
    model = build_model(model_args, data, args.seed)
    return new_trainer(
        model,
        args,
        PixelDataset(data.train),
        PixelDataset(data.validation),
        data_collator=as_it_is,
    )


def add_train_set(trainer: Trainer, metrics: Metrics) -> None:
    """Adds the loss of all training images, where there was a training."""
    if trainer.train_dataset is not None:
        found = trainer.evaluate(trainer.train_dataset, metric_key_prefix=TRAIN_SET)
        metrics[f"{TRAIN_SET}_loss"] = found[f"{TRAIN_SET}_loss"]


def build_model(model_args: ModelArguments, data: ImageData, seed: int) -> PreTrainedModel:
    """The pretrained model, or a new one whose weights depend on config and seed only.

    Raises:
        ValueError: images that do not fit the pretrained model.
    """
    config = model_args.load_config(autoencoder_preset_config)
    set_seed(seed)
    if model_args.model_name_or_path is None:
        config.num_channels, config.image_size = data.num_channels, data.image_size
        return AutoModel.from_config(config)
    for name in ("num_channels", "image_size"):
        expected, found = getattr(config, name, None), getattr(data, name)
        if expected != found:
            raise ValueError(
                f"model_name_or_path={model_args.model_name_or_path!r} has {name}={expected}, "
                f"the images of {data.name!r} have {found}"
            )
    return AutoModel.from_pretrained(model_args.model_name_or_path, config=config)


TASK = Task(
    description=__doc__ or "",
    model_type=ModelArguments,
    data_type=DataArguments,
    build_trainer=build_trainer,
    figures=FIGURES,
    hub_task="feature-extraction",
    data_name=lambda data: data.data_name,
    complete=add_train_set,
)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the task; returns the final metrics."""
    return run_task(TASK, argv)
