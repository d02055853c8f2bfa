"""Gradient streams [T, G, M, B] that tests of the optimizers share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Shape = tuple[int, int, int]


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(
    steps: int, shape: Shape, *, rank: int = 3, noise: float = 0.05, seed: int = 0
) -> Tensor:
    """Gradients near one subspace that all blocks share, as real layers have them."""
    groups, blocks, size = shape
    rng = _rng(seed)
    factors = torch.randn(groups, rank, size, generator=rng, dtype=torch.float64)
    inner = torch.randn(steps, groups, blocks, rank, generator=rng, dtype=torch.float64)
    return inner @ factors + noise * gaussian(steps, shape, seed=seed + 1)


def gaussian(steps: int, shape: Shape, *, seed: int = 0) -> Tensor:
    """Independent normal entries: no structure to exploit."""
    return torch.randn(steps, *shape, generator=_rng(seed), dtype=torch.float64)


def heavy_tailed(steps: int, shape: Shape, *, seed: int = 0) -> Tensor:
    """Entries of a t distribution with two degrees of freedom, and one hundredfold spike."""
    out = gaussian(steps, shape, seed=seed)
    squares = torch.stack([gaussian(steps, shape, seed=seed + i) ** 2 for i in (1, 2)])
    out = out / squares.mean(0).sqrt()
    out[steps // 2] *= 100.0
    return out


def rank_one(steps: int, shape: Shape, *, seed: int = 0) -> Tensor:
    """One outer product per step, of a new direction each time."""
    groups, blocks, size = shape
    left = torch.randn(steps, groups, blocks, 1, generator=_rng(seed), dtype=torch.float64)
    right = torch.randn(steps, groups, 1, size, generator=_rng(seed + 1), dtype=torch.float64)
    return left @ right


def with_zeros(steps: int, shape: Shape, *, seed: int = 0) -> Tensor:
    """A zero first gradient, every fourth step zero, and one block that is always zero."""
    out = low_rank(steps, shape, seed=seed)
    out[::4] = 0.0
    out[:, :, 0] = 0.0
    return out


def slowly_turning(steps: int, shape: Shape, *, seed: int = 0) -> Tensor:
    """A stream whose subspace drifts a little every step, so that a tracked basis settles."""
    start, drift = (
        low_rank(steps, shape, noise=1e-3, seed=seed),
        low_rank(steps, shape, seed=seed + 9),
    )
    share = torch.linspace(0.0, 0.3, steps, dtype=torch.float64).view(-1, 1, 1, 1)
    return (1.0 - share) * start + share * drift


STREAMS: dict[str, Callable[..., Tensor]] = {
    "low_rank": low_rank,
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
    "rank_one": rank_one,
    "with_zeros": with_zeros,
}
