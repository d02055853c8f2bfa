"""Sentences of Universal Dependencies treebanks, and the words and tags that a tagger knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from trainer_ext.data.corpus import read_rows

PAD, UNKNOWN, ROOT = SPECIAL = ("<p>", "<u>", "<r>")
"""Padding, words or tags that training has not seen, the token in front of every sentence."""
TAG_COLUMNS = {"upos": 3, "xpos": 4}
_COLUMNS = 10


@dataclass(frozen=True, slots=True)
class TaggedSentence:
    """Words of a sentence and the tag of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_conllu(path: str | Path, *, tags: str = "xpos") -> list[TaggedSentence]:
    """The sentences of a CoNLL-U file, plain or packed as .xz or .gz.

    Ranges of several words (``1-2``) and words that are not in the text (``1.1``) are left out.

    Args:
        tags: ``xpos`` (of the language) or ``upos`` (of all languages).

    Raises:
        ValueError: no such file, a line that has not ten columns, a word without tag, no sentence.
    """
    column = TAG_COLUMNS[tags]
    sentences: list[TaggedSentence] = []
    found: list[tuple[str, str]] = []
    for number, line in enumerate([*read_rows(path), ""], start=1):
        content = line.rstrip("\r\n")
        if not content:
            if found:
                sentences.append(TaggedSentence(*zip(*found, strict=True)))
            found = []
            continue
        if content.startswith("#"):
            continue
        cells = content.split("\t")
        if len(cells) != _COLUMNS:
            raise ValueError(
                f"line {number} of {str(path)!r} must have {_COLUMNS} columns between tabs, it has "
                f"{len(cells)}"
            )
        if not cells[0].isdecimal():
            continue
        if cells[column] == "_":
            raise ValueError(f"line {number} of {str(path)!r}: word {cells[1]!r} has no {tags} tag")
        found.append((cells[1], cells[column]))
    if not sentences:
        raise ValueError(f"{str(path)!r} holds no sentence")
    return sentences


def by_frequency(items: Iterable[str], *, min_count: int = 1) -> list[str]:
    """The special tokens and then all items, the most frequent first, equal ones by alphabet.

    >>> by_frequency(["b", "c", "b", "a"])
    ['<p>', '<u>', '<r>', 'b', 'a', 'c']
    """
    counts = Counter(items)
    known = sorted(
        (item for item, count in counts.items() if count >= min_count and item not in SPECIAL),
        key=lambda item: (-counts[item], item),
    )
    return [*SPECIAL, *known]


def word_tokenizer(words: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of sentences that are words already, with the root token in front.

    Args:
        words: by token id, the special ones first.
    """
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, UNKNOWN))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{ROOT} $A", special_tokens=[(ROOT, words.index(ROOT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=ROOT,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


class TaggedDataset(Dataset):
    """Sentences as token ids, and as labels the ids of their tags, the root's own in front.

    A tag that is not known has the label of ``<u>``, which no training sentence has: it counts as
    wrong. Sentences are cut to the tokenizer's length.
    """

    def __init__(
        self,
        sentences: Sequence[TaggedSentence],
        tokenizer: PreTrainedTokenizerFast,
        tags: Sequence[str],
    ) -> None:
        ids = {tag: index for index, tag in enumerate(tags)}
        length = tokenizer.model_max_length
        self._rows: list[dict[str, Any]] = []
        for sentence in sentences:
            encoded = tokenizer(
                list(sentence.words), is_split_into_words=True, truncation=True, max_length=length
            )
            labels = [ids[tag] if tag in ids else ids[UNKNOWN] for tag in (ROOT, *sentence.tags)]
            self._rows.append({**encoded, "labels": labels[:length]})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]
