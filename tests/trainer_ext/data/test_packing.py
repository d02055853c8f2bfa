"""Packing loses no token inside a batch and keeps the order, streamed or not."""

from __future__ import annotations

from itertools import chain

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from trainer_ext.data.packing import collate_blocks, cut_into_blocks, pack
from trainer_ext.data.tokenizer import train_tokenizer

TEXTS = ["one two three\n", "", "four\n", "five six seven eight nine ten\n"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, vocab_size=270)


def _dataset(streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    return dataset.to_iterable_dataset() if streaming else dataset


def test_lines_are_joined_without_separator(tokenizer: PreTrainedTokenizerBase) -> None:
    blocks = pack(_dataset(), tokenizer, block_size=5, rows_are_documents=False)
    tokens = list(chain.from_iterable(blocks["input_ids"]))
    expected = list(chain.from_iterable(tokenizer(text)["input_ids"] for text in TEXTS))
    assert tokens == expected[: len(expected) // 5 * 5]
    assert {len(block) for block in blocks["input_ids"]} == {5}


def test_documents_are_closed_by_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    blocks = pack(_dataset(), tokenizer, block_size=3, rows_are_documents=True)
    tokens = list(chain.from_iterable(blocks["input_ids"]))
    text = "".join(text + tokenizer.eos_token for text in TEXTS)
    assert text.startswith(tokenizer.decode(tokens))
    assert tokens.count(tokenizer.eos_token_id) >= len(TEXTS) - 1


def test_streamed_blocks_equal_map_style_blocks(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = pack(_dataset(), tokenizer, block_size=4, rows_are_documents=True)
    streamed = pack(_dataset(streaming=True), tokenizer, block_size=4, rows_are_documents=True)
    assert [row["input_ids"] for row in streamed] == plain["input_ids"][:]


def test_incomplete_tail_is_dropped() -> None:
    assert cut_into_blocks([1, 2, 3], 4) == []
    assert cut_into_blocks([1, 2, 3, 4], 4) == [[1, 2, 3, 4]]


def test_collator_copies_labels() -> None:
    batch = collate_blocks([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 2], [3, 4]]))
    assert torch.equal(batch["labels"], batch["input_ids"])
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1


def test_one_token_blocks_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="block_size=1 must be at least 2"):
        pack(_dataset(), tokenizer, block_size=1, rows_are_documents=False)


def test_documents_need_an_end_of_text_token() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=270)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        pack(_dataset(), tokenizer, block_size=4, rows_are_documents=True)
