"""Which model and optimizer a command is about."""

from __future__ import annotations

from typing import Annotated

import torch
import transformers
import typer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

ModelOption = Annotated[
    str, typer.Option(help="Folder or Hub name of a model or of its config.", show_default=False)
]
OptimOption = Annotated[str, typer.Option(help="Name of the optimizer.", show_default=False)]
OptimArgsOption = Annotated[
    str | None, typer.Option("--optim_args", help="Its options, as rank=32,update_interval=10.")
]


def meta_model(name: str) -> nn.Module:
    """Returns the model of a config, without memory for its weights.

    Raises:
        OSError: the model's config cannot be found.
    """
    config = AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, None)
    with torch.device("meta"):
        return (
            AutoModelForCausalLM.from_config(config) if model_class is None else model_class(config)
        )
