"""Which outputs and inputs of its layer a group's rows and columns are.

A view says how a weight becomes matrices ``[G, M, B]``. What a layer has seen, inputs and output
gradients, is cut the same way: row m of group g is one of the layer's outputs, column b one of its
inputs, whatever the view (whole kernels, heads, fused pieces, convolution groups, tiles).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from hf_precond.views.tiles import Tiles
from hf_precond.views.view import ParamView


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLayout:
    """How a layer reads its weight.

    Attributes:
        transposed: ``[I, O]`` in place of ``[O, ...]``.
        groups: of a grouped convolution, whose weight ``[O, I/groups, ...]`` meets another part of
            the inputs in each group.
        bias: canonical name of the layer's bias that is trained together with the weight, or empty.
    """

    transposed: bool = False
    groups: int = 1
    bias: str = ""

    def to_plain(self) -> list[Any]:
        """Returns a list of plain values, fit for optimizer ``param_groups``."""
        return [int(self.transposed), self.groups, self.bias]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> WeightLayout:
        """Inverse of :meth:`to_plain`."""
        transposed, groups, bias = plain
        return cls(transposed=bool(transposed), groups=int(groups), bias=str(bias))

    def num_outputs(self, shape: Sequence[int]) -> int:
        """Number of outputs of a layer with a weight of this shape."""
        return int(shape[1] if self.transposed else shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Outputs ``[G, M]`` and inputs ``[G, B]`` of a view, as indices into those of the layer."""

    outputs: Tensor
    inputs: Tensor


def positions(
    view: ParamView | Tiles, layout: WeightLayout, shape: Sequence[int]
) -> Positions | None:
    """Returns where a view's rows and columns lie in the layer; None where rows and columns do
    not separate (a view that is not made for this layer).

    Args:
        shape: of the weight.
    """
    return _positions(view, layout, tuple(shape))


# Layers of a model are alike, and finding out takes numbers of the weight's size.
@lru_cache(maxsize=256)
def _positions(
    view: ParamView | Tiles, layout: WeightLayout, shape: tuple[int, ...]
) -> Positions | None:
    flat = torch.arange(prod(shape)).view(shape)
    inputs_per_output = prod(shape) // layout.num_outputs(shape)
    if layout.transposed:
        outputs, inputs = flat % shape[1], flat // shape[1]
    else:
        outputs, inputs = flat // inputs_per_output, flat % inputs_per_output
        per_group = shape[0] // layout.groups
        inputs = inputs + outputs // per_group * inputs_per_output
    rows, columns = view.to_blocks(outputs), view.to_blocks(inputs)
    found = Positions(outputs=rows[:, :, 0].clone(), inputs=columns[:, 0, :].clone())
    separate = bool((rows == rows[:, :, :1]).all() and (columns == columns[:, :1]).all())
    return found if separate else None
