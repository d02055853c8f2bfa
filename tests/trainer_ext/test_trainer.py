"""Training with our optimizers: logs, the right optimizer, model cards, our own Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import HfArgumentParser, Seq2SeqTrainer, Trainer, TrainingArguments

import trainer_ext
from hf_precond.registry import list_optimizers
from tests.trainer_ext.tiny import (
    NAME,
    arguments,
    same_weights,
    tiny_gpt2,
    token_blocks,
    trainer,
)
from trainer_ext import (
    PrecondTrainer,
    PrecondTrainingArguments,
    build_optimizer,
    callbacks,
    checkpoint,
)

FIGURES = {
    "optim_escaped_mass_share",
    "optim_graft_ratio",
    "optim_skipped_nonfinite",
    "optim_step_ms",
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
KINDS = {
    "registered": (Trainer, TrainingArguments),
    "own": (PrecondTrainer, PrecondTrainingArguments),
}


def run(folder: Path, kind: str = "registered", **changes: Any) -> Trainer:
    """A finished run, through the stock classes or through ours without any registration."""
    trainer_class, arguments_class = KINDS[kind]
    if kind == "own":
        trainer_ext.unregister()
    args = arguments(folder, arguments_class, **changes)
    made = trainer_class(
        tiny_gpt2(), args, train_dataset=token_blocks(), eval_dataset=token_blocks(4)
    )
    made.train()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_logs_carry_health_figures_once(kind: str, tmp_path: Path) -> None:
    history = run(tmp_path, kind, eval_strategy="steps", eval_steps=3).state.log_history
    training = [entry for entry in history if "loss" in entry]
    assert len(training) == 3
    for entry in training:
        assert entry.keys() >= FIGURES
        assert 0 < entry["optim_escaped_mass_share"] <= 1
        assert entry["optim_step_ms"] > 0
        assert entry["optim_skipped_nonfinite"] == 0
    others = [entry for entry in history if "loss" not in entry]
    assert not any(key.startswith("optim_") for entry in others for key in entry)


def test_both_kinds_train_alike(tmp_path: Path) -> None:
    stock, own = run(tmp_path / "1"), run(tmp_path / "2", "own")
    assert same_weights(stock.model, own.model)
    for name in ("optimizer.safetensors", "scheduler.pt", "README.md"):
        assert (tmp_path / "2" / "checkpoint-6" / name).is_file()
    assert not (tmp_path / "2" / "checkpoint-6" / "optimizer.pt").exists()


def test_our_trainer_under_registration_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(callbacks, "health_logs", lambda _: calls.append("health") or {})
    monkeypatch.setattr(checkpoint, "save_optimizer", lambda *_, **__: calls.append("save"))
    args = arguments(tmp_path, PrecondTrainingArguments)
    made = PrecondTrainer(tiny_gpt2(), args, train_dataset=token_blocks())
    made.train()
    assert sorted(calls) == ["health"] * 3 + ["save"] * 2
    names = [type(callback).__name__ for callback in made.callback_handler.callbacks]
    assert names.count("OptimizerInUseCallback") == 1


def test_our_trainer_resumes(tmp_path: Path) -> None:
    first = run(tmp_path / "1", "own")
    args = arguments(tmp_path / "2", PrecondTrainingArguments)
    second = PrecondTrainer(tiny_gpt2(), args, train_dataset=token_blocks())
    second.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3"))
    assert same_weights(first.model, second.model)


def test_plan_is_shown_at_the_start(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    run(tmp_path)
    plans = [line for line in logs.messages if line.startswith(f"{NAME}: {NAME} 6,144 parameters")]
    assert len(plans) == 1


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def another_of_ours(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, "shared_basis_adam", lr=0.1)


@pytest.mark.parametrize(("make", "found"), [(sgd, "SGD"), (another_of_ours, "shared_basis_adam")])
def test_another_optimizer_in_use_is_an_error(
    make: Callable[[nn.Module], torch.optim.Optimizer], found: str, tmp_path: Path
) -> None:
    model = tiny_gpt2()
    made = Trainer(
        model, arguments(tmp_path), train_dataset=token_blocks(), optimizers=(make(model), None)
    )
    with pytest.raises(RuntimeError, match=f"optim='{NAME}' was asked for, .* in use is {found}"):
        made.train()


def test_stock_optimizers_are_left_alone(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    made = run(tmp_path, optim="adamw_torch", optim_args=None)
    made.create_model_card()
    assert not logs.messages
    assert not any(key.startswith("optim_") for e in made.state.log_history for key in e)
    assert "hf-precond" not in (tmp_path / "README.md").read_text()


def test_model_card_of_a_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, eval_strategy="steps", eval_steps=3)
    card = ModelCard.load(tmp_path / "checkpoint-6" / "README.md")
    assert set(card.data.tags) >= {"hf-precond", NAME}
    assert card.data.license is None
    for part in (
        "| rank | 4 |",
        "| eval_loss | ",
        "GPT2LMHeadModel.from_pretrained",
        "NeurIPS 2023",
        "@inproceedings{yen2023block,",
        "| steps | 6 |",
        "| batch | 4 on 1 process |",
        "| samples seen, at most | 24 |",
        "| schedule | linear, 2 steps of warm-up |",
        "| software | torch ",
    ):
        assert part in card.text
    assert card.data.pipeline_tag == "text-generation"
    options = "rank=4,update_interval=2,root_interval=2,start_step=2"
    assert f"--optim {NAME} --optim_args {options} --resume" in card.text


def test_section_in_the_trainers_card_is_written_once(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.create_model_card(tags=["mine"])
    made.create_model_card(tags=["mine"])
    card = ModelCard.load(tmp_path / "README.md")
    assert set(card.data.tags) >= {"mine", "hf-precond", NAME}
    assert card.text.count("## Optimizer") == 1
    assert "## Training procedure" in card.text


def test_seq2seq_trainer_inherits_the_behaviours(tmp_path: Path) -> None:
    from transformers import Seq2SeqTrainingArguments

    args = arguments(tmp_path, Seq2SeqTrainingArguments)
    made = Seq2SeqTrainer(tiny_gpt2(), args, train_dataset=token_blocks())
    made.train()
    assert (tmp_path / "checkpoint-6" / "optimizer.safetensors").is_file()


@pytest.mark.parametrize("name", list_optimizers())
def test_own_arguments_take_our_names_without_registration(name: str, tmp_path: Path) -> None:
    trainer_ext.unregister()
    parser = HfArgumentParser(PrecondTrainingArguments)
    command = [
        "--output_dir",
        str(tmp_path),
        "--optim",
        name,
        "--optim_options",
        '{"start_step": 7}',
    ]
    (args,) = parser.parse_args_into_dataclasses(command)
    assert args.optim == name
    _, kwargs = PrecondTrainer.get_optimizer_cls_and_kwargs(args, tiny_gpt2())
    assert kwargs["recipe"].stages.start_step == 7


def test_own_arguments_take_stock_names(tmp_path: Path) -> None:
    args = PrecondTrainingArguments(str(tmp_path), optim="adamw_torch")
    assert args.optim == "adamw_torch"
    with pytest.raises(ValueError, match="adamv is not a valid OptimizerNames"):
        PrecondTrainingArguments(str(tmp_path), optim="adamv")


def test_own_arguments_check_options_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown option 'rnak'"):
        PrecondTrainingArguments(str(tmp_path), optim_options={"rnak": 2})


def test_lora_model_trains_and_saves(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra dev")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(tiny_gpt2(), config)
    start = {name: param.clone() for name, param in model.named_parameters()}
    made = trainer(tmp_path, model)
    made.train()
    for name, param in model.named_parameters():
        assert torch.equal(param, start[name]) != param.requires_grad, name
    assert "## Optimizer" in (tmp_path / "checkpoint-6" / "README.md").read_text()
    resumed = trainer(tmp_path / "2", peft.get_peft_model(tiny_gpt2(), config))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trained = dict(model.named_parameters())
    for name, param in resumed.model.named_parameters():
        assert torch.equal(param, trained[name]), name


def test_accumulated_batches_equal_one_batch(tmp_path: Path) -> None:
    # Roots of a single gradient would magnify the rounding of the sums.
    options = {"optim_args": "rank=4,root_interval=2,start_step=3"}
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    whole = trainer(
        tmp_path / "1", tiny_gpt2(**NO_DROPOUT), per_device_train_batch_size=8, **options
    )
    parts = trainer(tmp_path / "2", tiny_gpt2(**NO_DROPOUT), **batches, **options)
    whole.train()
    parts.train()
    for one, two in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_grad_scaler_changes_nothing_and_skips_overflow() -> None:
    models = tiny_gpt2(**NO_DROPOUT), tiny_gpt2(**NO_DROPOUT)
    plain, scaled = (build_optimizer(model, NAME, lr=1e-2, rank=4) for model in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    tokens = token_blocks(1)[0]["input_ids"][None]
    for _ in range(3):
        models[0](tokens, labels=tokens).loss.backward()
        plain.step()
        scaler.scale(models[1](tokens, labels=tokens).loss).backward()
        scaler.step(scaled)
        scaler.update()
        plain.zero_grad()
        scaled.zero_grad()
    assert same_weights(*models)
    scaler.scale(models[1](tokens, labels=tokens).loss * float("inf")).backward()
    scaler.step(scaled)
    scaler.update()
    assert same_weights(*models)
