"""TRL's SFTTrainer: a Trainer of its own with its own arguments, losses and collators.

Its arguments turn on bf16 autocast and gradient checkpointing by themselves.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer

from hf_precond.views.view import ParamView
from tests.relatives import alternating
from tests.trainer_ext.models import CASES
from tests.trainer_ext.test_every_optimizer import optim_args
from tests.trainer_ext.tiny import arguments, same_weights, tiny_gpt2
from trainer_ext.callbacks import our_optimizer
from trainer_ext.optim_names import HookedTrainer

trl = pytest.importorskip("trl", reason="needs the extra dev")

SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "log", "a", "big", "small", "red"]
# Low rank, and statistics of what layers see.
METHODS = ["shared_basis_adam", "b_kfac"]
each_method = pytest.mark.parametrize("name", METHODS)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of a small vocabulary."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def sentences(count: int, seed: int) -> list[str]:
    """Random words, of lengths that differ."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 6))) for _ in range(count)]


def texts() -> Dataset:
    return Dataset.from_dict({"text": sentences(32, seed=1)})


def completions() -> Dataset:
    ends = [f" {text}" for text in sentences(32, seed=2)]
    return Dataset.from_dict({"prompt": sentences(32, seed=1), "completion": ends})


def conversations() -> Dataset:
    pairs = zip(sentences(32, seed=1), sentences(32, seed=2), strict=True)
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
            for question, answer in pairs
        ]
    )


# Data and the switches of the arguments that belong to it.
DATA: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (texts, {}),
    "packed whole": (texts, {"packing": True}),
    "packed by cutting": (texts, {"packing": True, "packing_strategy": "wrapped"}),
    "padding free": (texts, {"padding_free": True, "max_length": None}),
    "completions": (completions, {}),
    "answers": (conversations, {"assistant_only_loss": True}),
    "accumulation in float32": (texts, {"bf16": False, "gradient_accumulation_steps": 2}),
}


def sft(
    folder: Path,
    name: str,
    model: nn.Module | None = None,
    data: str = "text",
    kind: type[Trainer] = trl.SFTTrainer,
    peft_config: LoraConfig | None = None,
    **changes: Any,
) -> Any:
    """An SFTTrainer for the tiny model."""
    rows, switches = DATA[data]
    values = {"optim": name, "optim_args": optim_args(name), "max_length": 16, **switches}
    return kind(
        model or tiny_gpt2(),
        arguments(folder, trl.SFTConfig, **{**values, **changes}),
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def views_of(run: Trainer) -> dict[str, list[str]]:
    """Views of all parameters, by their names."""
    optimizer = our_optimizer(run.optimizer)
    plain = [views for group in optimizer.param_groups for views in group["views"]]
    return {
        name: [str(ParamView.from_plain(view)) for view in views]
        for name, views in zip(optimizer.param_names, plain, strict=True)
    }


def check_faultless(run: Trainer, name: str) -> None:
    """The optimizer is ours, and no step was left out, by what was logged along the way."""
    optimizer = our_optimizer(run.optimizer)
    assert optimizer.algorithm_name == name
    logged = [entry for entry in run.state.log_history if "optim_step_ms" in entry]
    assert logged
    for figure in ("skipped_nonfinite", "failed_updates", "missing_columns"):
        assert [entry[f"optim_{figure}"] for entry in logged] == [0] * len(logged), figure


@pytest.mark.parametrize(("data", "name"), alternating(DATA, METHODS))
def test_trains_and_resumes_bit_for_bit(data: str, name: str, tmp_path: Path) -> None:
    straight = sft(tmp_path / "straight", name, data=data)
    straight.train()
    check_faultless(straight, name)
    assert not same_weights(straight.model, tiny_gpt2())
    saved = tmp_path / "straight" / "checkpoint-3"
    assert (saved / "optimizer.safetensors").is_file()
    assert not (saved / "optimizer.pt").exists()
    assert "## Optimizer" in (saved / "README.md").read_text()
    model = tiny_gpt2()
    torch.nn.init.normal_(model.transformer.wte.weight)
    resumed = sft(tmp_path / "resumed", name, model, data=data)
    resumed.train(resume_from_checkpoint=str(saved))
    assert resumed.state.global_step == 6
    assert same_weights(resumed.model, straight.model)


@each_method
def test_trains_as_the_stock_trainer_does(name: str, tmp_path: Path) -> None:
    """From the same rows, with prompts masked: the same weights, up to rounding."""
    plain = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
    run = sft(tmp_path / "sft", name, data="completions", **plain)
    rows, collator = run.train_dataset, run.data_collator
    labels = collator([rows[index] for index in range(4)])["labels"]
    assert (labels == -100).any()
    assert (labels != -100).any()
    run.train()
    options = {"optim": name, "optim_args": optim_args(name), "remove_unused_columns": False}
    stock = Trainer(
        tiny_gpt2(eos_token_id=SPECIAL.index("<eos>")),
        arguments(tmp_path / "stock", **options, **plain),
        train_dataset=rows,
        data_collator=collator,
    )
    stock.train()
    # TRL sums the loss without forming all logits: other roundings.
    for one, two in zip(run.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


# By the default grouping of each method: heads, or each of the fused matrices.
VIEWS_OF_GPT2 = {
    "shared_basis_adam": {
        "c_attn": ("q: 2 x [8, 16]", "k: 2 x [8, 16]", "v: 2 x [8, 16]"),
        "c_proj": ("2 x [16, 8]",),
    },
    "b_kfac": {
        "c_attn": ("q: 1 x [16, 16]", "k: 1 x [16, 16]", "v: 1 x [16, 16]"),
        "c_proj": ("1 x [16, 16]",),
    },
}


@each_method
def test_gpt2_gets_its_views(name: str, tmp_path: Path) -> None:
    run = sft(tmp_path, name, max_steps=1, save_strategy="no")
    run.train()
    views = views_of(run)
    for weight, expected in VIEWS_OF_GPT2[name].items():
        assert views[f"transformer.h.1.attn.{weight}.weight"] == list(expected)
    assert views["transformer.wte.weight"] == []


@each_method
def test_llama_is_preconditioned_per_head(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "llama")
    options = f"{optim_args(name)},attention_grouping=head"
    run = sft(tmp_path, name, case.build(), optim_args=options, max_steps=4, save_strategy="no")
    run.train()
    check_faultless(run, name)
    views = views_of(run)
    for weight, expected in case.views.items():
        assert views[weight] == list(expected)
    assert not same_weights(run.model, case.build())


@each_method
def test_lora_adapters_get_their_views(name: str, tmp_path: Path) -> None:
    def adapted(folder: str) -> Any:
        torch.manual_seed(3)
        adapters = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        return sft(tmp_path / folder, name, peft_config=adapters)

    run = adapted("straight")
    start = {key: value.clone() for key, value in run.model.named_parameters()}
    run.train()
    check_faultless(run, name)
    adapter = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.default.weight"
    views = views_of(run)
    assert len(views) == 4
    assert views[adapter.format("A")] == ["1 x [4, 16]"]
    assert views[adapter.format("B")] == ["1 x [48, 4]"]
    for key, value in run.model.named_parameters():
        assert torch.equal(value, start[key]) != value.requires_grad, key
    saved = tmp_path / "straight" / "checkpoint-3"
    assert (saved / "optimizer.safetensors").is_file()
    resumed = adapted("resumed")
    resumed.train(resume_from_checkpoint=str(saved))
    assert same_weights(resumed.model, run.model)


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    run = sft(tmp_path, "shared_basis_adam", max_steps=1, save_strategy="no")
    run.args.optim_args = "rnak=2"
    with pytest.raises(ValueError, match="unknown option 'rnak'"):
        run.train()


def test_its_own_model_card_gets_our_section_with_the_hooked_trainer(tmp_path: Path) -> None:
    """TRL writes the card of the output folder without asking the Trainer's method."""

    class HookedSFTTrainer(HookedTrainer, trl.SFTTrainer):
        """TRL's trainer with our behaviours by overriding."""

    run = sft(tmp_path, "shared_basis_adam", kind=HookedSFTTrainer, max_steps=3)
    run.train()
    check_faultless(run, "shared_basis_adam")
    card = (tmp_path / "README.md").read_text()
    assert "TRL" in card
    assert card.count("## Optimizer") == 1
