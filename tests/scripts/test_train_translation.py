"""scripts/train_translation.py on a made-up language: what it trains, writes and refuses."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.scripts.conftest import (
    QUIET,
    RESULT_FILES,
    Train,
    assert_refused,
    load_script,
    losses_in,
    names_in,
    same_weights,
    weights_in,
)

SIZES = (
    "d_model=32,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=64,decoder_ffn_dim=64,"
    "encoder_attention_heads=2,decoder_attention_heads=2,max_position_embeddings=24,dropout=0.0"
)
WORDS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four"}


def parallel(count: int, seed: int) -> tuple[str, str]:
    """Sentences of up to four words, translated word by word."""
    generator = torch.Generator().manual_seed(seed)
    sources, targets = [], []
    for _ in range(count):
        length = int(torch.randint(1, 5, (), generator=generator))
        chosen = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        sources.append(" ".join(list(WORDS)[index] for index in chosen))
        targets.append(" ".join(list(WORDS.values())[index] for index in chosen))
    return "\n".join(sources), "\n".join(targets)


@pytest.fixture(scope="session")
def train_translation() -> ModuleType:
    """scripts/train_translation.py"""
    return load_script("train_translation")


@pytest.fixture
def train(train_translation: ModuleType, tmp_path: Path) -> Train:
    """Runs the script in this process with tiny defaults."""
    files = {}
    for name, count in (("train", 300), ("validation", 20)):
        for side, text in zip(("source", "target"), parallel(count, count), strict=True):
            files[f"{name}_{side}"] = tmp_path / f"{name}.{side}"
            files[f"{name}_{side}"].write_text(text)

    def run(**options: Any) -> dict[str, float]:
        merged = {
            **QUIET,
            **files,
            "config_overrides": SIZES,
            "vocab_size": 280,
            "max_length": 20,
            "tokenizer_cache_dir": tmp_path / "tokenizers",
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-2,
            "output_dir": tmp_path / "out",
            **options,
        }
        return train_translation.main([f"--{k}={v}" for k, v in merged.items() if v is not None])

    return run


def test_run_learns_and_writes_everything(train: Train, tmp_path: Path) -> None:
    metrics = train(max_steps=60)
    losses = losses_in(tmp_path / "out")
    assert losses[0] > math.log(280) - 1
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["eval_accuracy"] > 0.4
    assert names_in(tmp_path / "out") >= {*RESULT_FILES, "tokenizer.json", "generation_config.json"}


def test_t5_has_positions_without_end(train: Train) -> None:
    """Its configuration has no max_position_embeddings to be above of."""
    sizes = "d_model=16,d_kv=8,d_ff=32,num_layers=1,num_decoder_layers=1,num_heads=2"
    metrics = train(max_steps=2, config_name="t5", config_overrides=sizes)
    assert math.isfinite(metrics["eval_loss"])


def test_evaluations_translate(train: Train, tmp_path: Path) -> None:
    metrics = train(max_steps=2, predict_with_generate="true", per_device_eval_batch_size=8)
    assert 0 <= metrics["eval_bleu"] < 50
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer("eins zwei", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**batch).shape[1] <= 20


@pytest.mark.parametrize("optim", ["ng_plus", "two_sided_basis"])
def test_our_optimizers_train_and_resume(train: Train, tmp_path: Path, optim: str) -> None:
    saving = {"optim": optim, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(**saving)
    whole = weights_in(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert "optimizer.safetensors" in names_in(checkpoint)
    train(**saving, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint)
    assert same_weights(whole, weights_in(tmp_path / "resumed"))


def test_accumulated_batches_are_averaged(train: Train, tmp_path: Path) -> None:
    changes = {"optim": "sgd", "learning_rate": 1e-1, "max_steps": 1}
    train(**changes, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    accumulated = losses_in(tmp_path / "out")[0]
    train(**changes, per_device_train_batch_size=16, output_dir=tmp_path / "whole")
    assert accumulated == pytest.approx(losses_in(tmp_path / "whole")[0], rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_source": None}, "train_source is needed: a file with one sentence a line"),
        ({"validation_target": "nowhere"}, "text file 'nowhere' does not exist"),
        ({"max_length": 50}, "max_length=50 is above max_position_embeddings=24"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"preset": "huge"}, "preset='huge' must be one of marian-tiny"),
    ],
)
def test_mistakes_take_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    assert_refused(lambda: train(**options), capsys, message)
