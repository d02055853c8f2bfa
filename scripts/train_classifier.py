#!/usr/bin/env python
"""Trains an image classifier with the stock Trainer.

    scripts/train_classifier.py configs/vision/shared_basis_adagrad.yaml --max_steps 200
    scripts/train_classifier.py --preset wide-cnn --data_dir FOLDER --random_crop_padding 4 \\
        --random_flip true --max_steps 500 --optim shampoo
    scripts/train_classifier.py --preset mlp --dataset_name ylecun/mnist --max_steps 500

Without data it draws its own images (`shapes`). FOLDER holds MNIST's idx files or CIFAR-10's binary
files, packed or not. Every key of the YAML file and every `--key` is a field of the dataclasses
below or of `TrainingArguments`; the command line overrides the file. `import trainer_ext` makes the
optimizers of this project valid values of `--optim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import trainer_ext  # noqa: F401  registers the optimizers
from trainer_ext.config_file import parse_config_and_command_line
from trainer_ext.data.classification_metrics import ClassificationMetrics, predicted_classes
from trainer_ext.data.images import (
    SHAPES,
    Augmentation,
    AugmentationEpochs,
    ImageData,
    ImageDataset,
    channel_statistics,
    load_images,
)
from trainer_ext.data.presets import override_config
from trainer_ext.data.vision_presets import (
    VISION_PRESETS,
    fit_to_images,
    name_labels,
    vision_preset_config,
)
from trainer_ext.training_script import (
    find_checkpoint,
    one_line_errors,
    save_results,
    summary,
    train_and_evaluate,
)

DEFAULT_PRESET = "vit-tiny"

FIGURES = (
    ("validation loss", "eval_loss", ".4f"),
    ("accuracy", "eval_accuracy", ".4f"),
    ("training seconds", "train_runtime", ".0f"),
)


@dataclass(kw_only=True)
class ModelArguments:
    """Which model: at most one of `preset`, `config_name` and `model_name_or_path`."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": f"Train a named size from scratch: {', '.join(VISION_PRESETS)}. "
            f"{DEFAULT_PRESET} when no model is named."
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Train from scratch by a config: a model type, a folder or a Hub name."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Continue from the weights in a folder or on the Hub."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Changes to the config of a new model, as hidden_sizes=[64,32],depths=[1,1]."
        },
    )

    def __post_init__(self) -> None:
        named = {
            name: getattr(self, name)
            for name in ("preset", "config_name", "model_name_or_path")
            if getattr(self, name) is not None
        }
        if len(named) > 1:
            options = " and ".join(f"{name}={value!r}" for name, value in named.items())
            raise ValueError(f"{options} exclude each other; give at most one")
        if not named:
            self.preset = DEFAULT_PRESET
        if self.model_name_or_path is not None and self.config_overrides is not None:
            raise ValueError(
                f"config_overrides={self.config_overrides!r} would not fit the weights of "
                f"model_name_or_path={self.model_name_or_path!r}; only new models take it"
            )


@dataclass(kw_only=True)
class DataArguments:
    """Which images, scaled and augmented how."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"{SHAPES} (images drawn here, the default), or a Hub dataset or local folder "
            "with an image and a label column, such as ylecun/mnist or uoft-cs/cifar10."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub dataset."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with MNIST's idx files or CIFAR-10's binary files."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images; found by its type when not given."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels; found by its type or as label."}
    )
    validation_split_percentage: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on this share of the training images and leave the data's own "
            "evaluation images alone; by default only where there are none, and then 10."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Scale the images to this many rows and columns."}
    )
    random_crop_padding: int = field(
        default=0, metadata={"help": "Train on random crops of images padded by this many pixels."}
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Mirror half of the training images left to right."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on N images, the same in every run."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on N images, the same in every run."}
    )
    save_final_model: bool = field(
        default=True, metadata={"help": "Save model and model card in output_dir."}
    )

    def __post_init__(self) -> None:
        minima = {
            "image_size": 1,
            "random_crop_padding": 0,
            "max_train_samples": 1,
            "max_eval_samples": 1,
        }
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name}={value} must be at least {minimum}")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Parses, prepares, trains, evaluates; returns the final metrics."""
    model_args, data_args, args = parse_config_and_command_line(
        (ModelArguments, DataArguments, TrainingArguments),
        argv,
        defaults={
            "do_train": True,
            "do_eval": True,
            # Pinning host memory helps copies to an accelerator only.
            "dataloader_pin_memory": torch.accelerator.is_available(),
        },
        description=__doc__,
    )
    with one_line_errors(__file__):
        if not args.do_train and not args.do_eval:
            raise ValueError("do_train=False and do_eval=False leave nothing to do")
        checkpoint = find_checkpoint(args)
        trainer = build_trainer(model_args, data_args, args)
    metrics = train_and_evaluate(trainer, checkpoint)
    if data_args.save_final_model:
        folder_name = data_args.data_dir and Path(data_args.data_dir).name
        save_results(
            trainer,
            task="image-classification",
            dataset=folder_name or data_args.dataset_name or SHAPES,
            finetuned_from=model_args.model_name_or_path,
        )
    if trainer.is_world_process_zero():
        print(summary(FIGURES, metrics, Path(args.output_dir)))
    return metrics


# --- preparation ----------------------------------------------------------------------------------


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> Trainer:
    """Loads the images and builds a model for them.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    if args.data_seed is None:
        args.data_seed = args.seed
    with args.main_process_first(desc="images"):
        data = load_images(
            dataset_name=data_args.dataset_name,
            dataset_config_name=data_args.dataset_config_name,
            data_dir=data_args.data_dir,
            image_column=data_args.image_column,
            label_column=data_args.label_column,
            validation_split_percentage=data_args.validation_split_percentage,
            image_size=data_args.image_size,
            max_train_samples=data_args.max_train_samples,
            max_eval_samples=data_args.max_eval_samples,
        )
    model = build_model(model_args, data, args.seed)
    train, validation = build_datasets(data, model.config, data_args, args.data_seed)
    # Options of the optimizer are checked here, not after the first batch is read.
    Trainer.get_optimizer_cls_and_kwargs(args, model)
    return Trainer(
        model=model,
        args=args,
        train_dataset=train if args.do_train else None,
        eval_dataset=validation,
        compute_metrics=ClassificationMetrics(),
        preprocess_logits_for_metrics=predicted_classes,
        callbacks=[AugmentationEpochs(train)],
    )


def build_model(model_args: ModelArguments, data: ImageData, seed: int) -> PreTrainedModel:
    """The pretrained model, or a new one whose weights depend on config and seed only.

    Raises:
        ValueError: images that do not fit the model.
    """
    config = load_config(model_args, data)
    name_labels(config, data.label_names)
    set_seed(seed)
    if model_args.model_name_or_path is None:
        model = AutoModelForImageClassification.from_config(config)
    else:
        # Other classes than those of the pretrained model get a new output layer.
        model = AutoModelForImageClassification.from_pretrained(
            model_args.model_name_or_path, config=config, ignore_mismatched_sizes=True
        )
    # All these losses are means over the batch, whatever arguments the model's forward takes.
    # ResNet's takes the number of items and ignores it; the Trainer would then sum over the
    # accumulated batches instead of averaging.
    model.accepts_loss_kwargs = False
    return model


def load_config(model_args: ModelArguments, data: ImageData) -> PretrainedConfig:
    """The model's configuration, with the overrides and the size of the images for a new model.

    Raises:
        ValueError: images that do not fit the pretrained model.
    """
    if model_args.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        for name in ("num_channels", "image_size"):
            expected, found = getattr(config, name, None), getattr(data, name)
            if expected is not None and expected != found:
                raise ValueError(
                    f"model_name_or_path={model_args.model_name_or_path!r} has {name}={expected}, "
                    f"the images of {data.name!r} have {found}"
                )
        return config
    if model_args.preset is not None:
        config = vision_preset_config(model_args.preset)
    elif model_args.config_name in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model_args.config_name]()
    else:
        config = AutoConfig.from_pretrained(model_args.config_name)
    if model_args.config_overrides:
        override_config(config, model_args.config_overrides)
    return fit_to_images(config, num_channels=data.num_channels, image_size=data.image_size)


def build_datasets(
    data: ImageData, config: PretrainedConfig, data_args: DataArguments, seed: int
) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images, normalised as the model's config says, else by their own.

    What they are normalised by is left in the config, so that the saved model tells it.
    """
    if getattr(config, "image_mean", None) is None:
        mean, std = channel_statistics(data.train)
        config.image_mean, config.image_std = list(mean), list(std)
    augmentation = None
    if data_args.random_crop_padding or data_args.random_flip:
        augmentation = Augmentation(
            padding=data_args.random_crop_padding, flip=data_args.random_flip, seed=seed
        )
    normalisation = {"mean": config.image_mean, "std": config.image_std}
    return (
        ImageDataset(data.train, augmentation=augmentation, **normalisation),
        ImageDataset(data.validation, **normalisation),
    )


if __name__ == "__main__":
    main()
