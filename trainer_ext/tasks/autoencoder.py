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
from pathlib import Path
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


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Parses, prepares, trains, evaluates; returns the final metrics."""
    model_args, data_args, args = parse_training_arguments(
        ModelArguments, DataArguments, argv, __doc__
    )
    with one_line_errors():
        if not args.do_train and not args.do_eval:
            raise ValueError("do_train=False and do_eval=False leave nothing to do")
        checkpoint = find_checkpoint(args)
        trainer, data = build_trainer(model_args, data_args, args)

    def add_train_set(metrics: Metrics) -> None:
        found = trainer.evaluate(PixelDataset(data.train), metric_key_prefix=TRAIN_SET)
        metrics[f"{TRAIN_SET}_loss"] = found[f"{TRAIN_SET}_loss"]

    metrics = train_and_evaluate(trainer, checkpoint, add_train_set)
    if data_args.save_final_model:
        save_results(
            trainer,
            task="feature-extraction",
            dataset=data_args.data_name,
            finetuned_from=model_args.model_name_or_path,
        )
    if trainer.is_world_process_zero():
        print(summary(FIGURES, metrics, Path(args.output_dir)))
    return metrics


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> tuple[Trainer, ImageData]:
    """Loads the images and builds a model for them.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    if args.data_seed is None:
        args.data_seed = args.seed
    # The data set gives whole batches, from which nothing is to be taken out.
    args.remove_unused_columns = False
    with args.main_process_first(desc="images"):
        data = data_args.load()
    model = build_model(model_args, data, args.seed)
    trainer = new_trainer(
        model,
        args,
        PixelDataset(data.train),
        PixelDataset(data.validation),
        data_collator=as_it_is,
    )
    return trainer, data


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
