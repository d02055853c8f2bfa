"""Parallel text and BLEU."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
from transformers import EvalPrediction

from trainer_ext.data.tokenizer import train_tokenizer
from trainer_ext.data.translation import (
    Bleu,
    ParallelDataset,
    TranslationMetrics,
    read_parallel,
    translation_preset_config,
)

PAIRS = [("ein Hund rennt", "a dog runs"), ("zwei Hunde", "two dogs")]


def write(folder: Path, source: str, target: str) -> tuple[Path, Path]:
    (folder / "a.de").write_text(source)
    with gzip.open(folder / "a.en.gz", "wt") as stream:
        stream.write(target)
    return folder / "a.de", folder / "a.en.gz"


def test_lines_are_paired_and_empty_ones_left_out(tmp_path: Path) -> None:
    files = write(tmp_path, "ein Hund rennt\n\nzwei Hunde\nnichts", "a dog runs\nx\ntwo dogs\n\n")
    assert read_parallel(*files) == PAIRS


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a\nb\n", "a\n", "a.en.gz' ends after 1 lines, .*a.de' goes on"),
        ("a\n", "a\nb\nc\n", "a.de' ends after 1 lines"),
        ("\n", "\n", "hold no pair"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, source: str, target: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_parallel(*write(tmp_path, source, target))


def test_sentences_end_and_are_cut() -> None:
    tokenizer = train_tokenizer((text for pair in PAIRS for text in pair), vocab_size=270)
    rows = ParallelDataset(PAIRS, tokenizer, max_length=5)
    first = rows[0]
    assert len(first["input_ids"]) == len(first["attention_mask"]) == 5
    assert first["input_ids"][-1] == first["labels"][-1] == tokenizer.eos_token_id
    whole = ParallelDataset(PAIRS, tokenizer, max_length=100)[1]
    assert tokenizer.decode(whole["labels"], skip_special_tokens=True) == "two dogs"
    assert tokenizer.decode(whole["input_ids"], skip_special_tokens=True) == "zwei Hunde"


def bleu(predictions: list[str], references: list[str]) -> float:
    metric = Bleu(keep_in_memory=True)
    metric.add_batch(predictions=predictions, references=references)
    return metric.compute()["bleu"]


def test_bleu_is_papineni_s() -> None:
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples are in the reference; the
    # translation is 6 words long, the reference 7.
    score = bleu(["the cat sat on a mat"], ["the cat sat on the mat now"])
    precisions = [5 / 6, 3 / 5, 2 / 4, 1 / 3]
    expected = math.exp(1 - 7 / 6) * math.prod(precisions) ** 0.25
    assert score == pytest.approx(100 * expected)
    assert bleu(["no such thing at all"], ["the cat sat on the mat"]) < 10


def test_bleu_is_of_the_corpus_not_a_mean() -> None:
    texts = ["the cat sat on a mat", "two dogs run in the park today"]
    references = ["the cat sat on the mat now", "two dogs run in the park today"]
    together = bleu(texts, references)
    apart = [bleu([text], [reference]) for text, reference in zip(texts, references, strict=True)]
    assert min(apart) < together < max(apart)
    assert together != pytest.approx(sum(apart) / 2, rel=1e-3)


def test_generated_tokens_are_decoded_without_padding() -> None:
    tokenizer = train_tokenizer((text for pair in PAIRS for text in pair), vocab_size=300)
    ids = tokenizer("a dog runs now")["input_ids"]
    labels = np.array([[*ids, tokenizer.eos_token_id, -100, -100]])
    metrics = TranslationMetrics(tokenizer, generated=True)
    guess = np.array([[tokenizer.eos_token_id, *ids, tokenizer.eos_token_id, -100]])
    assert metrics(EvalPrediction(predictions=guess, label_ids=labels))["bleu"] == pytest.approx(
        100
    )


def test_predicted_tokens_have_an_accuracy() -> None:
    tokenizer = train_tokenizer(["a"], vocab_size=257)
    metrics = TranslationMetrics(tokenizer, generated=False)
    prediction = EvalPrediction(
        predictions=np.array([[1, 2, 3, 4]]), label_ids=np.array([[1, 2, 5, -100]])
    )
    assert metrics(prediction)["accuracy"] == pytest.approx(2 / 3)


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="preset='large' must be one of marian-tiny"):
        translation_preset_config("large")
