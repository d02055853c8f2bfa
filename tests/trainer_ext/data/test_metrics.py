"""Perplexity and token accuracy, against the literal formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from trainer_ext.data.metrics import (
    LanguageModelMetrics,
    Perplexity,
    TokenAccuracy,
    perplexity,
    sequence_statistics,
)


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [3, 7, 11] and labels [3, 7] with ignored tokens."""
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(11, (3, 7), generator=generator)
    labels[0, 4:] = -100
    return logits, labels


def _literal(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int, int]:
    """Sum of nats, tokens and hits by a loop over all positions."""
    nll, tokens, hits = 0.0, 0, 0
    for row, target in zip(logits, labels, strict=True):
        for position in range(len(target) - 1):
            label = int(target[position + 1])
            if label == -100:
                continue
            nll -= float(row[position].log_softmax(-1)[label])
            tokens += 1
            hits += int(row[position].argmax()) == label
    return nll, tokens, hits


def test_sequence_statistics_equal_the_literal_sums(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    statistics = sequence_statistics(*batch)
    assert statistics.shape == (3, 3)
    nll, tokens, hits = statistics.sum(dim=0).tolist()
    expected = _literal(*batch)
    assert nll == pytest.approx(expected[0], rel=1e-5)
    assert (tokens, hits) == expected[1:]


def test_further_model_outputs_are_ignored(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    with_extras = sequence_statistics((logits, torch.zeros(1)), labels)
    assert torch.equal(with_extras, sequence_statistics(logits, labels))


def test_perplexity_is_weighted_by_tokens_over_batches() -> None:
    metric = Perplexity(keep_in_memory=True)
    metric.add_batch(nll=[6.0, 1.0], tokens=[3, 1])
    metric.add_batch(nll=[5.0], tokens=[2])
    assert metric.compute()["perplexity"] == pytest.approx(math.exp(12 / 6))


def test_token_accuracy_is_weighted_by_tokens() -> None:
    metric = TokenAccuracy(keep_in_memory=True)
    metric.add_batch(correct=[1, 9], tokens=[1, 19])
    assert metric.compute()["accuracy"] == pytest.approx(0.5)


def test_metrics_of_batches_equal_metrics_of_the_whole(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    statistics = sequence_statistics(*batch).numpy()

    def prediction(rows: np.ndarray) -> EvalPrediction:
        return EvalPrediction(predictions=rows, label_ids=None)

    whole = LanguageModelMetrics()(prediction(statistics))
    in_batches = LanguageModelMetrics()
    assert in_batches(prediction(statistics[:2]), compute_result=False) == {}
    assert in_batches(prediction(statistics[2:]), compute_result=True) == pytest.approx(whole)
    nll, tokens, hits = _literal(*batch)
    assert whole["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert whole["accuracy"] == pytest.approx(hits / tokens)


def test_metrics_start_afresh_after_each_result() -> None:
    metrics = LanguageModelMetrics()
    first = metrics(EvalPrediction(predictions=np.array([[2.0, 1.0, 0.0]]), label_ids=None))
    second = metrics(EvalPrediction(predictions=np.array([[1.0, 1.0, 1.0]]), label_ids=None))
    assert first["perplexity"] == pytest.approx(math.e**2)
    assert second == pytest.approx({"perplexity": math.e, "accuracy": 1.0})


def test_overflow_is_infinite_perplexity() -> None:
    assert perplexity(1e5) == math.inf
    assert math.isnan(perplexity(math.nan))
