"""TRL's trainers of preferences and rewards: steps made of several passes of the model.

DPO runs a reference model, or the model without its adapters, and GRPO writes texts with it, all
between two steps: what layers see there is no part of the gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2ForSequenceClassification, Trainer

from tests.relatives import alternating
from tests.trainer_ext.test_every_optimizer import optim_args
from tests.trainer_ext.test_trl import METHODS, check_faultless, sentences, tokenizer
from tests.trainer_ext.tiny import arguments, same_weights, tiny_gpt2

trl = pytest.importorskip("trl", reason="needs the extra dev")


def pairs() -> Dataset:
    prompts, good, bad = (sentences(32, seed) for seed in (1, 2, 3))
    better, worse = ([f" {text}" for text in texts] for texts in (good, bad))
    return Dataset.from_dict({"prompt": prompts, "chosen": better, "rejected": worse})


def dpo(folder: Path, adapters: LoraConfig | None = None, **values: Any) -> Any:
    return trl.DPOTrainer(
        tiny_gpt2(n_positions=32),
        # The base model below adapters is its own reference.
        None if adapters else tiny_gpt2(n_positions=32),
        args=arguments(folder, trl.DPOConfig, max_length=16, **values),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        peft_config=adapters,
    )


def dpo_of_adapters(folder: Path, **values: Any) -> Any:
    torch.manual_seed(3)
    adapters = LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return dpo(folder, adapters, **values)


def reward(folder: Path, **values: Any) -> Any:
    config = tiny_gpt2().config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    return trl.RewardTrainer(
        GPT2ForSequenceClassification(config),
        args=arguments(folder, trl.RewardConfig, max_length=16, **values),
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )


def count_cats(completions: list[str], **kwargs: Any) -> list[float]:
    return [text.count("cat") + 0.1 * len(text) for text in completions]


def grpo(folder: Path, **values: Any) -> Any:
    return trl.GRPOTrainer(
        tiny_gpt2(n_positions=32),
        reward_funcs=count_cats,
        args=arguments(
            folder, trl.GRPOConfig, max_completion_length=8, num_generations=4, **values
        ),
        train_dataset=pairs().select_columns("prompt"),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize(
    ("make", "name"), alternating([dpo, dpo_of_adapters, reward, grpo], METHODS)
)
def test_trains_and_resumes_bit_for_bit(make: Any, name: str, tmp_path: Path) -> None:
    options = {"optim": name, "optim_args": optim_args(name)}
    straight: Trainer = make(tmp_path / "straight", **options)
    start = {key: value.clone() for key, value in straight.model.named_parameters()}
    straight.train()
    check_faultless(straight, name)
    for key, value in straight.model.named_parameters():
        # What is added to every score alike leaves no preference.
        if not (make is reward and key == "transformer.ln_f.bias"):
            assert torch.equal(value, start[key]) != value.requires_grad, key
    saved = tmp_path / "straight" / "checkpoint-3"
    assert (saved / "optimizer.safetensors").is_file()
    assert not (saved / "optimizer.pt").exists()
    resumed = make(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(saved))
    assert same_weights(resumed.model, straight.model)
