"""Packing: text rows are tokenised, joined and cut into blocks of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer_ext.data.corpus import TextDataset

ROWS_PER_BATCH = 1000
"""Rows joined at a time; the tail of each batch that fills no block is dropped."""


def pack(
    dataset: TextDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    rows_are_documents: bool,
    num_proc: int | None = None,
) -> TextDataset:
    """Maps a `text` dataset to `input_ids` blocks of `block_size` tokens, in order.

    Works on map-style and on streamed datasets; a streamed one is packed as it is read.

    Args:
        rows_are_documents: close each row with the end-of-text token.
        num_proc: worker processes, for map-style datasets only.

    Raises:
        ValueError: fewer than 2 tokens a block (nothing to predict), or a tokenizer that has no
            end-of-text token where documents need one.
    """
    if block_size < 2:
        raise ValueError(f"block_size={block_size} must be at least 2")
    if rows_are_documents and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which packing puts between documents")
    options = {} if isinstance(dataset, datasets.IterableDataset) else _map_options(num_proc)
    return dataset.map(
        pack_batch,
        batched=True,
        batch_size=ROWS_PER_BATCH,
        remove_columns=["text"],
        fn_kwargs={
            "tokenizer": tokenizer,
            "block_size": block_size,
            "separator": [tokenizer.eos_token_id] if rows_are_documents else [],
        },
        **options,
    )


def pack_batch(
    rows: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    separator: Sequence[int],
) -> dict[str, list[list[int]]]:
    """Tokenises `rows["text"]`, puts `separator` after each row, cuts the whole into blocks."""
    encoded = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
    tokens = list(chain.from_iterable(chain(ids, separator) for ids in encoded))
    return {"input_ids": cut_into_blocks(tokens, block_size)}


def cut_into_blocks(tokens: Sequence[int], block_size: int) -> list[list[int]]:
    """Consecutive full blocks; the incomplete tail is dropped.

    >>> cut_into_blocks([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4]]
    """
    full = len(tokens) - len(tokens) % block_size
    return [list(tokens[start : start + block_size]) for start in range(0, full, block_size)]


def collate_blocks(examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Stacks N blocks of T tokens to `input_ids` and `labels` [N, T]; the model does the shift."""
    input_ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def _map_options(num_proc: int | None) -> dict[str, object]:
    return {"num_proc": num_proc, "desc": "Tokenise and pack"}
