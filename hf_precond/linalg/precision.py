"""Matrix-product precision for statistics and matrix functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def highest_matmul_precision() -> Iterator[None]:
    """Runs float32 matrix products in full float32 and restores the user's setting afterwards.

    TF32 and bf16 products keep 8 to 11 bits, too few to carry a spectrum over many decades: a
    statistic damaged once stays damaged.
    """
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def flushed(moments: Tensor) -> Tensor:
    """Returns second moments, zero where their reciprocals would leave the range of the dtype.

    In float32 squares of gradients below 1e-16 are such moments: what is divided by a share of them
    would be infinite long before they are zero themselves.
    """
    info = torch.finfo(moments.dtype)
    return torch.where(moments > info.tiny / info.eps, moments, torch.zeros_like(moments))
