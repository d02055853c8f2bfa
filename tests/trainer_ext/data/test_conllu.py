"""Treebank files, and the words and tags that a tagger knows."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from trainer_ext.data.conllu import (
    TaggedDataset,
    TaggedSentence,
    by_frequency,
    read_conllu,
    word_tokenizer,
)


def line(number: str, word: str, upos: str = "NOUN", xpos: str = "NN") -> str:
    return "\t".join([number, word, "_", upos, xpos, *"_____"])


TREEBANK = "\n".join(
    [
        "# sent_id = 1",
        line("1-2", "vámonos", "_", "_"),
        line("1", "vamos", "VERB", "V"),
        line("2", "nos", "PRON", "P"),
        line("2.1", "left", "VERB", "V"),
        line("3", "al mar", "NOUN", "N"),
        "",
        "",
        "# sent_id = 2",
        line("1", "vamos", "VERB", "V"),
    ]
)
SENTENCES = [
    TaggedSentence(("vamos", "nos", "al mar"), ("V", "P", "N")),
    TaggedSentence(("vamos",), ("V",)),
]


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_words_of_the_text_are_read(tmp_path: Path, end: str) -> None:
    path = tmp_path / "some.conllu"
    path.write_text(TREEBANK + end)
    assert read_conllu(path) == SENTENCES
    assert read_conllu(path, tags="upos")[1].tags == ("VERB",)


def test_packed_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "some.conllu.xz"
    path.write_bytes(lzma.compress(TREEBANK.encode()))
    assert read_conllu(path) == SENTENCES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{TREEBANK}\n2 nos", "line 11 of .* must have 10 columns between tabs, it has 1"),
        (line("1", "word", xpos="_"), "line 1 of .*: word 'word' has no xpos tag"),
        ("# only a comment\n", "holds no sentence"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "some.conllu"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_conllu(path)


def test_rare_words_are_unknown() -> None:
    assert by_frequency(["b", "a", "b", "a", "c"], min_count=2)[3:] == ["a", "b"]


def test_ids_and_labels_have_the_root_in_front() -> None:
    words = by_frequency(["vamos", "vamos", "al mar"])
    tokenizer = word_tokenizer(words, max_length=4)
    rows = TaggedDataset(SENTENCES, tokenizer, ["<p>", "<u>", "<r>", "V", "N"])
    # "nos" and its tag are unknown; "al mar" is one word.
    assert rows[0]["input_ids"] == [2, 3, 1, 4]
    assert rows[0]["labels"] == [2, 3, 1, 4]
    assert rows[1]["input_ids"] == [2, 3]
    assert rows[1]["labels"] == [2, 3]


def test_long_sentences_are_cut() -> None:
    tokenizer = word_tokenizer(by_frequency(["vamos"]), max_length=2)
    rows = TaggedDataset(SENTENCES, tokenizer, ["<p>", "<u>", "<r>", "V"])
    assert rows[0]["input_ids"] == [2, 3]
    assert rows[0]["labels"] == [2, 3]
