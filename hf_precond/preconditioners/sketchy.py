"""Sketchy: Shampoo's factors as frequent-directions sketches.

Feinberg et al.: Sketchy: Memory-efficient Adaptive Regularization with Frequent Directions (NeurIPS
2023). Each side of a tile keeps U diag(s) U^T + rho I of rank ell: the new factor is added, the
ell-th eigenvalue taken off all and moved to rho; direction L^(-1/4) G R^(-1/4).

    U, s, rho   left_vectors [G, M, L], left_values [G, L], left_mass [G]; right_* alike

``tail_decay`` is the decay of rho, between beta2 (the paper's) and 1. One of the authors' programs
takes its square root, adds G G^T unscaled and takes off the (ell+1)-th eigenvalue:
``authors_code``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.lowrank import add_gram, inverse_power
from hf_precond.preconditioners.base import (
    OptimizerInfo,
    Placement,
    Shape,
    State,
    StepContext,
    check_options,
    option,
)
from hf_precond.preconditioners.frequent_directions import shrink

_SIDES = ("left", "right")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketchy:
    """Sketched Kronecker factors per tile."""

    exact_state: ClassVar[tuple[str, ...]] = ("left_vectors", "right_vectors")

    rank: int = option(256, "columns of each sketch", symbol="ell", low=1)
    block_size: int = option(1024, "largest tile; remainders make smaller tiles", low=1)
    update_interval: int = option(1, "steps between updates of the sketches", low=1)
    beta2: float = option(
        0.999, "decay of the sketches", symbol="beta2", low=0, high=1, high_open=True
    )
    tail_decay: float | None = option(
        None, "decay of the escaped mass, not below beta2 (none: beta2)", low=0, high=1
    )
    eps: float = option(
        1e-6, "ridge as a share of the largest eigenvalue", symbol="epsilon", low=0, low_open=True
    )
    authors_code: bool = option(
        False,
        "as one of the authors' programs: escaped mass decays with the root of beta2, factors are "
        "added unscaled, the eigenvalue after the last is taken off",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.tail_decay is not None and self.tail_decay < self.beta2:
            raise ValueError(
                f"tail_decay = {self.tail_decay!r} is not allowed: "
                f"it must be >= beta2 = {self.beta2:g} and <= 1"
            )

    def place(self, shape: Shape) -> Placement:
        """Tiles of ``block_size``."""
        return Placement(tile=(self.block_size, self.block_size))

    def effective_rank(self, shape: Shape) -> int:
        """Rank of the right side's sketch."""
        return min(self.rank, shape[2], self.block_size)

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, *sizes = shape
        state = {}
        for side, size in zip(_SIDES, sizes, strict=True):
            rank = min(self.rank, size)
            shapes = {"vectors": (groups, size, rank), "values": (groups, rank), "mass": (groups,)}
            for name, part in shapes.items():
                state[f"{side}_{name}"] = torch.zeros(part, dtype=dtype, device=device)
        return state

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        if not ctx.due(self.update_interval):
            return
        weight = 1.0 if self.authors_code else 1 - self.beta2
        index = self.rank + 1 if self.authors_code else self.rank
        new: State = {}
        for side, x in zip(_SIDES, (g_GMB, g_GMB.mT), strict=True):
            vectors, values = add_gram(
                state[f"{side}_vectors"],
                self.beta2 * state[f"{side}_values"],
                weight**0.5 * x,
                keep=self.rank,
            )
            vectors, values, lost = shrink(vectors, values, index)
            new[f"{side}_vectors"], new[f"{side}_values"] = vectors, values
            new[f"{side}_mass"] = self._tail_decay * state[f"{side}_mass"] + lost
        # Written only when both sides are there: after a failed factorisation they still fit.
        for name, value in new.items():
            state[name].copy_(value)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        return self._root(state, "right", self._root(state, "left", g_GMB).mT).mT

    @property
    def _tail_decay(self) -> float:
        if self.tail_decay is not None:
            return self.tail_decay
        return self.beta2**0.5 if self.authors_code else self.beta2

    def _root(self, state: State, side: str, x: Tensor) -> Tensor:
        """(U diag(s) U^T + (rho + ridge) I)^(-1/4) x."""
        values, mass = state[f"{side}_values"], state[f"{side}_mass"]
        tail = mass + self.eps * (values[..., 0] + mass)
        return inverse_power(state[f"{side}_vectors"], values, tail, x, 0.25)


INFOS = (
    OptimizerInfo(
        name="sketchy",
        algorithm=Sketchy,
        defaults={
            "update_interval": 10,
            "graft": "adam",
            "momentum_site": "gradient",
            "start_step": 11,
            "attention_grouping": "kernel",
        },
        summary="Shampoo with frequent-directions sketches in place of the factors",
        formula=(
            "As shampoo, with L and R as frequent-directions sketches: their leading "
            "eigenvectors, and one number for what was cut off."
        ),
        paper="Feinberg et al., Sketchy, NeurIPS 2023",
    ),
)
