"""Where labelled images come from: MNIST and CIFAR-10 files, the Hub, shapes drawn on the spot.

Legend: N images, C channels, H rows and W columns of pixels.
"""

from __future__ import annotations

import gzip
import lzma
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

SHAPES = "shapes"
SHAPES_SIZE = 32
SHAPES_COUNTS = (4000, 1000)
"""Drawn training and validation images."""

IDX_IMAGES, IDX_LABELS = 0x803, 0x801
"""First four bytes of idx files: unsigned bytes in three and in one dimension."""
MNIST_CLASSES = tuple(str(digit) for digit in range(10))

CIFAR_SIZE = 32
CIFAR_RECORD = 1 + 3 * CIFAR_SIZE * CIFAR_SIZE
CIFAR_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

IMAGES_PER_CHUNK = 1000
GREY_MODES = frozenset({"1", "L"})


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images and their labels.

    Attributes:
        pixels: uint8, [N, C, H, W].
        labels: int64, [N], an index into the names of the classes.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, rows: Tensor) -> Images:
        """The images of these rows."""
        return Images(pixels=self.pixels[rows], labels=self.labels[rows])


class ImageSource(ABC):
    """Images of a `train` split and perhaps a `validation` split.

    Attributes:
        counts: number of images of each split that there is.
    """

    name: str
    label_names: tuple[str, ...]
    counts: dict[str, int]

    @abstractmethod
    def read(self, split: str, rows: Tensor) -> Images:
        """The images of these rows of a split."""


# --- local files ----------------------------------------------------------------------------------


class _ArraySource(ImageSource):
    """Splits that are read whole."""

    def __init__(
        self, name: str, label_names: tuple[str, ...], splits: dict[str, Callable[[], Images]]
    ) -> None:
        self.name = name
        self.label_names = label_names
        self._splits = {split: read() for split, read in splits.items()}
        self.counts = {split: len(images) for split, images in self._splits.items()}

    def read(self, split: str, rows: Tensor) -> Images:
        return self._splits[split].at(rows)


def folder_source(data_dir: str, *, own_validation: bool) -> ImageSource:
    """The layout is told by the names of the files.

    Raises:
        ValueError: no such folder, a folder with neither layout, missing or damaged files.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise ValueError(f"data_dir={data_dir!r} is not a folder")
    names = sorted(path.name for path in folder.iterdir())
    if any("-idx3-ubyte" in name or ".idx3-ubyte" in name for name in names):
        splits = {"train": lambda: read_mnist(folder, "train")}
        if own_validation:
            splits["validation"] = lambda: read_mnist(folder, "t10k")
        return _ArraySource(folder.name, MNIST_CLASSES, splits)
    files = [folder / name for name in names if name.endswith((".bin", ".bin.xz"))]
    if files:
        test = [path for path in files if "test" in path.name]
        train = [path for path in files if "test" not in path.name]
        if not train:
            raise ValueError(
                f"data_dir={data_dir!r} has no training file: expected a .bin or .bin.xz file "
                "without 'test' in its name"
            )
        if own_validation and not test:
            raise ValueError(
                f"data_dir={data_dir!r} has no evaluation file: expected a .bin or .bin.xz file "
                "with 'test' in its name; or give validation_split_percentage"
            )
        splits = {"train": lambda: read_cifar(train)}
        if own_validation:
            splits["validation"] = lambda: read_cifar(test)
        return _ArraySource(folder.name, CIFAR_CLASSES, splits)
    raise ValueError(
        f"data_dir={data_dir!r} holds no images: expected MNIST's train-images-idx3-ubyte.gz and "
        "its companions, or CIFAR-10's binary .bin or .bin.xz files"
    )


def read_mnist(folder: Path, prefix: str) -> Images:
    """Images and labels of MNIST's `train` or `t10k` files, packed by gzip or plain.

    Raises:
        ValueError: a missing or damaged file; different numbers of images and labels.
    """
    image_file = _find_idx(folder, f"{prefix}-images", 3)
    label_file = _find_idx(folder, f"{prefix}-labels", 1)
    images = read_idx(image_file, IDX_IMAGES)
    labels = read_idx(label_file, IDX_LABELS)
    if len(images) != len(labels):
        raise ValueError(
            f"image file {str(image_file)!r} holds {len(images)} images, its label file "
            f"{label_file.name!r} {len(labels)} labels"
        )
    _check_labels(label_file, labels, len(MNIST_CLASSES))
    return Images(pixels=torch.from_numpy(images)[:, None], labels=torch.from_numpy(labels).long())


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The array of an idx file of unsigned bytes.

    Raises:
        ValueError: another kind of file, or one whose size is not what its header says.
    """
    content = _read_packed(path)
    found = int.from_bytes(content[:4], "big")
    if len(content) < 4 or found != magic:
        raise ValueError(
            f"image file {str(path)!r}: expected the idx header 0x{magic:08x}, found "
            f"0x{content[:4].hex() or '0'}"
        )
    start = 4 + 4 * (magic & 0xFF)
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    _check_size(path, len(content), start + math.prod(shape), f"for {shape[0]} entries")
    return np.frombuffer(bytearray(content[start:]), dtype=np.uint8).reshape(shape)


def read_cifar(files: Sequence[Path]) -> Images:
    """Images of CIFAR-10's binary files: a label byte, then planes of red, green and blue.

    Raises:
        ValueError: a damaged file.
    """
    records = np.concatenate([_read_cifar_records(path) for path in files])
    pixels = records[:, 1:].reshape(-1, 3, CIFAR_SIZE, CIFAR_SIZE)
    return Images(
        pixels=torch.from_numpy(pixels.copy()),
        labels=torch.from_numpy(records[:, 0].astype(np.int64)),
    )


def _read_cifar_records(path: Path) -> np.ndarray:
    content = _read_packed(path)
    whole = len(content) - len(content) % CIFAR_RECORD
    _check_size(path, len(content), whole or CIFAR_RECORD, f"in records of {CIFAR_RECORD} bytes")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, CIFAR_RECORD)
    _check_labels(path, records[:, 0], len(CIFAR_CLASSES))
    return records


def _find_idx(folder: Path, stem: str, dimensions: int) -> Path:
    """The idx file in one of its usual spellings."""
    for separator in "-.":
        for suffix in (".gz", ""):
            path = folder / f"{stem}{separator}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    missing = str(folder / f"{stem}-idx{dimensions}-ubyte.gz")
    hint = "; or give validation_split_percentage" if stem.startswith("t10k") else ""
    raise ValueError(f"image file {missing!r} does not exist{hint}")


def _read_packed(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            return gzip.decompress(content)
        return lzma.decompress(content) if path.suffix == ".xz" else content
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"image file {str(path)!r} is damaged: expected {path.suffix} packed data: {error}"
        ) from error


def _check_size(path: Path, size: int, expected: int, what: str) -> None:
    if size != expected:
        raise ValueError(
            f"image file {str(path)!r} is damaged: expected {expected} bytes {what}, found {size}"
        )


def _check_labels(path: Path, labels: np.ndarray, count: int) -> None:
    if len(labels) == 0:
        raise ValueError(f"image file {str(path)!r} holds no images")
    if labels.max() >= count:
        raise ValueError(
            f"image file {str(path)!r} is damaged: expected labels 0 to {count - 1}, found "
            f"{labels.max()}"
        )


# --- the Hub --------------------------------------------------------------------------------------


class HubSource(ImageSource):
    """A data set with a column of images and one of labels, decoded as far as it is asked for.

    Raises:
        ValueError: no such data set, no `train` split, no such columns.
    """

    def __init__(
        self,
        dataset_name: str,
        dataset_config_name: str | None,
        *,
        image_column: str | None,
        label_column: str | None,
        image_size: int | None,
    ) -> None:
        self.name = dataset_name
        self._image_size = image_size
        try:
            splits = datasets.load_dataset(dataset_name, dataset_config_name)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"dataset_name={dataset_name!r} is neither {SHAPES!r} nor a data set found as a "
                f"folder or on the Hub: {error}"
            ) from error
        if "train" not in splits:
            raise ValueError(
                f"dataset_name={dataset_name!r} has no 'train' split, only {list(splits)}"
            )
        self._splits = {"train": splits["train"]}
        own = [split for split in ("validation", "valid", "test") if split in splits]
        if own:
            self._splits["validation"] = splits[own[0]]
        self.counts = {split: len(rows) for split, rows in self._splits.items()}
        for split, count in self.counts.items():
            if not count:
                raise ValueError(f"dataset_name={dataset_name!r}: {split} holds no images")
        features = splits["train"].features
        self._image_column = self._column(
            features, "image_column", image_column, lambda _, kind: isinstance(kind, datasets.Image)
        )
        self._label_column = self._column(
            features,
            "label_column",
            label_column,
            lambda name, kind: isinstance(kind, datasets.ClassLabel) or name in ("label", "labels"),
        )
        self._label_feature = features[self._label_column]
        if isinstance(self._label_feature, datasets.ClassLabel):
            self._values: list[Any] = list(range(self._label_feature.num_classes))
            self.label_names = tuple(self._label_feature.names)
        else:
            self._values = sorted(set(splits["train"][self._label_column]))
            self.label_names = tuple(map(str, self._values))

    def _column(
        self,
        features: Any,
        option: str,
        wanted: str | None,
        fits: Callable[[str, Any], bool],
    ) -> str:
        """The column that is wanted, else the only one that fits."""
        if wanted is not None:
            if wanted not in features:
                raise ValueError(
                    f"{option}={wanted!r}: dataset_name={self.name!r} has only {list(features)}"
                )
            return wanted
        found = [name for name, kind in features.items() if fits(name, kind)]
        if len(found) != 1:
            raise ValueError(
                f"dataset_name={self.name!r}: {len(found)} of its columns {list(features)} fit; "
                f"give {option}"
            )
        return found[0]

    def read(self, split: str, rows: Tensor) -> Images:
        chosen = self._splits[split].select(rows.tolist())
        labels = self._labels(chosen[self._label_column])
        arrays = list(self._arrays(chosen))
        shapes = {array.shape for array in arrays}
        if len(shapes) != 1 or len(set(arrays[0].shape[:2])) != 1:
            sizes = ", ".join(
                f"{height} x {width}" for height, width in sorted({s[:2] for s in shapes})[:3]
            )
            raise ValueError(
                f"dataset_name={self.name!r}: images of {sizes} pixels are not equal squares; "
                "give image_size"
            )
        pixels_NHWC = torch.from_numpy(np.stack(arrays))
        return Images(
            pixels=pixels_NHWC.permute(0, 3, 1, 2).contiguous(), labels=torch.tensor(labels)
        )

    def _labels(self, values: Sequence[Any]) -> list[int]:
        indices = {value: index for index, value in enumerate(self._values)}
        unknown = sorted({str(value) for value in values if value not in indices})
        if unknown:
            raise ValueError(
                f"dataset_name={self.name!r}: {self._label_column} {unknown[0]!r} is none of the "
                f"{len(indices)} classes of the training images"
            )
        return [indices[value] for value in values]

    def _arrays(self, rows: datasets.Dataset) -> Iterator[np.ndarray]:
        """Each image as [H, W, C], grey or RGB as the first one of the training images."""
        mode = None
        for index in range(len(rows)):
            try:
                image = rows[index][self._image_column]
                mode = mode or self._mode()
                image = image.convert(mode)
                if self._image_size is not None:
                    image = image.resize((self._image_size, self._image_size), resample=2)
            except (OSError, AttributeError) as error:
                raise ValueError(
                    f"dataset_name={self.name!r}: {self._image_column} {index} is no image: {error}"
                ) from error
            array = np.asarray(image)
            yield array if array.ndim == 3 else array[:, :, None]

    def _mode(self) -> str:
        first = self._splits["train"][0][self._image_column]
        return "L" if first.mode in GREY_MODES else "RGB"


# --- drawn shapes ---------------------------------------------------------------------------------


def _bars(along: Tensor, extent: Tensor) -> Tensor:
    return (extent < 0.95) & (torch.cos(3 * math.pi * along) > 0)


def _plus(a: Tensor, b: Tensor, extent: Tensor) -> Tensor:
    return (torch.minimum(a.abs(), b.abs()) < 0.25) & (extent < 0.95)


SHAPE_MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disk": lambda x, y: torch.hypot(x, y) < 0.95,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() < 0.2,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.8,
    "frame": lambda x, y: (torch.maximum(x.abs(), y.abs()) - 0.7).abs() < 0.2,
    "triangle": lambda x, y: (y < 0.8) & (x.abs() < 0.6 * (y + 0.9)),
    "diamond": lambda x, y: x.abs() + y.abs() < 1,
    "plus": lambda x, y: _plus(x, y, torch.maximum(x.abs(), y.abs())),
    "cross": lambda x, y: _plus((x + y) * 0.7, (x - y) * 0.7, torch.maximum(x.abs(), y.abs())),
    "horizontal bars": lambda x, y: _bars(y, torch.maximum(x.abs(), y.abs())),
    "vertical bars": lambda x, y: _bars(x, torch.maximum(x.abs(), y.abs())),
}
"""Inside or outside of each class, for coordinates in which the shape fills the square to +-1."""


def draw_shapes(count: int, *, seed: int, size: int = SHAPES_SIZE) -> Images:
    """RGB images of one light shape each on dark ground: anywhere, slightly turned, with noise.

    As many of each class as `count` allows, in random order; the same for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = (torch.arange(count) % len(SHAPE_MASKS))[torch.randperm(count, generator=generator)]
    radius = uniform(0.6, 0.85, 1, 1)
    centre_x, centre_y = (uniform(-1, 1, 1, 1) * (1 - radius) for _ in range(2))
    angle = uniform(-0.2, 0.2, 1, 1)
    axis = (2 * torch.arange(size) + 1) / size - 1
    x, y = (axis[None, None, :] - centre_x) / radius, (axis[None, :, None] - centre_y) / radius
    x, y = (
        x * torch.cos(angle) + y * torch.sin(angle),
        y * torch.cos(angle) - x * torch.sin(angle),
    )
    inside = torch.empty(count, size, size, dtype=torch.bool)
    for label, mask in enumerate(SHAPE_MASKS.values()):
        rows = labels == label
        inside[rows] = mask(x[rows], y[rows])
    background, foreground = uniform(0, 0.4, 3, 1, 1), uniform(0.6, 1, 3, 1, 1)
    pixels = torch.where(inside[:, None], foreground, background)
    pixels += 0.08 * torch.randn(pixels.shape, generator=generator)
    return Images(pixels=(pixels * 255).round().clamp(0, 255).to(torch.uint8), labels=labels)


class ShapesSource(_ArraySource):
    def __init__(self, *, size: int) -> None:
        train, validation = SHAPES_COUNTS
        super().__init__(
            SHAPES,
            tuple(SHAPE_MASKS),
            {
                "train": lambda: draw_shapes(train, seed=0, size=size),
                "validation": lambda: draw_shapes(validation, seed=1, size=size),
            },
        )
