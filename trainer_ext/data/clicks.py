"""Click-through data and a small model of it: a smoke test of optimizers on mostly embeddings."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from trainer_ext.data.corpus import read_rows
from trainer_ext.data.metrics import metric_info

LABEL = "Label"
NUM_COUNTS, NUM_CATEGORIES = 13, 26
COUNTS = tuple(f"I{index + 1}" for index in range(NUM_COUNTS))
CATEGORIES = tuple(f"C{index + 1}" for index in range(NUM_CATEGORIES))


class ClicksConfig(PretrainedConfig):
    """Sizes of a :class:`ClicksModel`.

    Args:
        num_buckets: rows of each category's embedding, into which its values are hashed.
        embedding_size: columns of the embeddings.
        hidden_sizes: widths of the fully connected layers.
    """

    model_type = "small_clicks"

    def __init__(
        self,
        num_buckets: int = 1000,
        embedding_size: int = 16,
        hidden_sizes: Sequence[int] = (128, 64),
        **kwargs: Any,
    ) -> None:
        self.num_buckets = num_buckets
        self.embedding_size = embedding_size
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(**kwargs)


class ClicksModel(PreTrainedModel):
    """Embeddings of hashed categories beside logarithms of counts, then fully connected layers.

    After DLRM (Naumov et al. 2019), without its products of embeddings.
    """

    config_class = ClicksConfig
    main_input_name = "categories"
    accepts_loss_kwargs = False

    def __init__(self, config: ClicksConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(NUM_CATEGORIES * config.num_buckets, config.embedding_size)
        widths = [NUM_COUNTS + NUM_CATEGORIES * config.embedding_size, *config.hidden_sizes, 1]
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise(widths))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self,
        categories: Tensor,
        counts: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Log-odds [N, 1] of a click and the mean cross-entropy.

        Args:
            categories: [N, 26], numbers from 0 on, hashed into the buckets here.
            counts: [N, 13], logarithms.
            labels: [N], 1 for a click.
            return_dict: False returns a tuple without what is None.
        """
        buckets = self.config.num_buckets
        first = torch.arange(NUM_CATEGORIES, device=categories.device) * buckets
        known = self.embedding(categories % buckets + first).flatten(1)
        hidden = torch.cat([counts, known], dim=1)
        *inner, last = self.layers
        for layer in inner:
            hidden = F.relu(layer(hidden))
        logits = last(hidden)
        loss = None
        if labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class ClicksDataset(Dataset):
    """Rows of Criteo's comma-separated files.

    Counts become log(1 + count), negative and missing ones 0; a category's value its CRC-32, the
    same in every process; a missing one is a value of its own.

    Raises:
        ValueError: a missing file or column, a label that is neither 0 nor 1, no row.
    """

    def __init__(self, path: str | Path) -> None:
        self._rows: list[dict[str, Any]] = []
        reader = csv.DictReader(read_rows(path))
        missing = {LABEL, *COUNTS, *CATEGORIES}.difference(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{str(path)!r} has no column {', '.join(sorted(missing))}")
        for number, row in enumerate(reader, start=2):
            if row[LABEL] not in ("0", "1"):
                raise ValueError(
                    f"line {number} of {str(path)!r}: {LABEL} = {row[LABEL]!r} must be 0 or 1"
                )
            try:
                counts = [max(0.0, float(row[name] or 0)) for name in COUNTS]
                categories = [zlib.crc32(row[name].encode()) for name in CATEGORIES]
            except (ValueError, AttributeError) as error:
                raise ValueError(
                    f"line {number} of {str(path)!r} has a missing cell or no number: {error}"
                ) from error
            self._rows.append(
                {
                    "counts": np.log1p(counts, dtype=np.float32),
                    "categories": categories,
                    "labels": int(row[LABEL]),
                }
            )
        if not self._rows:
            raise ValueError(f"{str(path)!r} holds no row")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


class AreaUnderCurve(evaluate.Metric):
    """Share of pairs of a click and none in which the click has the higher score; ties are half.

    >>> metric = AreaUnderCurve(keep_in_memory=True)
    >>> metric.add_batch(predictions=[0.1, 0.8, 0.4], references=[0, 1, 0])
    >>> metric.compute()["auc"]
    1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Area under the receiver operating characteristic from scores and labels.",
            "predictions: scores; references: 1 for a click.",
            predictions="float64",
            references="int64",
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        scores, clicks = np.asarray(predictions), np.asarray(references).astype(bool)
        _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
        mean_rank = np.cumsum(sizes) - (sizes - 1) / 2
        positive, negative = int(clicks.sum()), int((~clicks).sum())
        if not positive or not negative:
            return {"auc": float("nan")}
        above = mean_rank[group][clicks].sum() - positive * (positive + 1) / 2
        return {"auc": float(above / (positive * negative))}


def clicks_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`Trainer(compute_metrics=...)`."""
    metric = AreaUnderCurve(keep_in_memory=True)
    scores = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1)
    metric.add_batch(predictions=scores, references=np.asarray(prediction.label_ids))
    return metric.compute()


# `from_pretrained` of the Auto classes finds what the Trainer saved, once this module is imported.
AutoConfig.register(ClicksConfig.model_type, ClicksConfig, exist_ok=True)
AutoModelForSequenceClassification.register(ClicksConfig, ClicksModel, exist_ok=True)
