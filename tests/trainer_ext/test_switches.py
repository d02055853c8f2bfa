"""Switches of the Trainer that change what reaches the optimizer, with every kind of method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_precond import list_optimizers
from tests.relatives import slow_for_relatives
from tests.trainer_ext.test_every_optimizer import optim_args
from tests.trainer_ext.tiny import arguments, same_weights, tiny_gpt2, token_blocks, trainer
from trainer_ext.callbacks import our_optimizer

# One of each kind: low rank, rotated, Kronecker factors, layer inputs, per-sample.
KINDS = [
    "shared_basis_adam",
    "kfac",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("soap", "shampoo", "ng_plus_per_sample")
    ),
]
SWITCHES: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.1},
    "no clipping": {"max_grad_norm": 0.0},
    "bf16 autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "label smoothing": {"label_smoothing_factor": 0.1},
    "averaged tokens": {"average_tokens_across_devices": True},
    "attention layers only": {"optim_target_modules": ["attn"]},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_trains_with_a_switch(switch: str, name: str, tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        optim=name,
        optim_args=optim_args(name),
        save_strategy="no",
        max_steps=4,
        **SWITCHES[switch],
    )
    run.train()
    assert not same_weights(run.model, tiny_gpt2())
    assert all(param.isfinite().all() for param in run.model.parameters())
    optimizer = our_optimizer(run.optimizer)
    assert optimizer.algorithm_name == name
    figures = optimizer.health()
    assert figures["skipped_nonfinite"] == figures["failed_updates"] == 0
    assert figures["missing_columns"] == 0


class Cramped(GPT2LMHeadModel):
    """Runs out of memory with more than two samples."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **rest: Any) -> Any:
        """The model's, for two samples at most."""
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(input_ids, labels=labels, **rest)


@pytest.mark.slow  # each run halves the batch twice
@pytest.mark.parametrize("name", KINDS)
def test_a_batch_size_found_by_halving_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """What was captured of the batch that was too large must not reach a step."""
    weights = tiny_gpt2().state_dict()
    options: dict[str, Any] = {
        "optim": name,
        "optim_args": optim_args(name),
        "save_strategy": "no",
        "max_steps": 4,
    }
    found = {}
    for batch, searching in ((8, True), (2, False)):
        config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}
        config |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        model = Cramped(GPT2Config(**config, bos_token_id=0, eos_token_id=0))
        model.load_state_dict(weights)
        run = trainer(
            tmp_path,
            model,
            **options,
            per_device_train_batch_size=batch,
            auto_find_batch_size=searching,
        )
        run.train()
        found[searching] = run.model
    assert same_weights(found[True], found[False])


@pytest.mark.parametrize("name", KINDS)
def test_encoder_and_decoder(name: str, tmp_path: Path) -> None:
    """Layers that see sequences of two lengths, and an encoder's states as keys and values."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    args = arguments(
        tmp_path,
        Seq2SeqTrainingArguments,
        optim=name,
        optim_args=optim_args(name),
        max_steps=4,
        save_strategy="no",
    )
    rows = [{**row, "labels": row["labels"][:9]} for row in token_blocks()]
    run = Seq2SeqTrainer(model, args, train_dataset=rows)
    run.train()
    after = model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert our_optimizer(run.optimizer).health()["missing_columns"] == 0


@pytest.mark.parametrize("name", slow_for_relatives(list_optimizers()))
def test_a_layer_added_later_is_trained(name: str, tmp_path: Path) -> None:
    """A new group joins with fresh state; the others keep theirs."""
    run = trainer(
        tmp_path, optim=name, optim_args=optim_args(name), save_strategy="no", max_steps=2
    )
    run.train()
    optimizer = our_optimizer(run.optimizer)
    late = nn.Linear(16, 16)
    run.model.transformer.h[0].register_module("late", late)
    first = optimizer.param_groups[0]["params"][0]
    steps = optimizer.state[first]["step"].clone()
    named = [(f"transformer.h.0.late.{name}", param) for name, param in late.named_parameters()]
    optimizer.add_param_group({"params": named})
    optimizer.attach(run.model)
    before = late.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        rows = torch.stack([row["input_ids"] for row in token_blocks(4)])
        hidden = run.model.transformer(rows).last_hidden_state
        (run.model.lm_head(late(hidden))).square().mean().backward()
        optimizer.step()
    assert not torch.equal(late.weight, before)
    assert optimizer.state[first]["step"] == steps + 3
