"""Packed storage of symmetric matrices: K(K+1)/2 numbers instead of K^2."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def packed_size(size: int) -> int:
    """Number of entries in the upper triangle of a ``[size, size]`` matrix."""
    return size * (size + 1) // 2


def pack(a_KK: Tensor) -> Tensor:
    """Returns the upper triangles ``[..., K(K+1)/2]`` of symmetric matrices ``[..., K, K]``."""
    rows, cols = triangle(a_KK.shape[-1], a_KK.device)
    return a_KK[..., rows, cols]


def unpack(packed: Tensor, size: int) -> Tensor:
    """Returns symmetric matrices ``[..., K, K]`` from their upper triangles ``[..., K(K+1)/2]``."""
    return packed[..., _positions(size, packed.device)]


@lru_cache(maxsize=64)
def triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns row and column of each packed entry."""
    rows, cols = torch.triu_indices(size, size, device=device)
    return rows, cols


@lru_cache(maxsize=64)
def _positions(size: int, device: torch.device) -> Tensor:
    rows, cols = triangle(size, device)
    positions = torch.empty(size, size, dtype=torch.long, device=device)
    positions[rows, cols] = torch.arange(packed_size(size), device=device)
    positions[cols, rows] = positions[rows, cols]
    return positions
