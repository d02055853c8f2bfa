"""Parallel text, small translation models, and BLEU that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import evaluate
import numpy as np
import sacrebleu
from torch.utils.data import Dataset
from transformers import EvalPrediction, MarianConfig, PreTrainedTokenizerBase

from trainer_ext.data.classification_metrics import ClassificationMetrics
from trainer_ext.data.corpus import read_rows
from trainer_ext.data.metrics import IGNORED_LABEL, metric_info

TRANSLATION_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "marian-tiny": {"d_model": 128, "layers": 2, "heads": 4, "ffn_dim": 256},
        "marian-small": {"d_model": 256, "layers": 3, "heads": 4, "ffn_dim": 1024},
        # The size usual for IWSLT14 German to English, on which paper 004 compares.
        "marian-iwslt": {"d_model": 512, "layers": 6, "heads": 4, "ffn_dim": 1024},
    }
)


def translation_preset_config(name: str) -> MarianConfig:
    """The configuration of a named preset; the vocabulary is the tokenizer's.

    Raises:
        ValueError: for a name that is not in `TRANSLATION_PRESETS`.
    """
    if name not in TRANSLATION_PRESETS:
        raise ValueError(f"preset={name!r} must be one of {', '.join(TRANSLATION_PRESETS)}")
    sizes = TRANSLATION_PRESETS[name]
    of_both = {
        f"{part}_{field}": sizes[key]
        for part in ("encoder", "decoder")
        for field, key in (
            ("layers", "layers"),
            ("attention_heads", "heads"),
            ("ffn_dim", "ffn_dim"),
        )
    }
    return MarianConfig(
        d_model=sizes["d_model"],
        **of_both,
        activation_function="relu",
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_position_embeddings=128,
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
    )


def read_parallel(source: str | Path, target: str | Path) -> list[tuple[str, str]]:
    """Pairs of lines of two files, plain or packed as .xz or .gz; empty pairs are left out.

    Raises:
        ValueError: a missing file, different numbers of lines, no pair.
    """
    pairs = []
    for number, (ours, theirs) in enumerate(zip_longest(read_rows(source), read_rows(target)), 1):
        if ours is None or theirs is None:
            short, long = (source, target) if ours is None else (target, source)
            raise ValueError(
                f"{str(short)!r} ends after {number - 1} lines, {str(long)!r} goes on: they are "
                "not translations of each other line by line"
            )
        if ours.strip() and theirs.strip():
            pairs.append((ours.strip(), theirs.strip()))
    if not pairs:
        raise ValueError(f"{str(source)!r} and {str(target)!r} hold no pair of sentences")
    return pairs


class ParallelDataset(Dataset):
    """Pairs as token ids of the source and labels of the target, each with its end.

    Sentences are cut to ``max_length`` tokens, the end included.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> None:
        self._sources, self._targets = (
            _with_end(texts, tokenizer, max_length) for texts in zip(*pairs, strict=True)
        )

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        source = self._sources[index]
        return {
            "input_ids": source,
            "attention_mask": [1] * len(source),
            "labels": self._targets[index],
        }


def _with_end(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[int]]:
    rows = tokenizer(list(texts), truncation=True, max_length=max_length - 1)["input_ids"]
    return [[*row, tokenizer.eos_token_id] for row in rows]


class Bleu(evaluate.Metric):
    """Corpus BLEU (Papineni et al. 2002) as sacreBLEU counts it, in percent.

    >>> metric = Bleu(keep_in_memory=True)
    >>> metric.add_batch(predictions=["a dog runs fast"], references=["a dog runs fast"])
    >>> round(metric.compute()["bleu"], 6)
    100.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Corpus BLEU from translations and their references.",
            "predictions, references: a translation and its one reference.",
            predictions="string",
            references="string",
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"bleu": sacrebleu.corpus_bleu(list(predictions), [list(references)]).score}


class TranslationMetrics:
    """`Trainer(compute_metrics=...)`: BLEU of generated tokens, else accuracy of predicted ones.

    Args:
        generated: predictions are whole translations (``predict_with_generate``).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, generated: bool) -> None:
        self._tokenizer, self._generated = tokenizer, generated
        self._accuracy = ClassificationMetrics()
        self._bleu = Bleu(keep_in_memory=True)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        if not self._generated:
            return self._accuracy(prediction, compute_result)
        self._bleu.add_batch(
            predictions=self._texts(prediction.predictions),
            references=self._texts(prediction.label_ids),
        )
        return self._bleu.compute() if compute_result else {}

    def _texts(self, ids: Any) -> list[str]:
        pad = self._tokenizer.pad_token_id
        known = np.where(np.asarray(ids) == IGNORED_LABEL, pad, np.asarray(ids))
        return self._tokenizer.batch_decode(known, skip_special_tokens=True)
