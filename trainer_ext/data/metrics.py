"""Perplexity and token accuracy from per-sequence sums, as offline `evaluate` metrics.

The sums are formed on the device, batch by batch, so the logits [N, T, V] of a whole evaluation
set are never kept.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction

IGNORED_LABEL = -100


def sequence_statistics(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Per-sequence sums for next-token prediction, as [N, 3].

    Columns: summed negative log-likelihood in nats, number of predicted tokens, number of them
    whose most likely token is the right one. Fits `Trainer(preprocess_logits_for_metrics=...)`.

    Args:
        logits: [N, T, V], or a tuple that starts with them.
        labels: [N, T], not shifted; -100 marks tokens that do not count.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    predicted, target = logits[:, :-1].float(), labels[:, 1:]
    counts = target.ne(IGNORED_LABEL)
    # Flat, so that the softmax runs over contiguous memory: half the time of [N, V, T].
    nll = F.cross_entropy(
        predicted.flatten(0, 1), target.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    ).view_as(target)
    correct = predicted.argmax(dim=-1).eq(target) & counts
    sums = [nll.sum(dim=1), counts.sum(dim=1).float(), correct.sum(dim=1).float()]
    return torch.stack(sums, dim=1)


def metric_info(description: str, inputs: str, **columns: str) -> evaluate.MetricInfo:
    """What `evaluate` wants to know of a metric.

    Args:
        inputs: the columns in words.
        columns: name -> dtype.
    """
    features = {name: datasets.Value(dtype) for name, dtype in columns.items()}
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=inputs,
        features=datasets.Features(features),
    )


class Perplexity(evaluate.Metric):
    """exp(total negative log-likelihood / total tokens), over all sequences added so far.

    Weighted by tokens, so batches and sequences may differ in length.

    >>> metric = Perplexity(keep_in_memory=True)
    >>> metric.add_batch(nll=[2.0, 0.0], tokens=[1, 1])
    >>> round(metric.compute()["perplexity"], 6)
    2.718282
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Perplexity from summed negative log-likelihoods and token counts.",
            "nll: summed nats per sequence; tokens: predicted tokens in it.",
            nll="float64",
            tokens="int64",
        )

    def _compute(self, nll: Any, tokens: Any) -> dict[str, float]:
        return {"perplexity": perplexity(_ratio(nll, tokens))}


class TokenAccuracy(evaluate.Metric):
    """Share of predicted tokens whose most likely token is the right one.

    >>> metric = TokenAccuracy(keep_in_memory=True)
    >>> metric.add_batch(correct=[1, 2], tokens=[2, 4])
    >>> metric.compute()["accuracy"]
    0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Token accuracy from counts of right and of all predicted tokens.",
            "correct, tokens: right and all predicted tokens of a sequence.",
            correct="int64",
            tokens="int64",
        )

    def _compute(self, correct: Any, tokens: Any) -> dict[str, float]:
        return {"accuracy": _ratio(correct, tokens)}


class LanguageModelMetrics:
    """`Trainer(compute_metrics=...)` over the output of `sequence_statistics`.

    Accumulates, so it serves `batch_eval_metrics` as well as one call over the whole set.
    """

    def __init__(self) -> None:
        # In memory: the file form of `evaluate` locks a cache file that all ranks would share.
        self.perplexity = Perplexity(keep_in_memory=True)
        self.accuracy = TokenAccuracy(keep_in_memory=True)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        nll, tokens, correct = np.asarray(prediction.predictions, dtype=np.float64).T
        self.perplexity.add_batch(nll=nll, tokens=tokens.astype(np.int64))
        self.accuracy.add_batch(correct=correct.astype(np.int64), tokens=tokens.astype(np.int64))
        if not compute_result:
            return {}
        return {**self.perplexity.compute(), **self.accuracy.compute()}


def perplexity(mean_nll: float) -> float:
    """exp(mean negative log-likelihood in nats), infinite where that overflows.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def _ratio(numerator: Any, denominator: Any) -> float:
    total = float(np.sum(denominator))
    return float(np.sum(numerator)) / total if total else math.nan
