"""Vision presets build the models their names promise, and models that are saved load again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer_ext.data.presets import override_config
from trainer_ext.data.vision_presets import (
    VISION_PRESETS,
    fit_to_images,
    name_labels,
    vision_preset_config,
)

THOUSANDS = {"resnet-tiny": 320, "vit-tiny": 546, "mlp": 1707, "wide-cnn": 1108}
CLASSES = [f"class {n}" for n in range(10)]


def _model(name: str, channels: int, size: int, overrides: str = "") -> PreTrainedModel:
    config = vision_preset_config(name)
    if overrides:
        override_config(config, overrides)
    config = fit_to_images(config, num_channels=channels, image_size=size)
    name_labels(config, CLASSES)
    return AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_parameter_count(name: str) -> None:
    assert _model(name, 3, 32).num_parameters() / 1000 == pytest.approx(THOUSANDS[name], abs=1)


@pytest.mark.parametrize("name", VISION_PRESETS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_loss_is_the_mean_cross_entropy(name: str, channels: int, size: int) -> None:
    model = _model(name, channels, size)
    labels = torch.tensor([3, 0, 9])
    output = model(pixel_values=torch.randn(3, channels, size, size), labels=labels)
    assert output.logits.shape == (3, 10)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_saved_models_load_again(name: str, tmp_path: Path) -> None:
    model = _model(name, 1, 28).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_another_number_of_stages_is_saved_and_loaded(tmp_path: Path) -> None:
    model = _model("resnet-tiny", 3, 32, "hidden_sizes=[8,16],depths=[1,1],embedding_size=8")
    assert len(model.resnet.encoder.stages) == 2
    model.save_pretrained(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.depths == [1, 1]


def test_mlp_and_wide_cnn_have_the_layers_they_promise() -> None:
    mlp = _model("mlp", 1, 28)
    linear = [m for m in mlp.modules() if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(512, 784), (256, 512), (10, 256)]
    assert all(m.bias is not None for m in linear)
    assert not any(isinstance(m, (torch.nn.Conv2d, Conv1D)) for m in mlp.modules())
    cnn = _model("wide-cnn", 3, 32)
    assert [m.out_channels for m in cnn.modules() if isinstance(m, torch.nn.Conv2d)] == [32, 64, 64]
    assert tuple(cnn.layers[0].weight.shape) == (256, 4096)


@pytest.mark.parametrize("name", ["mlp", "wide-cnn"])
def test_plain_nets_start_near_the_loss_of_guessing(name: str) -> None:
    model = _model(name, 3, 32)
    labels = torch.arange(10).repeat(5)
    loss = model(torch.randn(50, 3, 32, 32), labels=labels).loss
    assert loss.item() == pytest.approx(2.3026, abs=0.3)


def test_plain_nets_give_tuples_where_wanted() -> None:
    model = _model("mlp", 1, 28)
    images, labels = torch.randn(2, 1, 28, 28), torch.tensor([0, 1])
    (logits,) = model(images, return_dict=False)
    loss, again = model(images, labels, return_dict=False)
    assert torch.equal(logits, again)
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit-tiny", "patch_size=5", "patch_size=5 does not divide the image's 32 pixels"),
        ("resnet-tiny", "depths=[1]", r"hidden_sizes=\[32, 64, 96\] and depths=\[1\] must be"),
        ("wide-cnn", "num_pools=4", "num_pools=4 must be at most the 3 convolutions"),
        (
            "wide-cnn",
            "conv_channels=[1,1,1,1,1,1],num_pools=6",
            "leave a pixel of image_size=32",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model(name, 3, 32, overrides)


def test_presets_share_no_state() -> None:
    vision_preset_config("resnet-tiny").hidden_sizes.append(5)
    vision_preset_config("mlp").hidden_sizes.append(5)
    assert vision_preset_config("resnet-tiny").hidden_sizes == [32, 64, 96]
    assert vision_preset_config("mlp").hidden_sizes == [512, 256]


def test_unknown_preset_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="preset='vit' must be one of resnet-tiny, vit-tiny"):
        vision_preset_config("vit")
