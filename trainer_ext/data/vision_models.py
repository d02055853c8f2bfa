"""A plain image classifier: convolutions, then fully connected layers, then one output a class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

OUTPUT_STD = 0.02
"""Standard deviation of the new weights of the output layer."""


class PlainNetConfig(PretrainedConfig):
    """Sizes of a `PlainNetForImageClassification`.

    Args:
        image_size: rows and columns of an image.
        conv_channels: output channels of the 3x3 convolutions; none makes a multilayer perceptron.
        num_pools: so many of the first convolutions are followed by 2x2 max pooling.
        hidden_sizes: widths of the fully connected layers between convolutions and output.
    """

    model_type = "plain_net"

    def __init__(
        self,
        num_channels: int = 3,
        image_size: int = 32,
        conv_channels: Sequence[int] = (),
        num_pools: int = 0,
        hidden_sizes: Sequence[int] = (512, 256),
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.image_size = image_size
        self.conv_channels = list(conv_channels)
        self.num_pools = num_pools
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(**kwargs)


class PlainNetForImageClassification(PreTrainedModel):
    """3x3 convolutions and fully connected layers, all with bias and ReLU, and a linear output.

    Raises:
        ValueError: more poolings than convolutions, or than the image can be halved.
    """

    config_class = PlainNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PlainNetConfig) -> None:
        super().__init__(config)
        side = config.image_size >> config.num_pools
        if config.num_pools > len(config.conv_channels) or side < 1:
            raise ValueError(
                f"num_pools={config.num_pools} must be at most the "
                f"{len(config.conv_channels)} convolutions and leave a pixel of "
                f"image_size={config.image_size}"
            )
        channels = [config.num_channels, *config.conv_channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(size_in, size_out, kernel_size=3, padding=1)
            for size_in, size_out in pairwise(channels)
        )
        widths = [channels[-1] * side * side, *config.hidden_sizes]
        self.layers = nn.ModuleList(
            nn.Linear(size_in, size_out) for size_in, size_out in pairwise(widths)
        )
        self.classifier = nn.Linear(widths[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            return
        if module is self.classifier:
            # Small, so that training starts near the loss of guessing.
            init.normal_(module.weight, std=OUTPUT_STD)
        else:
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        """Logits [N, K] of images [N, C, H, W], and the mean cross-entropy where labels are given.

        Args:
            return_dict: False returns a tuple without what is None.
        """
        hidden = pixel_values
        for index, convolution in enumerate(self.convolutions):
            hidden = F.relu(convolution(hidden))
            if index < self.config.num_pools:
                hidden = F.max_pool2d(hidden, kernel_size=2)
        hidden = hidden.flatten(1)
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        logits = self.classifier(hidden)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


# `from_pretrained` of the Auto classes finds what the Trainer saved, once this module is imported.
AutoConfig.register(PlainNetConfig.model_type, PlainNetConfig, exist_ok=True)
AutoModelForImageClassification.register(
    PlainNetConfig, PlainNetForImageClassification, exist_ok=True
)
