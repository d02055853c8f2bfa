"""Norms of large tensors.

On CPUs torch takes the norm of a whole tensor with one accumulator a thread, at half the speed of
memory; that of many rows goes at its full speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROW = 64


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the Euclidean norm of each tensor, a scalar of its dtype."""
    parts = [torch.linalg.vector_norm(x, dim=-1) if _by_rows(x) else x for x in tensors]
    return list(torch._foreach_norm(parts)) if parts else []


def group_squares(x_GMB: Tensor) -> Tensor:
    """Returns the sum of squares of each group, ``[G]``."""
    if _by_rows(x_GMB):
        return torch.linalg.vector_norm(x_GMB, dim=-1).square_().sum(-1)
    return torch.linalg.vector_norm(x_GMB, dim=(-2, -1)).square()


def _by_rows(x: Tensor) -> bool:
    """Whether rows are faster: they have to be long, of numbers that are counted with as they are,
    and lie without gaps."""
    return (
        x.device.type == "cpu"
        and x.ndim > 1
        and x.shape[-1] >= _ROW
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous()
    )
