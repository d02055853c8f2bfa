"""Byte-level BPE tokenizers trained on the corpus and kept on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from huggingface_hub.constants import HF_HOME
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
"""256 bytes and the end-of-text token."""


def load_or_train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, cache_dir: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer trained on `texts`, from the cache when these texts were seen before.

    The cache key is the content, not the file names, so an edited corpus is trained anew.

    Args:
        cache_dir: folder of cached tokenizers; None is a folder in the Hugging Face home.
    """
    texts = list(texts)
    folder = _cache_folder(cache_dir) / tokenizer_key(texts, vocab_size)
    if not folder.is_dir():
        _save_atomically(train_tokenizer(texts, vocab_size=vocab_size), folder)
    return AutoTokenizer.from_pretrained(folder)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE: every text is representable and decodes to itself.

    Raises:
        ValueError: `vocab_size` below the 256 bytes and the end-of-text token.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_key(texts: Sequence[str], vocab_size: int) -> str:
    """Hash of all that decides the trained tokenizer: texts, size and library version."""
    digest = hashlib.sha256(f"bpe {vocab_size} {tokenizers.__version__}".encode())
    for text in texts:
        encoded = text.encode("utf-8", errors="surrogatepass")
        # The length keeps ["ab", "c"] and ["a", "bc"] apart.
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()[:24]


def _cache_folder(cache_dir: str | Path | None) -> Path:
    return Path(HF_HOME) / "hf_precond" / "tokenizers" if cache_dir is None else Path(cache_dir)


def _save_atomically(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves to a temporary neighbour and renames: a reader never sees half a tokenizer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=folder.parent, prefix=".writing-")
    tokenizer.save_pretrained(temporary)
    try:
        os.rename(temporary, folder)
    except OSError:
        # Another process finished the same tokenizer first; the two are equal.
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise
