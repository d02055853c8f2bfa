"""Runs an algorithm alone, or any torch optimizer on one matrix, over gradients of a test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond import create_optimizer
from hf_precond.preconditioners.base import Preconditioner, StepContext

Gradient = Callable[[Tensor, int], Tensor]
"""(weight, step from 1) -> gradient."""

# Nothing around the algorithm: no graft partner, no momentum, no late start.
BARE: dict[str, Any] = {"graft": "none", "momentum": "none", "start_step": 1}


class Driver:
    """An algorithm with its state: a gradient [G, M, B] in, its direction out."""

    def __init__(self, algorithm: Preconditioner) -> None:
        self.algorithm = algorithm
        self.state: dict[str, Tensor] = {}
        self.steps = 0

    def step(self, g: Tensor) -> Tensor:
        """Takes a gradient into the statistics and returns its direction."""
        if not self.state:
            self.state = self.algorithm.init(tuple(g.shape), dtype=g.dtype, device=g.device)
        self.steps += 1
        ctx = StepContext(step=self.steps, phases=[0.0] * len(g))
        self.algorithm.update(self.state, g, ctx)
        return self.algorithm.apply(self.state, g, ctx)


def directions(algorithm: Preconditioner, grads: Tensor) -> Tensor:
    """The directions [T, G, M, B] of gradients [T, G, M, B]."""
    driver = Driver(algorithm)
    return torch.stack([driver.step(g) for g in grads])


def follow(optimizer: torch.optim.Optimizer, gradient: Gradient, steps: int) -> Tensor:
    """The weights [T, ...] of the optimizer's first parameter after each of the next steps."""
    param = optimizer.param_groups[0]["params"][0]
    weights = []
    for t in range(1, steps + 1):
        # A clone: some optimizers write into the gradient.
        param.grad = gradient(param.detach(), t).clone()
        optimizer.step()
        weights.append(param.detach().clone())
    return torch.stack(weights)


def descend(
    name: str, start: Tensor, gradient: Gradient, steps: int, *, lr: float = 0.1, **options: Any
) -> Tensor:
    """The weights after each step of a registered optimizer without stages around it, in float64.

    Args:
        options: those of the optimizer, and ``weight_decay``.
    """
    settings = BARE | {"state_dtype": "float64"} | options
    optimizer = create_optimizer([matrix(start)], name, lr=lr, **settings)
    return follow(optimizer, gradient, steps)


def matrix(start: Tensor) -> nn.Parameter:
    """A parameter of its own that begins at ``start``."""
    return nn.Parameter(start.clone())


def replay(grads: Tensor) -> Gradient:
    """Gradients [T, ...] as they are, whatever the weight."""
    return lambda _, t: grads[t - 1]


def random_matrices(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal entries in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_rotation(size: int, *, seed: int = 0) -> Tensor:
    """A seeded orthogonal matrix in float64."""
    return torch.linalg.qr(random_matrices(size, size, seed=seed)).Q


def noisy_problem(rows: int, columns: int) -> Gradient:
    """Gradients of sum log cosh(A W B - C_t), whose targets C_t change with every step."""
    left, right = random_matrices(rows, rows, seed=11), random_matrices(columns, columns, seed=12)

    def gradient(weight: Tensor, t: int) -> Tensor:
        target = random_matrices(rows, columns, seed=1000 + t)
        return left.T @ torch.tanh(left @ weight @ right - target) @ right.T

    return gradient


def turned(gradient: Gradient, left: Tensor, right: Tensor) -> Gradient:
    """The same problem in the weights U W Z: gradients U G(U^T W Z^T) Z."""
    return lambda weight, t: left @ gradient(left.T @ weight @ right.T, t) @ right


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Equal up to ``tolerance`` times the largest expected entry, which is not zero."""
    scale = expected.abs().max().item()
    assert scale > 0, f"{what}: nothing to compare"
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * scale, (
        f"{what}: differs by {difference / scale:.3e} of the largest entry, {tolerance:g} allowed"
    )


def assert_apart(actual: Tensor, expected: Tensor, least: float, what: str = "") -> None:
    """Different by more than ``least`` times the largest expected entry: what differs matters."""
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert difference > least, f"{what}: differs only by {difference:.3e} of the largest entry"
