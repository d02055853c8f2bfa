"""A weight's view with the layer's bias as one more column.

A bias is a weight whose input is always one. Methods that know a layer's inputs treat both
together: ``[G, M, B]`` and the bias make ``[G, M, B + 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.views.view import ParamView


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Joint:
    """A view ``[G, M, B]`` of a weight and a bias, read as ``[G, M, B + 1]``.

    Attributes:
        base: the weight's view.
        outputs: ``[G, M]``, the entry of the bias that belongs to each row.
    """

    base: ParamView
    outputs: Tensor

    @property
    def name(self) -> str:
        """Name of the weight's view."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, M, B + 1)."""
        groups, rows, columns = self.base.shape
        return groups, rows, columns + 1

    @property
    def numel(self) -> int:
        """Number of elements of weight and bias together."""
        groups, rows, columns = self.shape
        return groups * rows * columns

    @property
    def tiles_per_group(self) -> int:
        """One: not cut into tiles."""
        return 1

    def to_blocks(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Returns ``[G, M, B + 1]``, a copy."""
        column = bias[self._outputs(bias)].unsqueeze(-1)
        return torch.cat([self.base.to_blocks(weight), column.to(weight.dtype)], -1)

    def add_from_blocks(
        self, weight: Tensor, bias: Tensor, blocks: Tensor, alphas: tuple[float | Tensor, ...]
    ) -> None:
        """Adds ``blocks`` times the first factor to the weight, times the second to the bias."""
        self.base.add_from_blocks(weight, blocks[..., :-1], alphas[0])
        step = blocks[..., -1].flatten() * alphas[1]
        rows = self._outputs(bias).flatten()
        # Rounded once, also where the bias has fewer bits than the blocks.
        bias.index_copy_(0, rows, (bias[rows] + step).to(bias.dtype))

    def _outputs(self, bias: Tensor) -> Tensor:
        return self.outputs.to(bias.device, non_blocking=True)
