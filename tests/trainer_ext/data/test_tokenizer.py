"""Trained tokenizers: lossless, reproducible, cached by content."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trainer_ext.data import tokenizer as tokenizer_module
from trainer_ext.data.tokenizer import (
    END_OF_TEXT,
    load_or_train_tokenizer,
    tokenizer_key,
    train_tokenizer,
)

TEXTS = ["def f(x):\n    return x + 1\n", "for item in items:\n    print(item)\n"] * 4


def test_any_text_decodes_to_itself() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    text = " unseen\t\u4e2d\u6587 \U0001f600  two  spaces\n\x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_merges_are_learned_and_bounded_by_the_size() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    assert len(tokenizer) == 280
    assert len(tokenizer("return item")["input_ids"]) < len("return item")


def test_training_twice_gives_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(TEXTS, vocab_size=290).save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_end_of_text_survives_saving(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, vocab_size=280).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == loaded.bos_token == END_OF_TEXT
    assert loaded(END_OF_TEXT)["input_ids"] == [loaded.eos_token_id]


def test_cache_is_used_for_the_same_text_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def counting(texts: list[str], *, vocab_size: int) -> object:
        trained.append(vocab_size)
        return train_tokenizer(texts, vocab_size=vocab_size)

    monkeypatch.setattr(tokenizer_module, "train_tokenizer", counting)
    for texts, size in ((TEXTS, 280), (TEXTS, 280), (TEXTS[1:], 280), (TEXTS, 281)):
        load_or_train_tokenizer(texts, vocab_size=size, cache_dir=tmp_path)
    assert trained == [280, 280, 281]


def test_cached_equals_trained(tmp_path: Path) -> None:
    first = load_or_train_tokenizer(TEXTS, vocab_size=290, cache_dir=tmp_path)
    second = load_or_train_tokenizer(TEXTS, vocab_size=290, cache_dir=tmp_path)
    assert first.get_vocab() == second.get_vocab()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_key_sees_where_one_text_ends() -> None:
    assert tokenizer_key(["ab", "c"], 300) != tokenizer_key(["a", "bc"], 300)


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_tokenizer(TEXTS, vocab_size=256)
