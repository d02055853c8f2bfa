"""Accuracy of a classifier of images or tokens, as an `evaluate.Metric` that needs no network."""

from __future__ import annotations

import math
from typing import Any

import evaluate
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from trainer_ext.data.metrics import IGNORED_LABEL, metric_info


def predicted_classes(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The most likely class of each example, [N], or token, [N, T]; labels are not looked at.

    Fits `Trainer(preprocess_logits_for_metrics=...)`, so that the logits of a whole evaluation set
    are never kept.

    Args:
        logits: [N, K] or [N, T, K], or a tuple that starts with them.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)


class Accuracy(evaluate.Metric):
    """Share of the examples whose predicted class is the right one.

    >>> metric = Accuracy(keep_in_memory=True)
    >>> metric.add_batch(predictions=[1, 2, 0, 0], references=[1, 2, 0, 3])
    >>> metric.compute()["accuracy"]
    0.75
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Accuracy from predicted and right classes.",
            "predictions, references: predicted and right class of an example.",
            predictions="int64",
            references="int64",
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right = np.equal(predictions, references)
        return {"accuracy": float(right.mean()) if right.size else math.nan}


class ClassificationMetrics:
    """`Trainer(compute_metrics=...)` over the output of `predicted_classes`.

    Of images or of tokens; a label of -100 does not count. Accumulates, so it serves
    `batch_eval_metrics` as well as one call over the whole set.
    """

    def __init__(self) -> None:
        # In memory: the file form of `evaluate` locks a cache file that all ranks would share.
        self.accuracy = Accuracy(keep_in_memory=True)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        labels = _as_integers(prediction.label_ids)
        counts = labels != IGNORED_LABEL
        self.accuracy.add_batch(
            predictions=_as_integers(prediction.predictions)[counts], references=labels[counts]
        )
        return self.accuracy.compute() if compute_result else {}


def _as_integers(values: Any) -> np.ndarray:
    # With batch_eval_metrics the Trainer hands over tensors, still on the accelerator.
    return torch.as_tensor(values).cpu().numpy().astype(np.int64)
