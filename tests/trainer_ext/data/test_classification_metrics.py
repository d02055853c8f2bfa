"""Accuracy, against the literal share."""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import EvalPrediction

from trainer_ext.data.classification_metrics import (
    Accuracy,
    ClassificationMetrics,
    predicted_classes,
)


def test_predicted_classes_are_the_most_likely_ones() -> None:
    logits = torch.tensor([[0.1, 3.0, -1.0], [2.0, 1.0, 0.0]])
    assert predicted_classes(logits, torch.zeros(2)).tolist() == [1, 0]
    assert predicted_classes((logits, torch.zeros(1)), torch.zeros(2)).tolist() == [1, 0]


def test_accuracy_is_the_share_over_all_batches() -> None:
    metric = Accuracy(keep_in_memory=True)
    metric.add_batch(predictions=[1, 2, 3], references=[1, 2, 0])
    metric.add_batch(predictions=[4], references=[0])
    assert metric.compute() == {"accuracy": 0.5}


def test_metrics_of_batches_equal_metrics_of_the_whole(generator: torch.Generator) -> None:
    predicted, labels = torch.randint(3, (2, 50), generator=generator)
    whole = ClassificationMetrics()(
        EvalPrediction(predictions=predicted.numpy(), label_ids=labels.numpy())
    )
    in_batches = ClassificationMetrics()
    first = EvalPrediction(predictions=predicted[:20], label_ids=labels[:20])
    last = EvalPrediction(predictions=predicted[20:], label_ids=labels[20:])
    assert in_batches(first, compute_result=False) == {}
    assert in_batches(last, compute_result=True) == whole
    assert whole["accuracy"] == sum(p == q for p, q in zip(predicted, labels, strict=True)) / 50


def test_metrics_start_afresh_after_each_result() -> None:
    metrics = ClassificationMetrics()
    right = EvalPrediction(predictions=np.array([1, 2]), label_ids=np.array([1, 2]))
    wrong = EvalPrediction(predictions=np.array([1, 2]), label_ids=np.array([2, 1]))
    assert metrics(right) == {"accuracy": 1.0}
    assert metrics(wrong) == {"accuracy": 0.0}


def test_nothing_has_no_accuracy() -> None:
    assert math.isnan(Accuracy(keep_in_memory=True)._compute([], [])["accuracy"])
