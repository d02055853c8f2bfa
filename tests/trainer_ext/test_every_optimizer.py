"""Every registered name works through the stock Trainer: trains, saves, resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_precond import list_optimizers, option_specs
from tests.relatives import slow_for_relatives
from tests.trainer_ext.tiny import (
    NAME,
    arguments,
    same_weights,
    tiny_gpt2,
    token_blocks,
    trainer,
)
from trainer_ext.callbacks import our_optimizer

# Small enough that everything is due within six steps; used where an optimizer has the option.
SMALL = {
    "rank": 4,
    "update_interval": 2,
    "root_interval": 2,
    "inverse_interval": 2,
    "basis_interval": 2,
    "projection_interval": 2,
    "brand_interval": 2,
    "rsvd_interval": 2,
    "correction_interval": 2,
    "max_columns": 32,
    "start_step": 2,
}


def optim_args(name: str) -> str:
    return ",".join(f"{key}={value}" for key, value in SMALL.items() if key in option_specs(name))


@pytest.mark.parametrize("name", slow_for_relatives(list_optimizers()))
def test_trains_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    options = {"optim": name, "optim_args": optim_args(name)}
    straight = trainer(tmp_path / "straight", **options)
    straight.train()
    assert our_optimizer(straight.optimizer).algorithm_name == name
    assert not same_weights(straight.model, tiny_gpt2())
    saved = tmp_path / "straight" / "checkpoint-3"
    assert (saved / "optimizer.safetensors").is_file()
    assert not (saved / "optimizer.pt").exists()
    model = tiny_gpt2()
    torch.nn.init.normal_(model.transformer.wte.weight)
    resumed = trainer(tmp_path / "resumed", model, **options)
    resumed.train(resume_from_checkpoint=str(saved))
    assert same_weights(resumed.model, straight.model)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_says_how_long_an_epoch_is(accumulation: int, tmp_path: Path) -> None:
    """32 samples in batches of 4: eight batches, so eight or three steps an epoch."""
    run = trainer(
        tmp_path,
        optim="ng_plus",
        optim_args="damping=0.1*0.5^(epoch/1),lr_schedule=1/0.5@epoch1",
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
    )
    run.train()
    assert our_optimizer(run.optimizer).steps_per_epoch == {1: 8, 3: 3}[accumulation]


class Endless(IterableDataset):
    """Data without a length."""

    def __iter__(self) -> Any:
        while True:
            yield from token_blocks()


def test_a_schedule_by_epoch_needs_data_with_a_length(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim_args="lr_schedule=1/0.5@epoch1", save_strategy="no")
    run = Trainer(tiny_gpt2(), args, train_dataset=Endless())
    with pytest.raises(ValueError, match="steps_per_epoch"):
        run.train()
    args.optim_args += ",steps_per_epoch=4"
    run = Trainer(tiny_gpt2(), args, train_dataset=Endless())
    run.train()
    assert our_optimizer(run.optimizer).algorithm_name == NAME
