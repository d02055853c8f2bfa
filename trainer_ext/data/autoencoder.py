"""The deep autoencoder of optimizer papers: fully connected, tanh, sigmoid cross-entropy of pixels.

Hinton and Salakhutdinov (2006); in the sizes of Yen et al. (2023, section 3.1 and 6.11.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from trainer_ext.data.image_sources import Images

AUTOENCODER_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {"hidden_sizes": [1000, 500, 250, 30]},
        "tiny": {"hidden_sizes": [128, 64, 16]},
    }
)


class AutoencoderConfig(PretrainedConfig):
    """Sizes of an :class:`AutoencoderModel`.

    Args:
        image_size: rows and columns of an image.
        hidden_sizes: widths from the images to the code; the decoder has them in reverse.
    """

    model_type = "deep_autoencoder"

    def __init__(
        self,
        num_channels: int = 1,
        image_size: int = 28,
        hidden_sizes: Sequence[int] = (1000, 500, 250, 30),
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.image_size = image_size
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(**kwargs)

    @property
    def widths(self) -> list[int]:
        """Of all layers, the images at both ends."""
        pixels = self.num_channels * self.image_size**2
        return [pixels, *self.hidden_sizes, *self.hidden_sizes[-2::-1], pixels]


@dataclass
class AutoencoderOutput(ModelOutput):
    """What an autoencoder makes of images.

    Attributes:
        loss: sigmoid cross-entropy, summed over the pixels of an image, mean over images.
        logits: of the pixels, [N, C, H, W].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class AutoencoderModel(PreTrainedModel):
    """Fully connected layers with bias and tanh, the last one without tanh.

    Raises:
        ValueError: a layer without a neuron, or no hidden layer.
    """

    config_class = AutoencoderConfig
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        if min(config.hidden_sizes, default=0) < 1:
            raise ValueError(f"hidden_sizes={config.hidden_sizes} must be of at least 1")
        self.layers = nn.ModuleList(
            nn.Linear(size_in, size_out) for size_in, size_out in pairwise(config.widths)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, return_loss: bool = True, return_dict: bool | None = None
    ) -> AutoencoderOutput | tuple[Tensor, ...]:
        """Logits of images [N, C, H, W] of pixels in 0..1, and the loss of these images.

        Args:
            return_dict: False returns a tuple without what is None.
        """
        hidden = pixel_values.flatten(1)
        *inner, last = self.layers
        for layer in inner:
            hidden = torch.tanh(layer(hidden))
        logits = last(hidden).unflatten(1, pixel_values.shape[1:])
        loss = None
        if return_loss:
            total = F.binary_cross_entropy_with_logits(logits, pixel_values, reduction="sum")
            loss = total / len(pixel_values)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return AutoencoderOutput(loss=loss, logits=logits)


class PixelDataset(Dataset):
    """Images as pixels in 0..1, a whole batch at once."""

    def __init__(self, images: Images) -> None:
        self.pixels = images.pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index].float() / 255}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch, which :func:`as_it_is` hands on."""
        return {"pixel_values": self.pixels[torch.as_tensor(indices)].float() / 255}


def as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collator of what is a batch already."""
    return batch


def autoencoder_preset_config(name: str) -> AutoencoderConfig:
    """The configuration of a named preset, for grey images of 28 pixels.

    Raises:
        ValueError: for a name that is not in `AUTOENCODER_PRESETS`.
    """
    if name not in AUTOENCODER_PRESETS:
        raise ValueError(f"preset={name!r} must be one of {', '.join(AUTOENCODER_PRESETS)}")
    return AutoencoderConfig(**AUTOENCODER_PRESETS[name])


# `from_pretrained` of the Auto classes finds what the Trainer saved, once this module is imported.
AutoConfig.register(AutoencoderConfig.model_type, AutoencoderConfig, exist_ok=True)
AutoModel.register(AutoencoderConfig, AutoencoderModel, exist_ok=True)
