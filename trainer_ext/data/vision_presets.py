"""Named small image classifiers for 28 and 32 pixels, which train on two CPU cores.

`vit-tiny` has the proportions of ViT-Lite (Hassani et al. 2021): patches of 4 pixels and an MLP
only twice as wide as the model. `wide-cnn` ends as VGG does, with a fully connected layer that has
far more inputs than outputs: 4096 to 256 at 32 pixels, 3136 to 256 at 28.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from trainer_ext.data.vision_models import PlainNetConfig

VISION_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "resnet-tiny": {
            "model_type": "resnet",
            "layer_type": "basic",
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 96],
            "depths": [2, 2, 1],
        },
        "vit-tiny": {
            "model_type": "vit",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "patch_size": 4,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "mlp": {"model_type": PlainNetConfig.model_type, "hidden_sizes": [512, 256]},
        "wide-cnn": {
            "model_type": PlainNetConfig.model_type,
            "conv_channels": [32, 64, 64],
            "num_pools": 2,
            "hidden_sizes": [256],
        },
    }
)

DERIVED_FIELDS = ("stage_names", "out_features", "out_indices")
"""What backbones derive from the number of stages when they are made."""


def vision_preset_config(name: str) -> PretrainedConfig:
    """The configuration of a named preset, for RGB images of 32 pixels.

    Raises:
        ValueError: for a name that is not in `VISION_PRESETS`.
    """
    if name not in VISION_PRESETS:
        raise ValueError(f"preset={name!r} must be one of {', '.join(VISION_PRESETS)}")
    fields = dict(VISION_PRESETS[name])
    config_class = CONFIG_MAPPING[fields.pop("model_type")]
    return fit_to_images(config_class(**fields), num_channels=3, image_size=32)


def fit_to_images(
    config: PretrainedConfig, *, num_channels: int, image_size: int
) -> PretrainedConfig:
    """A copy of the configuration of a new model, for images of this size.

    Raises:
        ValueError: patches that do not tile the image; sizes and depths of different lengths.
    """
    fields = {key: value for key, value in config.to_dict().items() if key not in DERIVED_FIELDS}
    fields["num_channels"] = num_channels
    if "image_size" in fields:
        fields["image_size"] = image_size
    patch_size = fields.get("patch_size")
    if isinstance(patch_size, int) and (patch_size < 1 or image_size % patch_size):
        raise ValueError(f"patch_size={patch_size} does not divide the image's {image_size} pixels")
    sizes, depths = fields.get("hidden_sizes"), fields.get("depths")
    if sizes is not None and depths is not None and len(sizes) != len(depths):
        raise ValueError(f"hidden_sizes={sizes} and depths={depths} must be equally long")
    return type(config).from_dict(fields)


def name_labels(config: PretrainedConfig, names: Sequence[str]) -> None:
    """Gives the model as many outputs as there are classes, and their names."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
