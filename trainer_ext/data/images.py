"""Labelled images in memory, split, normalised and augmented.

Legend: N images, C channels, H rows and W columns of pixels. Images are uint8 until a
`ImageDataset` normalises the one that is asked for, so that a whole data set fits into memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer_ext.data.image_sources import (
    SHAPES,
    SHAPES_SIZE,
    HubSource,
    Images,
    ImageSource,
    ShapesSource,
    folder_source,
)

DEFAULT_VALIDATION_PERCENTAGE = 10
SUBSET_SEED = 0
"""Subsets are drawn by this seed and not by that of the run: all runs see the same images."""

IMAGES_PER_CHUNK = 1000

ChannelValues: TypeAlias = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Training and validation images.

    Attributes:
        name: what the model card and the logs call the data.
        label_names: names of the classes, by label.
    """

    name: str
    train: Images
    validation: Images
    label_names: tuple[str, ...]

    @property
    def num_channels(self) -> int:
        return self.train.pixels.shape[1]

    @property
    def image_size(self) -> int:
        return self.train.pixels.shape[-1]


def load_images(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    data_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_split_percentage: int | None = None,
    image_size: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> ImageData:
    """Loads the images that the options name; drawn shapes when they name none.

    Args:
        data_dir: folder with MNIST's or CIFAR-10's binary files.
        validation_split_percentage: share of the training images that is held out; the data's own
            evaluation images are then left alone. None takes those, or 10 where there are none.
        image_size: rows and columns to scale the images to; None leaves them as they are.
        max_train_samples, max_eval_samples: images drawn at random, the same in every run.

    Raises:
        ValueError: options that do not fit together; data that is missing or damaged.
    """
    if data_dir is not None and dataset_name is not None:
        raise ValueError(
            f"dataset_name={dataset_name!r} and data_dir={data_dir!r} exclude each other"
        )
    drawn = data_dir is None and dataset_name in (None, SHAPES)
    hub_only = {
        "dataset_config_name": dataset_config_name,
        "image_column": image_column,
        "label_column": label_column,
    }
    for option, value in hub_only.items():
        if value is not None and (drawn or data_dir is not None):
            where = repr(SHAPES) if drawn else f"data_dir={data_dir!r}"
            raise ValueError(f"{option}={value!r} has no effect with {where}")
    if validation_split_percentage is not None and not 1 <= validation_split_percentage <= 99:
        raise ValueError(
            f"validation_split_percentage={validation_split_percentage} must be in 1..99"
        )
    own_validation = validation_split_percentage is None
    if drawn:
        source: ImageSource = ShapesSource(size=image_size or SHAPES_SIZE)
    elif data_dir is not None:
        source = folder_source(data_dir, own_validation=own_validation)
    else:
        assert dataset_name is not None
        source = HubSource(
            dataset_name,
            dataset_config_name,
            image_column=image_column,
            label_column=label_column,
            image_size=image_size,
        )
    return _load(
        source, validation_split_percentage, image_size, max_train_samples, max_eval_samples
    )


class ImageDataset(torch.utils.data.Dataset):
    """`{"pixel_values": float [C, H, W], "labels": int}`, normalised and perhaps augmented.

    Args:
        mean, std: of each channel, for pixels between 0 and 1.
    """

    def __init__(
        self,
        images: Images,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
    ) -> None:
        self.images = images
        self.augmentation = augmentation
        # In units of the stored bytes.
        self._mean_C11 = 255 * torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self._std_C11 = 255 * torch.tensor(std, dtype=torch.float32)[:, None, None]
        # Shared, so that workers that outlive an epoch read it too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels_CHW = self.images.pixels[index].float()
        pixels_CHW = (pixels_CHW - self._mean_C11) / self._std_C11
        if self.augmentation is not None:
            pixels_CHW = self.augmentation(pixels_CHW, epoch=int(self._epoch), index=index)
        return {"pixel_values": pixels_CHW, "labels": int(self.images.labels[index])}

    def begin_epoch(self, epoch: int) -> None:
        """Has the augmentation drawn anew; `AugmentationEpochs` calls it."""
        self._epoch.fill_(epoch)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops of the padded image and random mirror images.

    What is drawn depends on seed, epoch and index of the image alone: not on the order of the
    images, on workers or on what else draws random numbers. So a resumed run sees the same.

    Attributes:
        padding: pixels added on each side, with the mean colour, before the crop; 0 crops nothing.
        flip: mirror half of the images left to right.
        seed: of the draws.
    """

    padding: int = 0
    flip: bool = False
    seed: int = 0

    def __call__(self, pixels_CHW: Tensor, *, epoch: int, index: int) -> Tensor:
        random = np.random.default_rng((self.seed, epoch, index))
        top, left = (int(n) for n in random.integers(2 * self.padding + 1, size=2))
        if self.padding:
            _, height, width = pixels_CHW.shape
            padded = F.pad(pixels_CHW, (self.padding,) * 4)
            pixels_CHW = padded[:, top : top + height, left : left + width]
        if self.flip and random.random() < 0.5:
            pixels_CHW = pixels_CHW.flip(-1)
        return pixels_CHW.contiguous()


class AugmentationEpochs(TrainerCallback):
    """Tells the training images which epoch begins.

    Accelerate's own `set_epoch` reaches the dataset in some set-ups and in others, such as several
    processes, only the sampler.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run resumed within an epoch begins at a fraction; a full epoch may sum to 0.999999.
        self.dataset.begin_epoch(math.floor((state.epoch or 0.0) + 1e-6))


def channel_statistics(images: Images) -> tuple[ChannelValues, ChannelValues]:
    """Mean and standard deviation of each channel, for pixels between 0 and 1.

    The deviation of a channel that never changes is given as 1.
    """
    sums = torch.zeros(2, images.pixels.shape[1], dtype=torch.float64)
    for chunk in images.pixels.split(IMAGES_PER_CHUNK):
        values = chunk.transpose(0, 1).flatten(1).double() / 255
        sums += torch.stack([values.sum(dim=1), values.square().sum(dim=1)])
    mean, mean_square = sums / (images.pixels.numel() / images.pixels.shape[1])
    std = (mean_square - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std < 1e-6, 1.0, std)
    return tuple(mean.tolist()), tuple(std.tolist())


# --- splits and sizes -----------------------------------------------------------------------------


def _load(
    source: ImageSource,
    percentage: int | None,
    image_size: int | None,
    max_train_samples: int | None,
    max_eval_samples: int | None,
) -> ImageData:
    train_rows = torch.arange(source.counts["train"])
    if percentage is None and "validation" in source.counts:
        validation_split = "validation"
        validation_rows = torch.arange(source.counts["validation"])
    else:
        validation_split = "train"
        train_rows, validation_rows = hold_out(
            len(train_rows), percentage or DEFAULT_VALIDATION_PERCENTAGE
        )
    train = source.read("train", draw_rows(train_rows, max_train_samples))
    validation = source.read(validation_split, draw_rows(validation_rows, max_eval_samples))
    if train.pixels.shape[1] != validation.pixels.shape[1]:
        raise ValueError(
            f"{source.name}: training images have {train.pixels.shape[1]} channels, "
            f"validation images {validation.pixels.shape[1]}"
        )
    train, validation = (scale(images, image_size) for images in (train, validation))
    if train.pixels.shape[-1] != validation.pixels.shape[-1]:
        raise ValueError(
            f"{source.name}: training images have {train.pixels.shape[-1]} pixels a side, "
            f"validation images {validation.pixels.shape[-1]}; give image_size"
        )
    return ImageData(
        name=source.name, train=train, validation=validation, label_names=source.label_names
    )


def hold_out(count: int, percentage: int) -> tuple[Tensor, Tensor]:
    """Rows kept and rows held out, at random: files may be sorted by class.

    Raises:
        ValueError: too few images for two parts.
    """
    held_out = max(1, count * percentage // 100)
    if held_out >= count:
        raise ValueError(f"{count} images are too few to hold out a validation split")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SUBSET_SEED))
    return order[held_out:].sort().values, order[:held_out].sort().values


def draw_rows(rows: Tensor, count: int | None) -> Tensor:
    """`count` of the rows, drawn at random, in their order; all of them for None."""
    if count is None or count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SUBSET_SEED))
    return rows[order[:count].sort().values]


def scale(images: Images, size: int | None) -> Images:
    """The images with `size` rows and columns."""
    if size is None or images.pixels.shape[-2:] == (size, size):
        return images
    chunks = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for chunk in images.pixels.split(IMAGES_PER_CHUNK)
    ]
    return Images(pixels=torch.cat(chunks), labels=images.labels)
