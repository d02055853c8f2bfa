"""The Trainer on ranks: a tiny LLaMA under DDP or FSDP2, saved halfway and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import trainer_ext
from hf_precond import option_specs
from tests.distributed.training import full, rank_and_world
from tests.trainer_ext.test_every_optimizer import SMALL
from trainer_ext.callbacks import our_optimizer

VOCABULARY, LENGTH, SAMPLES = 40, 6, 48
BATCH = 12  # over all ranks
FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}


def tiny_llama() -> LlamaForCausalLM:
    """Two layers with grouped queries, the same weights at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=22,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            initializer_range=0.2,
        )
    )


def token_blocks() -> list[dict[str, Tensor]]:
    """Blocks of random tokens."""
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=rng)
    return [{"input_ids": row, "labels": row} for row in tokens]


def optim_args(name: str, **options: Any) -> str:
    """Small options, where an optimizer of ours has them, and others.

    With room for all positions: which ones are drawn depends on the number of ranks.
    """
    known = option_specs(name)
    small = {**SMALL, "max_columns": BATCH * LENGTH, "factor_form": "brand"}
    small = {key: value for key, value in small.items() if key in known}
    return ",".join(f"{key}={value}" for key, value in {**small, **options}.items())


class Losses(TrainerCallback):
    """Notes what is logged at every step."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes logs with a loss."""
        if "loss" in kwargs["logs"]:
            self.logs.append(dict(kwargs["logs"]))


def run_trainer(
    folder: Path,
    *,
    fsdp: bool,
    resume_from: Path | None = None,
    state_dict_type: str = "FULL_STATE_DICT",
    **changes: Any,
) -> dict[str, Any]:
    """Trains for six steps, saving at step 3, or goes on from a checkpoint.

    Returns:
        the whole weights, what was logged, and the files of the checkpoint.
    """
    trainer_ext.register()
    with sharding_on_cpu() if fsdp else nullcontext(), fresh_state():
        config = {"fsdp": True, "fsdp_config": {**FSDP, "state_dict_type": state_dict_type}}
        args = arguments(folder, **(config if fsdp else {}), **changes)
        notes = Losses()
        trainer = Trainer(tiny_llama(), args, train_dataset=token_blocks(), callbacks=[notes])
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        saved = folder / "checkpoint-3"
        ours = our_optimizer(trainer.optimizer)
        return {
            "weights": {name: full(p).clone() for name, p in trainer.model.named_parameters()},
            "sharded": any(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
            "logs": notes.logs,
            "optimizer": None if ours is None else ours.algorithm_name,
            "files": sorted(path.name for path in saved.iterdir()) if saved.is_dir() else [],
        }


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Six steps over the same samples whatever the number of ranks."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": BATCH // rank_and_world()[1],
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if rank_and_world()[1] > 1 else None,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**values, **changes})


@contextmanager
def fresh_state() -> Iterator[None]:
    """Accelerate keeps its state for the process; the ranks run many a Trainer."""
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """Accelerate knows FSDP on accelerators only, and turns it into DDP on CPUs without a word.

    Nothing but the name of the kind of processes stands in the way, so they get another.
    """
    stock = PartialState.__init__

    def renamed(self: PartialState, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    with mock.patch.object(PartialState, "__init__", renamed):
        yield
