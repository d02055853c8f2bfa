"""Which model and optimizer a command is about."""

from __future__ import annotations

from typing import Annotated

import torch
import transformers
import typer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from trainer_ext.data.presets import PRESETS, preset_config

ModelOption = Annotated[
    str,
    typer.Option(
        help=f"Folder or Hub name of a model or of its config, or one of {', '.join(PRESETS)}.",
        show_default=False,
    ),
]
OptimOption = Annotated[str, typer.Option(help="Name of the optimizer.", show_default=False)]
OptimArgsOption = Annotated[
    str | None, typer.Option("--optim_args", help="Its options, as rank=32,update_interval=10.")
]


def meta_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a model without memory for its weights.

    Raises:
        OSError: the model's config cannot be found.
    """
    with torch.device("meta"):
        return model_of(load_config(name)).to(dtype)


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a preset, of a folder or of a name on the Hub.

    Raises:
        OSError: it cannot be found.
    """
    return preset_config(name) if name in PRESETS else AutoConfig.from_pretrained(name)


def model_of(config: PretrainedConfig) -> nn.Module:
    """A new model of the class that a configuration names, or a causal language model."""
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    return AutoModelForCausalLM.from_config(config) if model_class is None else model_class(config)
