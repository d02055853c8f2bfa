"""A bounded sample of rows, the same however the batch is cut into micro-batches.

Each row of the whole batch draws a number; the rows with the smallest are kept. The numbers come
from one seeded sequence in the order of the batch, so that two micro-batches keep what one batch of
twice the size would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.statistics.captured import with_length

_PADDED = 2.0  # after every drawn number in [0, 1)


class Reservoir:
    """Rows of several tensors, drawn without replacement.

    Args:
        seed: of the draw.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._keys: Tensor | None = None
        self._rows: list[Tensor] = []
        self.seen = 0

    def add(self, rows: list[Tensor], size: int | None, valid: Tensor | None = None) -> None:
        """Takes tensors with equal numbers of rows, and keeps at most ``size`` rows of all.

        Args:
            valid: which of the rows count; the others come last.
        """
        count = rows[0].shape[0]
        self.seen += count
        if size is not None:
            keys = torch.rand(count, generator=self._generator, dtype=torch.float64)
            keys = keys.to(rows[0].device)
            if valid is not None:
                keys = keys.masked_fill(~valid, _PADDED)
            self._keys = keys if self._keys is None else torch.cat([self._keys, keys])
        if self._rows:
            rows = [torch.cat(pair) for pair in zip(self._rows, rows, strict=True)]
        self._rows = rows
        if size is not None and self._rows[0].shape[0] > size:
            assert self._keys is not None
            # In the order of the batch: sums do not depend on the draw where all are kept.
            kept = self._keys.topk(size, largest=False).indices.sort().values
            self._keys = self._keys[kept]
            self._rows = [tensor[kept] for tensor in self._rows]

    def pad(self, length: int) -> None:
        """Brings dimension 1 of all tensors to a length, with zeros."""
        self._rows = [with_length(tensor, length) for tensor in self._rows]

    @property
    def rows(self) -> list[Tensor]:
        """What has been kept."""
        return self._rows
