"""The options of training scripts that say which images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainer_ext.data.image_sources import SHAPES
from trainer_ext.data.images import ImageData, load_images
from trainer_ext.training_script import check_minima


@dataclass(kw_only=True)
class ImageArguments:
    """Which images, of what size."""

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
        check_minima(self, image_size=1, max_train_samples=1, max_eval_samples=1)

    def load(self) -> ImageData:
        """The images.

        Raises:
            ValueError: options that do not fit together; data that is missing or damaged.
        """
        return load_images(
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            data_dir=self.data_dir,
            image_column=self.image_column,
            label_column=self.label_column,
            validation_split_percentage=self.validation_split_percentage,
            image_size=self.image_size,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
        )

    @property
    def data_name(self) -> str:
        """What a model card calls the data."""
        return (self.data_dir and Path(self.data_dir).name) or self.dataset_name or SHAPES
