"""scripts/train_classifier.py on tiny models: what it trains, writes, repeats and refuses."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from tests.scripts.conftest import (
    QUIET,
    RESULT_FILES,
    Train,
    assert_refused,
    load_script,
    losses_in,
    names_in,
    same_weights,
    weights_in,
)
from trainer_ext.config_file import read_yaml_mapping

TINY_VIT = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
TINY_RESNET = "hidden_sizes=[8,8],depths=[1,1],embedding_size=8"
TINY = {
    **QUIET,
    "preset": "mlp",
    "config_overrides": "hidden_sizes=[32,16]",
    "image_size": 16,
    "max_train_samples": 200,
    "max_eval_samples": 50,
    "per_device_train_batch_size": 20,
    "per_device_eval_batch_size": 30,
    "learning_rate": 3e-3,
}


@pytest.fixture(scope="session")
def train_classifier() -> ModuleType:
    """scripts/train_classifier.py"""
    return load_script("train_classifier")


@pytest.fixture
def train(train_classifier: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs the script in this process with tiny defaults."""
    monkeypatch.setattr("trainer_ext.data.image_sources.SHAPES_COUNTS", (400, 100))

    def run(**options: Any) -> dict[str, float]:
        merged = {**TINY, "output_dir": tmp_path / "out", **options}
        return train_classifier.main([f"--{k}={v}" for k, v in merged.items() if v is not None])

    return run


def test_run_learns_and_writes_everything(train: Train, tmp_path: Path) -> None:
    metrics = train(max_steps=60, save_strategy="steps", save_steps=60)
    losses = losses_in(tmp_path / "out")
    assert losses[0] == pytest.approx(math.log(10), rel=0.1)
    assert losses[-1] < losses[0] - 0.5
    assert metrics["eval_accuracy"] > 0.3
    assert names_in(tmp_path / "out") >= RESULT_FILES
    saved = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert saved["eval_accuracy"] == metrics["eval_accuracy"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "This model was trained from scratch on the shapes dataset" in card


def test_loss_and_accuracy_are_those_of_the_saved_model(
    train: Train, train_classifier: ModuleType, tmp_path: Path
) -> None:
    # 50 images in batches of 30: the last batch is smaller and must weigh less.
    metrics = train(max_steps=5)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    options = ("image_size", "max_train_samples", "max_eval_samples")
    data = train_classifier.DataArguments(**{name: TINY[name] for name in options}).load()
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (model.config.image_mean, model.config.image_std)
    )
    pixels = (data.validation.pixels / 255 - mean) / std
    with torch.no_grad():
        logits = model(pixels).logits
    labels = data.validation.labels
    assert metrics["eval_accuracy"] == pytest.approx(
        float((logits.argmax(1) == labels).float().mean())
    )
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-4)
    assert model.config.id2label[0] == "disk"


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("vit-tiny", TINY_VIT),
        ("resnet-tiny", TINY_RESNET),
        ("wide-cnn", "conv_channels=[4,4],hidden_sizes=[8]"),
    ],
)
@pytest.mark.parametrize("optim", ["shared_basis_adagrad", "muon"])
def test_presets_train_with_our_optimizers_and_leave_their_state(
    train: Train, tmp_path: Path, preset: str, overrides: str, optim: str
) -> None:
    train(
        preset=preset,
        config_overrides=overrides,
        optim=optim,
        max_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    assert all(map(math.isfinite, losses_in(tmp_path / "out")))
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert (checkpoint / "optimizer.safetensors").is_file()
    assert not (checkpoint / "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("preset", "overrides"), [("mlp", TINY["config_overrides"]), ("vit-tiny", TINY_VIT)]
)
def test_accumulated_batches_train_as_one_large_batch(
    train: Train, tmp_path: Path, preset: str, overrides: str
) -> None:
    common = {"preset": preset, "config_overrides": overrides, "max_steps": 3, "optim": "sgd"}
    train(**common, output_dir=tmp_path / "whole")
    train(
        **common,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=4,
        output_dir=tmp_path / "parts",
    )
    whole, parts = weights_in(tmp_path / "whole"), weights_in(tmp_path / "parts")
    assert losses_in(tmp_path / "parts") == pytest.approx(losses_in(tmp_path / "whole"), rel=1e-4)
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-5)


def test_resnet_loss_is_averaged_over_accumulated_batches(train: Train, tmp_path: Path) -> None:
    # transformers: ResNet's forward takes num_items_in_batch and ignores it, the Trainer then sums.
    train(
        preset="resnet-tiny",
        config_overrides=TINY_RESNET,
        max_steps=1,
        gradient_accumulation_steps=4,
    )
    assert losses_in(tmp_path / "out")[0] < 2 * math.log(10)


def test_same_seed_repeats_bit_for_bit_and_another_does_not(train: Train, tmp_path: Path) -> None:
    augmented = {"random_crop_padding": 2, "random_flip": "true"}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(max_steps=3, seed=seed, output_dir=tmp_path / name, **augmented)
    first, again, other = (weights_in(tmp_path / name) for name in "abc")
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_augmentation_is_off_by_default_and_changes_the_run(train: Train, tmp_path: Path) -> None:
    for name, options in (("a", {}), ("b", {"random_flip": "true"})):
        train(max_steps=2, output_dir=tmp_path / name, **options)
    assert losses_in(tmp_path / "a")[0] != losses_in(tmp_path / "b")[0]


@pytest.mark.parametrize("at", [10, 13], ids=["between epochs", "within the second epoch"])
def test_resumed_run_with_augmentation_equals_uninterrupted_run(
    train: Train, tmp_path: Path, at: int
) -> None:
    common = {"random_crop_padding": 2, "random_flip": "true", "max_steps": 16}
    train(**common, save_strategy="steps", save_steps=at, output_dir=tmp_path / "whole")
    train(
        **common,
        output_dir=tmp_path / "resumed",
        resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{at}",
    )
    assert same_weights(weights_in(tmp_path / "whole"), weights_in(tmp_path / "resumed"))


def test_epochs_are_augmented_differently(train: Train, tmp_path: Path) -> None:
    # A learning rate of zero: what differs between the epochs is the images.
    common = {"max_steps": 2, "per_device_train_batch_size": 200, "learning_rate": 0}
    train(**common, output_dir=tmp_path / "plain")
    train(**common, random_crop_padding=4, output_dir=tmp_path / "augmented")
    first, second = losses_in(tmp_path / "plain")
    assert first == pytest.approx(second, rel=1e-5)
    first, second = losses_in(tmp_path / "augmented")
    assert first != pytest.approx(second, rel=1e-5)


def test_training_continues_from_saved_weights_and_their_normalisation(
    train: Train, tmp_path: Path
) -> None:
    first = train(max_steps=12)
    again = train(
        preset=None,
        model_name_or_path=tmp_path / "out",
        config_overrides=None,
        max_train_samples=20,
        output_dir=tmp_path / "next",
        do_train="false",
    )
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    assert again["eval_accuracy"] == first["eval_accuracy"]


def test_batch_eval_metrics_give_the_same(train: Train) -> None:
    whole = train(max_steps=2)
    batched = train(max_steps=2, batch_eval_metrics="true")
    assert batched["eval_accuracy"] == whole["eval_accuracy"]


def test_mnist_files_make_a_net_for_grey_images(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    for prefix, count in (("train", 40), ("t10k", 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        images[np.arange(count), labels * 2] = 255
        for kind, magic, array in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
            sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = gzip.compress(magic.to_bytes(4, "big") + sizes + array.tobytes())
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(content)
    metrics = train(data_dir=folder, image_size=None, max_steps=40)
    assert metrics["eval_accuracy"] == 1.0
    assert weights_in(tmp_path / "out")["layers.0.weight"].shape == (32, 784)
    assert "on the digits dataset" in (tmp_path / "out" / "README.md").read_text()


def test_config_name_by_model_type(train: Train, tmp_path: Path) -> None:
    overrides = f"{TINY_VIT},patch_size=8"
    train(preset=None, config_name="vit", config_overrides=overrides, max_steps=1)
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert (config.model_type, config.image_size, config.num_labels) == ("vit", 16, 10)


def test_no_model_is_saved_where_only_curves_are_wanted(train: Train, tmp_path: Path) -> None:
    train(max_steps=1, save_final_model="false")
    assert not list((tmp_path / "out").glob("**/*.safetensors"))
    assert (tmp_path / "out" / "trainer_state.json").is_file()


def test_committed_config_and_command_line(
    train: Train,
    train_classifier: ModuleType,
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = repository / "configs" / "vision" / "shampoo.yaml"
    options = {**TINY, "config_overrides": TINY_VIT, "output_dir": tmp_path / "out"}
    options |= {"preset": "vit-tiny", "max_steps": 2, "eval_strategy": "no"}
    train_classifier.main([str(config), *(f"--{k}={v}" for k, v in options.items())])
    assert len(losses_in(tmp_path / "out")) == 2
    assert read_yaml_mapping(config)["max_steps"] > 2
    assert "accuracy 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "vit"}, "preset='vit' must be one of resnet-tiny, vit-tiny, mlp, wide-cnn"),
        ({"config_name": "vit"}, "preset='mlp' and config_name='vit' exclude each other"),
        (
            {"preset": None, "model_name_or_path": "x"},
            "config_overrides='hidden_sizes=[32,16]' would not fit the weights",
        ),
        ({"config_overrides": "layers=2"}, "'layers=2' is not key=value"),
        ({"config_overrides": "hidden_sizes=3"}, "hidden_sizes='3' must be of type list"),
        (
            {"preset": "vit-tiny", "config_overrides": "patch_size=5"},
            "patch_size=5 does not divide the image's 16 pixels",
        ),
        ({"data_dir": "nowhere"}, "data_dir='nowhere' is not a folder"),
        ({"dataset_name": "shapez"}, "dataset_name='shapez' is neither 'shapes' nor a data set"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"random_crop_padding": -1}, "random_crop_padding=-1 must be at least 0"),
        ({"max_train_samples": 0}, "max_train_samples=0 must be at least 1"),
        ({"validation_split_percentage": 0}, "validation_split_percentage=0 must be in 1..99"),
        ({"do_train": "false", "do_eval": "false"}, "leave nothing to do"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint='nowhere' is not a folder"),
        ({"resume_from_checkpoint": "true"}, "has no checkpoint"),
        ({"optim": "shampu"}, "argument --optim: invalid choice: 'shampu'"),
        ({"random_flp": "true"}, "unknown option '--random_flp'; did you mean random_flip"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_end_with_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    assert_refused(lambda: train(**options), capsys, message)


def test_images_that_do_not_fit_the_pretrained_model_are_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_steps=1)
    with pytest.raises(SystemExit):
        train(
            preset=None,
            config_overrides=None,
            model_name_or_path=tmp_path / "out",
            image_size=20,
            output_dir=tmp_path / "next",
        )
    assert "has image_size=16, the images of 'shapes' have 20" in capsys.readouterr().err
