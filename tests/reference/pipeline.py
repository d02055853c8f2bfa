"""What one optimizer step does to one parameter: a literal float64 transcript, no stacking.

    gradient -> statistics -> direction d -> grafting -> first moment -> decoupled weight decay -> weight

The algorithm itself is a pair ``update(g)``, ``apply(g)`` per group of a view, such as
:class:`~tests.reference.shared_basis.SharedBasisReference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

TINY_NORM = 1e-25
TINY_ROOT = 1e-10


class GroupReference(Protocol):
    """One group of blocks of an algorithm under test."""

    def update(self, grads: Tensor) -> None: ...

    def apply(self, grads: Tensor) -> Tensor: ...


class BlockView(Protocol):
    """What the reference needs of a view: a copy to and from [G, M, B]."""

    def to_blocks(self, tensor: Tensor) -> Tensor: ...

    def copy_from_blocks(self, tensor: Tensor, blocks: Tensor) -> None: ...


@dataclass(kw_only=True)
class Graft:
    """The step s of a diagonal method, whose norm the direction takes over."""

    kind: str
    beta2: float
    steps: int = 0
    exp_avg_sq: Tensor | None = None

    def step(self, g: Tensor) -> Tensor:
        """Takes the whole parameter's gradient in and returns s."""
        self.steps += 1
        kind, _, normalized = self.kind.partition("_")
        if normalized:
            g = g / (g.norm() + TINY_NORM)
        if kind in ("none", "sgd"):
            return g
        sums = kind == "adagrad" or self.beta2 == 1.0
        old, new = (1.0, 1.0) if sums else (self.beta2, 1.0 - self.beta2)
        before = torch.zeros_like(g) if self.exp_avg_sq is None else self.exp_avg_sq
        self.exp_avg_sq = old * before + new * g**2
        corrected = kind == "adam" and not sums
        v = self.exp_avg_sq / (1.0 - self.beta2**self.steps) if corrected else self.exp_avg_sq
        return g / (v.sqrt() + TINY_ROOT)


@dataclass(kw_only=True)
class MatrixReference:
    """One parameter with matrix views.

    Args:
        groups: ``(view, group index) -> algorithm``, called once for each group.
        graft_scope: the piece whose norm is taken over: "parameter", "view" or "group".
    """

    weight: Tensor
    views: Sequence[BlockView]
    groups: Callable[[int, int], GroupReference]
    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    momentum: str = "ema"
    momentum_site: str = "direction"
    start_step: int = 1
    graft: str = "rmsprop_normalized"
    graft_beta2: float = 0.999
    graft_scope: str = "parameter"
    steps: int = 0
    moment: Tensor | None = None
    algorithms: dict[tuple[int, int], GroupReference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.diagonal = Graft(kind=self.graft, beta2=self.graft_beta2)
        for v, view in enumerate(self.views):
            for g in range(len(view.to_blocks(self.weight))):
                self.algorithms[v, g] = self.groups(v, g)

    def step(self, grad: Tensor | None) -> None:
        """Moves the weight by one step; a missing or non-finite gradient leaves everything as it was."""
        if grad is None or not grad.isfinite().all():
            return
        self.steps += 1
        self._each_group(grad, lambda algorithm, blocks: algorithm.update(blocks) or blocks)
        if self.momentum_site == "gradient":
            grad = self._first_moment(grad)
        graft_step = self.diagonal.step(grad)
        if self.steps < self.start_step:
            direction = graft_step
        else:
            direction = self._each_group(grad, lambda algorithm, blocks: algorithm.apply(blocks))
            if self.graft != "none":
                direction = self._take_norm(direction, graft_step)
        if self.momentum_site == "direction":
            direction = self._first_moment(direction)
        self.weight = self.weight - self.lr * self.weight_decay * self.weight - self.lr * direction

    def _each_group(self, grad: Tensor, act: Callable[[GroupReference, Tensor], Tensor]) -> Tensor:
        out = torch.zeros_like(grad)
        for v, view in enumerate(self.views):
            blocks = view.to_blocks(grad)
            done = [act(self.algorithms[v, g], blocks[g]) for g in range(len(blocks))]
            view.copy_from_blocks(out, torch.stack(done))
        return out

    def _first_moment(self, x: Tensor) -> Tensor:
        before = torch.zeros_like(x) if self.moment is None else self.moment
        if self.momentum == "none":
            return x
        if self.momentum == "heavy_ball":
            self.moment = self.beta1 * before + x
            return self.moment
        self.moment = self.beta1 * before + (1.0 - self.beta1) * x
        return self.moment / (1.0 - self.beta1**self.steps)

    def _take_norm(self, direction: Tensor, graft_step: Tensor) -> Tensor:
        def rescale(d: Tensor, s: Tensor) -> Tensor:
            return d * (s.norm() / (d.norm() + TINY_NORM))

        if self.graft_scope == "parameter":
            return rescale(direction, graft_step)
        out = torch.zeros_like(direction)
        for view in self.views:
            d, s = view.to_blocks(direction), view.to_blocks(graft_step)
            if self.graft_scope == "view":
                view.copy_from_blocks(out, rescale(d, s))
            else:
                scaled = [rescale(d[g], s[g]) for g in range(len(d))]
                view.copy_from_blocks(out, torch.stack(scaled))
        return out


@dataclass(kw_only=True)
class AdamReference:
    """AdamW of a parameter without a matrix view."""

    weight: Tensor
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    steps: int = 0
    exp_avg: Tensor | float = 0.0
    exp_avg_sq: Tensor | float = 0.0

    def step(self, grad: Tensor | None) -> None:
        """W <- W - lr wd W - lr m^ / (sqrt(v^) + eps), bias-corrected."""
        if grad is None or not grad.isfinite().all():
            return
        self.steps += 1
        beta1, beta2 = self.betas
        self.exp_avg = beta1 * self.exp_avg + (1.0 - beta1) * grad
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1.0 - beta2) * grad**2
        first = self.exp_avg / (1.0 - beta1**self.steps)
        second = self.exp_avg_sq / (1.0 - beta2**self.steps)
        decayed = self.weight - self.lr * self.weight_decay * self.weight
        self.weight = decayed - self.lr * first / (second.sqrt() + self.eps)


@dataclass(kw_only=True)
class SgdReference:
    """SGD with heavy-ball momentum of a parameter without a matrix view."""

    weight: Tensor
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    buffer: Tensor | float = 0.0

    def step(self, grad: Tensor | None) -> None:
        """W <- W - lr wd W - lr (momentum * buffer + g)."""
        if grad is None or not grad.isfinite().all():
            return
        self.buffer = self.momentum * self.buffer + grad
        decayed = self.weight - self.lr * self.weight_decay * self.weight
        self.weight = decayed - self.lr * self.buffer
