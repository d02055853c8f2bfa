"""Runs a layer method alone over columns of a test's own, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_precond.preconditioners.base import Columns, StepContext

Seen = tuple[Tensor, Tensor]
"""Inputs [N, S, B] and output gradients [N, S, M] of one layer and batch, not scaled yet: g is that
of the sum of the losses of T = N S positions, which their mean divides by T."""


def seen(
    samples: int, inputs: int, outputs: int, *, positions: int = 1, seed: int = 0, decay: float = 1
) -> Seen:
    """Seeded normal columns.

    Args:
        decay: ratio of the scale of one feature to that before it: a spectrum that falls.
    """
    rng = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(samples, positions, size, generator=rng, dtype=torch.float64)
        * decay ** torch.arange(size, dtype=torch.float64)
        for size in (inputs, outputs)
    )


def scaled(batch: Seen) -> Columns:
    """As a preconditioner takes them, one group, for the mean over all positions."""
    inputs, outputs = batch
    total = inputs.shape[0] * inputs.shape[1]
    return Columns(
        inputs=(inputs / total**0.5).unsqueeze(0), outputs=(outputs / total**0.5).unsqueeze(0)
    )


def gradient(batch: Seen) -> Tensor:
    """Mean of g a^T over all positions, [M, B]."""
    inputs, outputs = batch
    return outputs.flatten(0, 1).T @ inputs.flatten(0, 1) / inputs[..., 0].numel()


class LayerDriver:
    """A layer method with its state, on one group."""

    def __init__(self, algorithm: Any, shape: tuple[int, int]) -> None:
        self.algorithm = algorithm
        self.state = algorithm.init((1, *shape), dtype=torch.float64, device=torch.device("cpu"))
        self.steps = 0

    def step(self, batch: Seen | None, x: Tensor | None = None) -> Tensor:
        """Takes a batch in and returns the direction [M, B] of its gradient, or of ``x``."""
        self.steps += 1
        columns = None if batch is None else scaled(batch)
        ctx = StepContext(step=self.steps, phases=[0.0], columns=columns)
        if x is None:
            assert batch is not None
            x = gradient(batch)
        self.algorithm.update(self.state, x.unsqueeze(0), ctx)
        return self.algorithm.apply(self.state, x.unsqueeze(0), ctx)[0]


def directions(algorithm: Any, batches: list[Seen], x: Tensor | None = None) -> Tensor:
    """The directions [T, M, B] of batches."""
    inputs, outputs = batches[0]
    driver = LayerDriver(algorithm, (outputs.shape[-1], inputs.shape[-1]))
    return torch.stack([driver.step(batch, x) for batch in batches])


def form(driver: LayerDriver, side: str) -> Tensor:
    """U diag(D) U^T of a side, [d, d]."""
    vectors, values = driver.state[f"{side}_vectors"][0], driver.state[f"{side}_values"][0]
    return (vectors * values) @ vectors.T


def transformed(batches: list[Seen], change: Callable[[Seen], Seen]) -> list[Seen]:
    """Every batch changed in the same way."""
    return [change(batch) for batch in batches]
