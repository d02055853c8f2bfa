"""scripts/train_autoencoder.py on tiny models: its loss, what it trains, writes and refuses."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

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
from trainer_ext.data.autoencoder import (
    AutoencoderConfig,
    AutoencoderModel,
    PixelDataset,
    as_it_is,
    autoencoder_preset_config,
)
from trainer_ext.data.image_sources import Images

TINY = {
    **QUIET,
    "config_overrides": "hidden_sizes=[32,8]",
    "image_size": 12,
    "max_train_samples": 200,
    "max_eval_samples": 50,
    "per_device_train_batch_size": 50,
    "per_device_eval_batch_size": 30,
    "learning_rate": 3e-3,
}


@pytest.fixture(scope="session")
def train_autoencoder() -> ModuleType:
    """scripts/train_autoencoder.py"""
    return load_script("train_autoencoder")


@pytest.fixture
def train(train_autoencoder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs the script in this process with tiny defaults."""
    monkeypatch.setattr("trainer_ext.data.image_sources.SHAPES_COUNTS", (400, 100))

    def run(**options: Any) -> dict[str, float]:
        merged = {**TINY, "output_dir": tmp_path / "out", **options}
        return train_autoencoder.main([f"--{k}={v}" for k, v in merged.items() if v is not None])

    return run


def test_the_paper_s_model_has_its_number_of_weights() -> None:
    with torch.device("meta"):
        model = AutoencoderModel(autoencoder_preset_config("paper"))
    assert sum(param.numel() for param in model.parameters()) == 2_837_314
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert model.config.widths == widths


def test_loss_is_the_cross_entropy_summed_over_pixels() -> None:
    model = AutoencoderModel(AutoencoderConfig(image_size=4, hidden_sizes=[6, 3])).double()
    pixels = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    hidden = pixels.flatten(1).numpy()
    for index, layer in enumerate(model.layers):
        hidden = hidden @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if index < len(model.layers) - 1:
            hidden = np.tanh(hidden)
    shares, x = 1 / (1 + np.exp(-hidden)), pixels.flatten(1).numpy()
    expected = -(x * np.log(shares) + (1 - x) * np.log(1 - shares)).sum(1).mean()
    output = model(pixels)
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    assert output.logits.shape == pixels.shape
    assert model(pixels, return_loss=False).loss is None
    as_tuple = model(pixels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss)


def test_a_batch_is_the_images_of_its_rows() -> None:
    pixels = torch.randint(256, (6, 1, 3, 3), dtype=torch.uint8)
    data = PixelDataset(Images(pixels=pixels, labels=torch.zeros(6, dtype=torch.long)))
    batch = as_it_is(data.__getitems__([4, 1]))["pixel_values"]
    assert torch.equal(batch, torch.stack([data[4]["pixel_values"], data[1]["pixel_values"]]))
    assert torch.equal((255 * batch).round().byte(), pixels[[4, 1]])


def test_run_learns_and_writes_everything(train: Train, tmp_path: Path) -> None:
    metrics = train(max_steps=40, save_strategy="steps", save_steps=40)
    losses = losses_in(tmp_path / "out")
    # Three channels; at first every pixel costs about log 2.
    assert losses[0] == pytest.approx(3 * 12**2 * math.log(2), rel=0.1)
    assert losses[-1] < 0.97 * losses[0]
    assert names_in(tmp_path / "out") >= RESULT_FILES
    assert metrics["train_optimizer_ms"] > 0


def test_losses_are_those_of_the_saved_model(
    train: Train, train_autoencoder: ModuleType, tmp_path: Path
) -> None:
    # 50 images in batches of 30: the last batch is smaller and must weigh less.
    metrics = train(max_steps=3)
    model = AutoModel.from_pretrained(tmp_path / "out")
    options = ("image_size", "max_train_samples", "max_eval_samples")
    data = train_autoencoder.DataArguments(**{name: TINY[name] for name in options}).load()
    for images, metric in ((data.validation, "eval_loss"), (data.train, "train_set_loss")):
        with torch.no_grad():
            loss = model(images.pixels / 255).loss.item()
        assert metrics[metric] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("optim", ["shared_basis_adam", "kfac", "two_sided_basis"])
def test_our_optimizers_train_and_resume(train: Train, tmp_path: Path, optim: str) -> None:
    saving = {"optim": optim, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(**saving)
    whole = weights_in(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert "optimizer.safetensors" in names_in(checkpoint)
    train(**saving, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint)
    assert same_weights(whole, weights_in(tmp_path / "resumed"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "nowhere"}, "data_dir='nowhere' is not a folder"),
        ({"preset": "huge"}, "preset='huge' must be one of paper, tiny"),
        ({"config_overrides": "hidden_sizes=[8,0]"}, "hidden_sizes=[8, 0] must be of at least 1"),
        ({"do_train": "false", "do_eval": "false"}, "leave nothing to do"),
        ({"optim": "kfac", "optim_args": "max_dim=0"}, "max_dim = 0 is not allowed"),
    ],
)
def test_mistakes_take_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    assert_refused(lambda: train(**options), capsys, message)


def test_images_of_another_size_are_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_steps=1)
    other = {"model_name_or_path": tmp_path / "out", "config_overrides": None, "image_size": 16}
    assert_refused(lambda: train(**other), capsys, "has image_size=12, the images of 'shapes'")
