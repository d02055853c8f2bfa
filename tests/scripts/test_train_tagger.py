"""scripts/train_tagger.py on a made-up treebank: what it trains, writes and refuses."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

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

SIZES = "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2"
WORDS = {"dogs": "NNS", "cats": "NNS", "see": "VBP", "the": "DT", "small": "JJ", "mice": "NNS"}


def treebank(sentences: int, seed: int) -> str:
    """Sentences of random words, each with its tag."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(sentences):
        length = int(torch.randint(1, 9, (), generator=generator))
        for number, index in enumerate(torch.randint(len(WORDS), (length,), generator=generator)):
            word, tag = list(WORDS.items())[int(index)]
            lines.append("\t".join([str(number + 1), word, word, "X", tag, *"_____"]))
        lines.append("")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def train_tagger() -> ModuleType:
    """scripts/train_tagger.py"""
    return load_script("train_tagger")


@pytest.fixture
def train(train_tagger: ModuleType, tmp_path: Path) -> Train:
    """Runs the script in this process with tiny defaults."""
    for name, sentences in (("train", 120), ("dev", 30)):
        (tmp_path / f"{name}.conllu").write_text(treebank(sentences, sentences))

    def run(**options: Any) -> dict[str, float]:
        merged = {
            **QUIET,
            "config_overrides": SIZES,
            "train_file": tmp_path / "train.conllu",
            "validation_file": tmp_path / "dev.conllu",
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-2,
            "output_dir": tmp_path / "out",
            **options,
        }
        return train_tagger.main([f"--{k}={v}" for k, v in merged.items() if v is not None])

    return run


def test_run_learns_and_writes_everything(train: Train, tmp_path: Path) -> None:
    metrics = train(max_steps=60)
    losses = losses_in(tmp_path / "out")
    # Seven classes: four tags, the root, and two special ones that never come.
    assert losses[0] > 1.5
    assert losses[-1] < 0.3
    assert metrics["eval_accuracy"] > 0.95
    assert names_in(tmp_path / "out") >= {*RESULT_FILES, "tokenizer.json"}


def test_loss_and_accuracy_are_those_of_the_saved_model(train: Train, tmp_path: Path) -> None:
    metrics = train(max_steps=8, per_device_eval_batch_size=7)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    sentences = [
        [line.split("\t") for line in text.splitlines() if line]
        for text in (tmp_path / "dev.conllu").read_text().split("\n\n")
    ]
    losses, right, count = [], 0, 0
    for sentence in sentences:
        words = [cells[1] for cells in sentence]
        labels = torch.tensor(
            [model.config.label2id[t] for t in ["<r>", *(c[4] for c in sentence)]]
        )
        batch = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    assert metrics["eval_accuracy"] == pytest.approx(right / count)
    # The Trainer's evaluation weighs batches by sentences.
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / count, rel=0.05)


@pytest.mark.parametrize("optim", ["shared_basis_adam", "soap"])
def test_our_optimizers_train_and_resume(train: Train, tmp_path: Path, optim: str) -> None:
    saving = {"optim": optim, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(**saving)
    whole = weights_in(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert "optimizer.safetensors" in names_in(checkpoint)
    train(**saving, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint)
    assert same_weights(whole, weights_in(tmp_path / "resumed"))


def test_the_embedding_may_follow_sgd(train: Train, tmp_path: Path) -> None:
    args = "rank=4,fallback=sgd,fallback_lr_ratio=10"
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(optim="shared_basis_adam", optim_args=args, max_steps=3, **saving)
    assert all(map(math.isfinite, losses_in(tmp_path / "out")))


def test_training_goes_on_from_weights_and_their_words(train: Train, tmp_path: Path) -> None:
    first = train(max_steps=30)
    again = {"model_name_or_path": tmp_path / "out", "config_overrides": None}
    second = train(**again, max_steps=1, learning_rate=0, output_dir=tmp_path / "second")
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_file": None}, "train_file is needed: a CoNLL-U file"),
        ({"validation_file": "nowhere"}, "text file 'nowhere' does not exist"),
        ({"tags": "deprel"}, "tags='deprel' must be one of upos, xpos"),
        ({"preset": "huge"}, "preset='huge' must be one of paper, small"),
        ({"config_overrides": "max_position_embeddings=1"}, "must be at least 2"),
    ],
)
def test_mistakes_take_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    assert_refused(lambda: train(**options), capsys, message)
