"""Images: what is read and drawn, how it is split, normalised and augmented, what is refused."""

from __future__ import annotations

import gzip
import io
import lzma
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from trainer_ext.data.image_sources import (
    CIFAR_CLASSES,
    CIFAR_RECORD,
    IDX_IMAGES,
    IDX_LABELS,
    SHAPE_MASKS,
    Images,
    draw_shapes,
    read_idx,
)
from trainer_ext.data.images import (
    Augmentation,
    AugmentationEpochs,
    ImageDataset,
    channel_statistics,
    draw_rows,
    hold_out,
    load_images,
    scale,
)


def _idx(array: np.ndarray) -> bytes:
    header = (0x800 + array.ndim).to_bytes(4, "big")
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def _bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder in MNIST's layout: 30 training and 10 evaluation images of 28 pixels."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for prefix, count in (("train", 30), ("t10k", 10)):
        images = _bytes(count, 28, 28, seed=count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(labels)))
    return folder


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A folder in CIFAR-10's binary layout: two training files and a packed evaluation file."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    for number, name in enumerate(("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin.xz")):
        records = _bytes(10, CIFAR_RECORD, seed=number)
        records[:, 0] = np.arange(10)
        content = records.tobytes()
        (folder / name).write_bytes(lzma.compress(content) if name.endswith("xz") else content)
    return folder


def _image_rows(count: int, *, size: int = 8, grey: bool = False) -> list[Image.Image]:
    shape = (size, size) if grey else (size, size, 3)
    return [Image.fromarray(_bytes(*shape, seed=n)) for n in range(count)]


def _save_dataset(folder: Path, split: str, columns: dict, features: datasets.Features) -> str:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` prepares stays in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


CLASSES = datasets.ClassLabel(names=["cat", "dog"])


# --- local files ----------------------------------------------------------------------------------


def test_mnist_files_give_their_bytes_and_labels(mnist: Path) -> None:
    data = load_images(data_dir=str(mnist))
    assert (data.name, data.num_channels, data.image_size) == ("mnist", 1, 28)
    assert data.label_names == tuple("0123456789")
    assert np.array_equal(data.train.pixels[:, 0], _bytes(30, 28, 28, seed=30))
    assert np.array_equal(data.validation.pixels[:, 0], _bytes(10, 28, 28, seed=10))
    assert data.train.labels.tolist() == [n % 10 for n in range(30)]


def test_unpacked_mnist_in_the_other_spelling(mnist: Path) -> None:
    expected = load_images(data_dir=str(mnist))
    for path in list(mnist.iterdir()):
        name = path.name.removesuffix(".gz").replace("-idx", ".idx")
        (mnist / name).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert torch.equal(load_images(data_dir=str(mnist)).train.pixels, expected.train.pixels)


def test_cifar_records_are_a_label_and_planes_of_red_green_and_blue(cifar: Path) -> None:
    data = load_images(data_dir=str(cifar))
    assert (data.num_channels, data.image_size, data.label_names) == (3, 32, CIFAR_CLASSES)
    assert (len(data.train), len(data.validation)) == (20, 10)
    record = np.frombuffer((cifar / "data_batch_2.bin").read_bytes(), np.uint8)[:CIFAR_RECORD]
    image = data.train.pixels[10]
    # Green of row 3, column 5.
    assert int(image[1, 3, 5]) == record[1 + 1024 + 3 * 32 + 5]
    assert data.validation.labels.tolist() == list(range(10))


def test_held_out_images_leave_the_evaluation_files_alone(cifar: Path) -> None:
    (cifar / "test_batch.bin.xz").write_bytes(b"never read")
    data = load_images(data_dir=str(cifar), validation_split_percentage=25)
    assert (len(data.train), len(data.validation)) == (15, 5)
    everything = torch.cat([data.train.pixels, data.validation.pixels]).flatten(1)
    assert len(everything.unique(dim=0)) == 20


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda _: b"no gzip", "expected .gz packed data"),
        ("train-images-idx3-ubyte.gz", lambda c: c[:200], "expected .gz packed data"),
        ("train-labels-idx1-ubyte.gz", lambda _: gzip.compress(b""), "expected the idx header 0x0"),
        (
            "train-images-idx3-ubyte.gz",
            lambda c: gzip.compress(gzip.decompress(c)[:-1]),
            "expected 23536 bytes for 30 entries, found 23535",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            lambda _: gzip.compress(_idx(np.zeros(29, np.uint8))),
            "holds 30 images, its label file 'train-labels-idx1-ubyte.gz' 29 labels",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            lambda _: gzip.compress(_idx(np.full(10, 11, np.uint8))),
            "expected labels 0 to 9, found 11",
        ),
        ("train-labels-idx1-ubyte.gz", None, "train-labels-idx1-ubyte.gz' does not exist"),
        ("t10k-images-idx3-ubyte.gz", None, "does not exist; or give validation_split_percentage"),
    ],
)
def test_damaged_mnist_files_are_named(mnist: Path, name: str, change, message: str) -> None:
    path = mnist / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        load_images(data_dir=str(mnist))
    assert message in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_1.bin", b"\0" * 4000, "expected 3073 bytes in records of 3073 bytes"),
        ("data_batch_1.bin", b"", "expected 3073 bytes in records of 3073 bytes, found 0"),
        ("data_batch_1.bin", b"\x0a" * CIFAR_RECORD, "expected labels 0 to 9, found 10"),
        ("test_batch.bin.xz", b"no xz", "expected .xz packed data"),
    ],
)
def test_damaged_cifar_files_are_named(
    cifar: Path, name: str, content: bytes, message: str
) -> None:
    (cifar / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_images(data_dir=str(cifar))
    assert message in str(error.value)
    assert name in str(error.value)


def test_folders_without_what_is_needed_are_refused(tmp_path: Path, cifar: Path) -> None:
    with pytest.raises(ValueError, match="data_dir='nowhere' is not a folder"):
        load_images(data_dir="nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no images: expected MNIST's train-images"):
        load_images(data_dir=str(empty))
    (cifar / "test_batch.bin.xz").unlink()
    with pytest.raises(ValueError, match="has no evaluation file: expected a"):
        load_images(data_dir=str(cifar))
    for path in cifar.glob("data_batch_*"):
        path.rename(cifar / f"test_{path.name}")
    with pytest.raises(ValueError, match="has no training file"):
        load_images(data_dir=str(cifar))


def test_an_idx_file_of_another_kind_is_refused(mnist: Path) -> None:
    path = mnist / "train-labels-idx1-ubyte.gz"
    assert len(read_idx(path, IDX_LABELS)) == 30
    with pytest.raises(ValueError, match="expected the idx header 0x00000803, found 0x00000801"):
        read_idx(path, IDX_IMAGES)


# --- data sets of the Hub's format ----------------------------------------------------------------


def test_hub_images_by_column_types(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "kind": CLASSES})
    for split, count in (("train", 6), ("test", 4)):
        columns = {"img": _image_rows(count), "kind": [n % 2 for n in range(count)]}
        folder = _save_dataset(tmp_path / "hub", split, columns, features)
    data = load_images(dataset_name=folder)
    assert (data.num_channels, data.image_size, data.label_names) == (3, 8, ("cat", "dog"))
    assert (len(data.train), len(data.validation)) == (6, 4)
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert np.array_equal(data.train.pixels[2].permute(1, 2, 0), _bytes(8, 8, 3, seed=2))


def test_hub_images_without_evaluation_split_hold_out_a_tenth(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    columns = {"image": _image_rows(20, grey=True), "label": ["x", "y"] * 10}
    folder = _save_dataset(tmp_path / "hub", "train", columns, features)
    data = load_images(dataset_name=folder)
    assert (len(data.train), len(data.validation)) == (18, 2)
    assert (data.num_channels, data.label_names) == (1, ("x", "y"))


def test_hub_images_of_different_sizes_are_scaled_if_wanted(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    columns = {"image": _image_rows(4) + _image_rows(4, size=12), "label": [0, 1] * 4}
    folder = _save_dataset(tmp_path / "hub", "train", columns, features)
    with pytest.raises(ValueError, match="8 x 8, 12 x 12 pixels are not equal squares; give image"):
        load_images(dataset_name=folder)
    assert load_images(dataset_name=folder, image_size=10).image_size == 10


def test_hub_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": CLASSES,
            "coarse": CLASSES,
            "id": datasets.Value("int64"),
        }
    )
    columns = {"image": _image_rows(4), "label": [0, 1, 0, -1], "coarse": [1] * 4, "id": [0] * 4}
    folder = _save_dataset(tmp_path / "hub", "train", columns, features)
    with pytest.raises(ValueError, match=r"2 of its columns .* fit; give label_column"):
        load_images(dataset_name=folder)
    with pytest.raises(ValueError, match=r"image_column='picture': .* has only"):
        load_images(dataset_name=folder, image_column="picture")
    with pytest.raises(ValueError, match="label '-1' is none of the 2 classes"):
        load_images(dataset_name=folder, label_column="label")
    with pytest.raises(ValueError, match="id 0 is no image"):
        load_images(dataset_name=folder, label_column="coarse", image_column="id")
    assert load_images(dataset_name=folder, label_column="coarse").train.labels.tolist() == [1] * 3


def test_a_damaged_hub_image_is_named(tmp_path: Path) -> None:
    stream = io.BytesIO()
    _image_rows(1)[0].save(stream, format="PNG")
    features = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    columns = {"image": [{"bytes": stream.getvalue(), "path": None}] * 3, "label": [0, 1, 0]}
    columns["image"][2] = {"bytes": b"broken", "path": None}
    folder = _save_dataset(tmp_path / "hub", "test", columns, features)
    columns["image"] = columns["image"][:2] * 2
    _save_dataset(tmp_path / "hub", "train", {**columns, "label": [0, 1, 0, 1]}, features)
    with pytest.raises(ValueError, match="image 2 is no image"):
        load_images(dataset_name=folder)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match="dataset_name='shapez' is neither 'shapes' nor a data set"
    ):
        load_images(dataset_name="shapez")


# --- drawn shapes ---------------------------------------------------------------------------------


def test_shapes_are_balanced_and_depend_on_the_seed_alone() -> None:
    images = draw_shapes(40, seed=3, size=16)
    assert images.pixels.shape == (40, 3, 16, 16)
    assert images.labels.bincount().tolist() == [4] * len(SHAPE_MASKS)
    torch.manual_seed(0)
    assert torch.equal(draw_shapes(40, seed=3, size=16).pixels, images.pixels)
    assert not torch.equal(draw_shapes(40, seed=4, size=16).pixels, images.pixels)


def test_no_two_shapes_are_alike() -> None:
    axis = torch.linspace(-1, 1, 33)
    masks = [mask(axis[None, :], axis[:, None]) for mask in SHAPE_MASKS.values()]
    for number, mask in enumerate(masks):
        assert 0.1 < mask.float().mean() < 0.8
        for other in masks[:number]:
            # Of the pixels of two shapes, a tenth belongs to one of them only.
            assert (mask ^ other).sum() > 0.1 * (mask | other).sum()


def test_training_and_validation_shapes_differ() -> None:
    data = load_images()
    assert (len(data.train), len(data.validation)) == (4000, 1000)
    assert not torch.equal(data.train.pixels[:1000], data.validation.pixels)


# --- subsets, sizes, options ----------------------------------------------------------------------


def test_subsets_are_the_same_in_every_run_and_mix_the_classes(cifar: Path) -> None:
    first = load_images(data_dir=str(cifar), max_train_samples=8, max_eval_samples=5)
    torch.manual_seed(99)
    again = load_images(data_dir=str(cifar), max_train_samples=8, max_eval_samples=5)
    assert (len(first.train), len(first.validation)) == (8, 5)
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert draw_rows(torch.arange(1000), 10).max() > 500
    assert torch.equal(draw_rows(torch.arange(3), 9), torch.arange(3))


def test_hold_out_is_disjoint_and_complete() -> None:
    kept, held_out = hold_out(50, 10)
    assert len(held_out) == 5
    assert torch.cat([kept, held_out]).sort().values.tolist() == list(range(50))
    with pytest.raises(ValueError, match="1 images are too few"):
        hold_out(1, 50)


def test_scaling_keeps_plain_colours() -> None:
    colours = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1).expand(2, 3, 8, 8) * 40
    images = Images(pixels=colours, labels=torch.zeros(2, dtype=torch.int64))
    assert torch.equal(scale(images, 5).pixels, colours[..., :5, :5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "shapes", "data_dir": "x"}, "exclude each other"),
        ({"image_column": "x"}, "image_column='x' has no effect with 'shapes'"),
        ({"data_dir": "x", "dataset_config_name": "en"}, "has no effect with data_dir='x'"),
        ({"validation_split_percentage": 100}, "validation_split_percentage=100 must be in 1..99"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_images(**options)
    assert message in str(error.value)


# --- normalisation and augmentation ---------------------------------------------------------------


def test_items_are_normalised_with_the_statistics_of_the_channels() -> None:
    images = draw_shapes(50, seed=0)
    mean, std = channel_statistics(images)
    literal = images.pixels.double() / 255
    assert mean == pytest.approx(literal.mean(dim=(0, 2, 3)).tolist())
    assert std == pytest.approx(literal.std(dim=(0, 2, 3), correction=0).tolist())
    dataset = ImageDataset(images, mean=mean, std=std)
    item = dataset[7]
    assert item["labels"] == int(images.labels[7])
    assert item["pixel_values"].dtype == torch.float32
    stacked = torch.stack([dataset[n]["pixel_values"] for n in range(len(dataset))])
    assert stacked.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-4)
    assert stacked.std(dim=(0, 2, 3)).tolist() == pytest.approx([1] * 3, abs=1e-3)


def test_a_constant_channel_divides_by_one() -> None:
    images = Images(
        pixels=torch.full((4, 1, 2, 2), 51, dtype=torch.uint8), labels=torch.zeros(4).long()
    )
    (mean,), (std,) = channel_statistics(images)
    assert (mean, std) == (pytest.approx(0.2), 1.0)


def test_augmented_images_are_crops_and_mirror_images() -> None:
    image = torch.arange(1.0, 17).view(1, 4, 4)
    seen = {
        tuple(Augmentation(padding=1, flip=True)(image, epoch=0, index=n).flatten().tolist())
        for n in range(300)
    }
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    crops = [padded[:, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    expected = {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(-1))}
    assert seen == expected


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    image = torch.randn(3, 32, 32)

    def drawn(seed: int, epoch: int) -> torch.Tensor:
        augmentation = Augmentation(padding=4, flip=True, seed=seed)
        return torch.stack([augmentation(image, epoch=epoch, index=n) for n in range(6)])

    reference = drawn(0, 0)
    state = torch.get_rng_state()
    assert torch.equal(drawn(0, 0), reference)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn(1, 0), reference)
    assert not torch.equal(drawn(0, 1), reference)
    assert len(reference.flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize(("epoch", "expected"), [(None, 0), (0, 0), (1.4, 1), (1.9999999, 2)])
def test_the_callback_tells_the_epoch(tmp_path: Path, epoch: float | None, expected: int) -> None:
    images = draw_shapes(2, seed=0)
    augmentation = Augmentation(padding=4, seed=1)
    dataset = ImageDataset(images, mean=[0.5] * 3, std=[1.0] * 3, augmentation=augmentation)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    AugmentationEpochs(dataset).on_epoch_begin(args, TrainerState(epoch=epoch), TrainerControl())
    plain = ImageDataset(images, mean=[0.5] * 3, std=[1.0] * 3)[1]["pixel_values"]
    wanted = augmentation(plain, epoch=expected, index=1)
    assert torch.equal(dataset[1]["pixel_values"], wanted)
    assert math.isfinite(float(wanted.sum()))


def test_workers_that_outlive_an_epoch_see_the_next_one() -> None:
    dataset = ImageDataset(
        draw_shapes(4, seed=0, size=16),
        mean=[0.5] * 3,
        std=[1.0] * 3,
        augmentation=Augmentation(padding=4),
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=1, persistent_workers=True
    )
    for epoch in range(2):
        dataset.begin_epoch(epoch)
        (batch,) = loader
        here = torch.stack([dataset[n]["pixel_values"] for n in range(4)])
        assert torch.equal(batch["pixel_values"], here)
