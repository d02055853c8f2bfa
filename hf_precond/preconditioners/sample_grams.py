"""Sums and inner products of per-sample gradients that are never formed.

The gradient of a sample is the product of its output gradients and inputs, O_i^T I_i over the
positions of the sample; its Gram matrices and inner products need the small matrices O O^T and
I I^T between positions alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_of_grams(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Returns sum_i G_i G_i^T ``[G, M, M]`` for G_i = O_i^T I_i = sum_i O_i^T (I_i I_i^T) O_i.

    Args:
        outputs: ``[G, N, S, M]``.
        inputs: ``[G, N, S, B]``.
    """
    weighted = (inputs @ inputs.mT) @ outputs
    return outputs.flatten(1, 2).mT @ weighted.flatten(1, 2)


def inner_products(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Returns <o_s i_s^T, o_t i_t^T> ``[G, n, n]`` between all positions.

    Args:
        outputs: ``[G, n, M]``.
        inputs: ``[G, n, B]``.
    """
    return (outputs @ outputs.mT) * (inputs @ inputs.mT)


def drawn_without_replacement(
    count: int, sample: int | None, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Returns ``sample`` of ``count`` indices in the order of their draw; all of them for None."""
    drawn = torch.randperm(count, generator=generator)
    return drawn[: count if sample is None else sample].to(device)
