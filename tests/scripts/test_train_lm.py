"""scripts/train_lm.py on tiny models: what it trains, writes, repeats and refuses."""

from __future__ import annotations

import json
import math
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from tests.scripts.conftest import (
    QUIET,
    RESULT_FILES,
    Train,
    assert_refused,
    losses_in,
    names_in,
    same_weights,
    weights_in,
)

TINY = {
    **QUIET,
    "config_overrides": "n_layer=1,n_embd=16,n_head=2,n_positions=32",
    "vocab_size": 300,
    "block_size": 16,
    "per_device_train_batch_size": 2,
    "max_eval_samples": 7,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text with enough regularity that a tiny model learns from it."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} says {n % 7} and {n % 5}\n" for n in range(400)))
    return path


@pytest.fixture
def train(train_lm: ModuleType, text_file: Path, tmp_path: Path) -> Train:
    """Runs the script in this process with tiny defaults."""

    def run(**options: Any) -> dict[str, float]:
        merged = {
            **TINY,
            "train_file": text_file,
            "tokenizer_cache_dir": tmp_path / "tokenizers",
            "output_dir": tmp_path / "out",
            **options,
        }
        return train_lm.main([f"--{k}={v}" for k, v in merged.items() if v is not None])

    return run


def test_run_learns_and_writes_everything(train: Train, tmp_path: Path) -> None:
    metrics = train(max_steps=12)
    losses = losses_in(tmp_path / "out")
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert losses[-1] < losses[0] - 0.1
    written = names_in(tmp_path / "out")
    assert written >= RESULT_FILES | {"tokenizer.json"}
    saved = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert saved["eval_perplexity"] == metrics["eval_perplexity"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "This model was trained from scratch on the text.txt dataset" in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == 300


def test_perplexity_is_that_of_the_mean_token_loss(train: Train, tmp_path: Path) -> None:
    # 7 sequences in batches of 4: the last batch is smaller and must weigh less.
    # And transformers divides the loss of GPT-2 by 16 tokens a sequence, of which 15 are predicted,
    # where the class name does not tell it the loss.
    metrics = train(max_steps=2)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-4)
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_perplexity_without_compute_metrics(train: Train) -> None:
    metrics = train(max_steps=1, prediction_loss_only="true")
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))


def test_batch_eval_metrics_give_the_same(train: Train) -> None:
    whole = train(max_steps=2)
    batched = train(max_steps=2, batch_eval_metrics="true")
    assert batched["eval_perplexity"] == pytest.approx(whole["eval_perplexity"], rel=1e-6)
    assert batched["eval_accuracy"] == whole["eval_accuracy"]


def test_same_seed_repeats_bit_for_bit_and_another_does_not(train: Train, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(max_steps=3, seed=seed, output_dir=tmp_path / name)
    first, again, other = (weights_in(tmp_path / name) for name in "abc")
    assert same_weights(first, again)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


class _DrawingSGD(torch.optim.SGD):
    """Draws from the global random state at each step, as a sketching optimizer might."""

    def step(self, closure: Any = None) -> Any:
        torch.rand(17)
        return super().step(closure)


def test_data_order_and_initial_weights_do_not_depend_on_the_optimizer(
    train: Train, train_lm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []
    initial: list[torch.Tensor] = []

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = original(examples)
        seen[-1].append(batch["input_ids"])
        return batch

    def create(
        trainer: Trainer, model: Any = None, *, optimizer_class: type[torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        initial.append(trainer.model.get_input_embeddings().weight.detach().clone())
        trainer.optimizer = optimizer_class(trainer.model.parameters(), lr=1e-2)
        return trainer.optimizer

    original = train_lm.collate_blocks
    monkeypatch.setattr(train_lm, "collate_blocks", collate)
    for optimizer_class in (torch.optim.AdamW, _DrawingSGD):
        seen.append([])
        method = partialmethod(create, optimizer_class=optimizer_class)
        monkeypatch.setattr(Trainer, "create_optimizer", method)
        train(max_steps=6, do_eval="false", seed=5)
    assert torch.equal(*initial)
    assert len(seen[0]) == len(seen[1]) >= 6
    assert all(map(torch.equal, *seen))


def test_resumed_run_equals_uninterrupted_run(train: Train, tmp_path: Path) -> None:
    train(max_steps=6, save_strategy="steps", save_steps=3, output_dir=tmp_path / "whole")
    train(
        max_steps=6,
        output_dir=tmp_path / "resumed",
        resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3",
    )
    assert same_weights(weights_in(tmp_path / "whole"), weights_in(tmp_path / "resumed"))


def test_resume_true_takes_the_last_checkpoint(train: Train, tmp_path: Path) -> None:
    train(max_steps=4, save_strategy="steps", save_steps=2)
    train(max_steps=6, resume_from_checkpoint="true")
    steps = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_training_continues_from_saved_weights(train: Train, tmp_path: Path) -> None:
    first = train(max_steps=12)
    again = train(
        model_name_or_path=tmp_path / "out",
        config_overrides=None,
        vocab_size=None,
        output_dir=tmp_path / "next",
        do_train="false",
    )
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)


def test_streaming_trains_on_the_same_blocks(train: Train, text_file: Path, tmp_path: Path) -> None:
    common = {"validation_file": text_file, "max_steps": 3}
    # In order, so that both forms must give the same losses.
    train(**common, train_sampling_strategy="sequential", output_dir=tmp_path / "map")
    train(**common, streaming="true", shuffle_buffer_size=0, output_dir=tmp_path / "stream")
    assert losses_in(tmp_path / "stream") == losses_in(tmp_path / "map")


def test_config_name_by_model_type(train: Train, tmp_path: Path) -> None:
    train(
        config_name="llama",
        config_overrides="hidden_size=16,intermediate_size=24,num_hidden_layers=1,"
        "num_attention_heads=4,num_key_value_heads=2",
        max_steps=1,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == 300


def test_bfloat16_weights(train: Train, tmp_path: Path) -> None:
    train(max_steps=1, model_dtype="bfloat16")
    dtypes = {weight.dtype for weight in weights_in(tmp_path / "out").values()}
    assert dtypes == {torch.bfloat16}


def test_no_model_is_saved_where_only_curves_are_wanted(train: Train, tmp_path: Path) -> None:
    train(max_steps=1, save_final_model="false")
    assert not list((tmp_path / "out").glob("**/*.safetensors"))
    assert (tmp_path / "out" / "trainer_state.json").is_file()


def test_yaml_file_and_command_line(
    train_lm: ModuleType, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    options = {**TINY, "max_steps": 5, "train_file": str(text_file)}
    options |= {"output_dir": str(tmp_path / "out"), "tokenizer_cache_dir": str(tmp_path / "cache")}
    config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in options.items()))
    train_lm.main([str(config), "--max_steps", "2"])
    assert len(losses_in(tmp_path / "out")) == 2
    assert "validation loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "gpt2-7b"}, "preset='gpt2-7b' must be one of gpt2-7m"),
        ({"preset": "gpt2-7m", "config_name": "gpt2"}, "exclude each other; give at most one"),
        ({"model_name_or_path": "x"}, "config_overrides='n_layer=1"),
        ({"config_overrides": "n_layers=2"}, "'n_layers=2' is not key=value"),
        ({"config_overrides": "n_layer"}, "'n_layer' is not key=value"),
        ({"config_overrides": "n_layer=two"}, "n_layer='two' must be of type int"),
        ({"model_dtype": "float8"}, "model_dtype='float8' must be one of float32"),
        ({"dataset_name": "stdlib"}, "dataset_name='stdlib' and train_file="),
        ({"train_file": "missing.txt"}, "'missing.txt' does not exist"),
        ({"validation_file": "missing.txt"}, "'missing.txt' does not exist"),
        ({"validation_split_percentage": 0}, "validation_split_percentage=0 must be in 1..99"),
        ({"tokenizer_name": "somewhere"}, "vocab_size=300 has no effect with tokenizer_name="),
        ({"vocab_size": 100}, "vocab_size=100 must be at least 257"),
        ({"block_size": 1}, "block_size=1 must be at least 2"),
        ({"block_size": 33}, "block_size=33 exceeds the 32 positions of the model"),
        ({"max_train_samples": 0}, "max_train_samples=0 must be at least 1"),
        ({"max_eval_samples": -3}, "max_eval_samples=-3 must be at least 1"),
        ({"tokenizer_train_rows": 0}, "tokenizer_train_rows=0 must be at least 1"),
        ({"streaming": "true"}, "streaming=True needs max_steps > 0, got max_steps=-1"),
        ({"streaming": "true", "max_steps": 1}, "needs a validation_file"),
        ({"do_train": "false", "do_eval": "false"}, "leave nothing to do"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint='nowhere' is not a folder"),
        ({"resume_from_checkpoint": "true"}, "has no checkpoint"),
        ({"optim": "adamv"}, "argument --optim: invalid choice: 'adamv'"),
        (
            {"learning_rate": "fast"},
            "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
        ),
        ({"learning_rte": 0.1}, "unknown option '--learning_rte'; did you mean learning_rate"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_end_with_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    assert_refused(lambda: train(**options), capsys, message)


def test_text_too_short_for_a_block_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a\nb\nc\n")
    with pytest.raises(SystemExit):
        train(train_file=short)
    assert "text fills no block of block_size=16 tokens" in capsys.readouterr().err
