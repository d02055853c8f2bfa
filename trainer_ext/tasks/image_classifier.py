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
from typing import ClassVar

from transformers import (
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from trainer_ext.data.classification_metrics import ClassificationMetrics, predicted_classes
from trainer_ext.data.image_arguments import ImageArguments
from trainer_ext.data.images import (
    Augmentation,
    AugmentationEpochs,
    ImageData,
    ImageDataset,
    channel_statistics,
)
from trainer_ext.data.vision_presets import (
    VISION_PRESETS,
    fit_to_images,
    name_labels,
    vision_preset_config,
)
from trainer_ext.training_script import (
    ModelChoice,
    Task,
    check_minima,
    new_trainer,
    overrides_option,
    preset_option,
    run_task,
)

FIGURES = (
    ("validation loss", "eval_loss", ".4f"),
    ("accuracy", "eval_accuracy", ".4f"),
    ("training seconds", "train_runtime", ".0f"),
)


@dataclass(kw_only=True)
class ModelArguments(ModelChoice):
    """Which model."""

    DEFAULT_PRESET: ClassVar[str] = "vit-tiny"

    preset: str | None = preset_option(VISION_PRESETS, DEFAULT_PRESET)
    config_overrides: str | None = overrides_option("hidden_sizes=[64,32],depths=[1,1]")


@dataclass(kw_only=True)
class DataArguments(ImageArguments):
    """Which images, scaled and augmented how."""

    random_crop_padding: int = field(
        default=0, metadata={"help": "Train on random crops of images padded by this many pixels."}
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Mirror half of the training images left to right."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minima(self, random_crop_padding=0)


# --- preparation ----------------------------------------------------------------------------------


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> Trainer:
    """Loads the images and builds a model for them.

    Raises:
        ValueError: options that do not fit the data or the model.
    """
    with args.main_process_first(desc="images"):
        data = data_args.load()
    model = build_model(model_args, data, args.seed)
    train, validation = build_datasets(data, model.config, data_args, args.data_seed)
    return new_trainer(
        model,
        args,
        train,
        validation,
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
    config = model_args.load_config(vision_preset_config)
    if model_args.model_name_or_path is None:
        return fit_to_images(config, num_channels=data.num_channels, image_size=data.image_size)
    for name in ("num_channels", "image_size"):
        expected, found = getattr(config, name, None), getattr(data, name)
        if expected is not None and expected != found:
            raise ValueError(
                f"model_name_or_path={model_args.model_name_or_path!r} has {name}={expected}, "
                f"the images of {data.name!r} have {found}"
            )
    return config


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


TASK = Task(
    description=__doc__ or "",
    model_type=ModelArguments,
    data_type=DataArguments,
    build_trainer=build_trainer,
    figures=FIGURES,
    hub_task="image-classification",
    data_name=lambda data: data.data_name,
)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the task; returns the final metrics."""
    return run_task(TASK, argv)
