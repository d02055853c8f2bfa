"""A tiny language model, its data and short runs of the Trainer, for the tests of the glue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

NAME = "shared_basis_adagrad"
VOCABULARY = 32


def tiny_gpt2(dtype: torch.dtype = torch.float32, **config: Any) -> GPT2LMHeadModel:
    """Two layers, the same weights at every call."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": VOCABULARY, "n_positions": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **tokens, **config})).to(dtype)


def token_blocks(count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Blocks of random tokens."""
    tokens = torch.randint(VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, kind: type = TrainingArguments, **changes: Any) -> Any:
    """Training arguments of six steps that save at step 3."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "optim": NAME,
        "optim_args": "rank=4,update_interval=2,root_interval=2,start_step=2",
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 2,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return kind(**{**values, **changes})


def trainer(
    folder: Path, model: nn.Module | None = None, kind: type[Trainer] = Trainer, **changes: Any
) -> Trainer:
    """A Trainer for the tiny model; ``changes`` go to the training arguments."""
    return kind(model or tiny_gpt2(), arguments(folder, **changes), train_dataset=token_blocks())


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """True if all tensors of two models are equal bit for bit."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)
