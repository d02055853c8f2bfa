"""What the K-FAC family has in common: two Kronecker factors per layer and their inverses.

The Fisher matrix of a layer is taken for a Kronecker product of the second moment of its inputs,
A, and of its output gradients, G (Martens and Grosse 2015), both running averages:

    A <- rho A + (1 - rho) a a^T,    step = (G + lam_G I)^(-1) gradient (A + lam_A I)^(-1)

with lam = damping * largest eigenvalue of the factor. Members of the family differ in how a
factor's inverse is kept up to date: each side holds a form U diag(D) U^T of its factor, orthonormal
columns and descending values, of which the first ``width`` count.

    {input,output}_factor   A [G, B, B], G [G, M, M]      {input,output}_updates  [G], of the factor
    {input,output}_vectors  U [G, size, K]                {input,output}_width    [G]
    {input,output}_values   D [G, K]                      {input,output}_rank     [G], if it adapts

The spectrum is continued (Puiu 2022, section 3.5): the smallest value of the form stands for all
that it does not hold. A factor of which nothing has been seen is the identity.

This is the empirical Fisher (gradients at the given labels, Eq. 20 there), as in the authors'
programs.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.precision import flushed
from hf_precond.preconditioners.base import (
    FALLBACK,
    LayerNeeds,
    Placement,
    Shape,
    State,
    StepContext,
    check_options,
    is_due,
    option,
)
from hf_precond.preconditioners.schedule import Schedule

SIDES = ("input", "output")
# Outside float64 smaller shares of the largest eigenvalue are rounding.
_LEAST_DAMPING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Kronecker:
    """Base of the family: factors, damping, application."""

    exact_state: ClassVar[tuple[str, ...]] = tuple(
        f"{side}_{name}" for side in SIDES for name in ("vectors", "width", "updates", "rank")
    )

    factor_decay: float = option(
        0.95, "decay of the factors", symbol="rho", low=0, high=1, high_open=True
    )
    update_interval: int = option(25, "steps between updates of the factors", low=1)
    damping: Schedule = option(
        Schedule.parse(0.1),
        "share of a factor's largest eigenvalue that is added to all of them",
        symbol="lambda",
        low=0,
        low_open=True,
    )
    continuation: bool = option(
        True, "let the smallest eigenvalue of a form stand for those it does not hold"
    )
    weight_sharing: str = option(
        "expand",
        "one column per position, or one per sample: its mean input and summed gradient",
        choices=("expand", "reduce"),
    )
    max_columns: int | None = option(
        2048, "positions of a batch that statistics take at most (none: all)", low=1
    )
    max_dim: int = option(16384, "a layer with a larger factor follows the fallback", low=1)
    authors_code: bool = option(False, "as the program of the paper's author")
    seed: int = option(0, "seed of all draws", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def layer_needs(self) -> LayerNeeds:
        """Inputs and output gradients, position by position or reduced to samples."""
        return LayerNeeds(
            max_columns=self.max_columns, reduce=self.weight_sharing == "reduce", seed=self.seed
        )

    def captures_at(self, step: int) -> bool:
        """Whether a step's columns are wanted."""
        return is_due(step, self.update_interval)

    def place(self, shape: Shape) -> Placement:
        """Layers with a factor that is too large follow the fallback."""
        if max((size for size in shape[1:] if self._has_factor(size)), default=0) > self.max_dim:
            return Placement(role=FALLBACK, reason=f"a dimension over max_dim = {self.max_dim}")
        return Placement()

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, rows, columns = shape
        state: State = {}
        for side, size in zip(SIDES, (columns, rows), strict=True):
            sizes: dict[str, tuple[int, ...]] = {
                "vectors": (size, self._width(size)),
                "values": (self._width(size),),
                "width": (),
                "updates": (),
            }
            if self._has_factor(size):
                sizes["factor"] = (size, size)
            for name, rest in sizes.items():
                state[f"{side}_{name}"] = torch.zeros(groups, *rest, dtype=dtype, device=device)
            for name, tensor in self._init_side(size, groups, dtype, device).items():
                state[f"{side}_{name}"] = tensor
        return state

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        seen = (None, None) if ctx.columns is None else ctx.columns.flat()
        changed: State = {}
        for side, columns in zip(SIDES, seen, strict=True):
            old = {
                name.removeprefix(f"{side}_"): tensor
                for name, tensor in state.items()
                if name.startswith(side)
            }
            for name, tensor in self._update_side(old, columns, ctx).items():
                changed[f"{side}_{name}"] = tensor
        # Written only when all is computed: a failed factorisation leaves both sides as they were.
        for name, tensor in changed.items():
            if tensor is not state[name]:
                state[name].copy_(tensor)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        left = self.precondition(state, "output", g_GMB, ctx)
        return self.precondition(state, "input", left.mT, ctx).mT

    # -- what members decide --

    @abstractmethod
    def _width(self, size: int) -> int:
        """Columns that the form of a factor of this size can have."""

    @abstractmethod
    def _update_side(self, side: State, columns: Tensor | None, ctx: StepContext) -> State:
        """Returns what changes on one side, from columns ``[G, n, size]``."""

    def _has_factor(self, size: int) -> bool:
        """Whether the factor itself is kept."""
        return True

    def _init_side(self, size: int, groups: int, dtype: torch.dtype, device: torch.device) -> State:
        """Further state of a side."""
        return {}

    # -- shared steps --

    def updated_factor(self, side: State, columns: Tensor) -> State:
        """Takes columns into the running average; the first ones make the whole of it."""
        first = (side["updates"] == 0).to(columns.dtype)[:, None, None]
        decay = self.factor_decay * (1 - first)
        weighted = columns * (first + (1 - first) * (1 - self.factor_decay))
        factor = (side["factor"] * decay).baddbmm_(weighted.mT, columns)
        return {"factor": factor, "updates": side["updates"] + 1}

    def precondition(self, state: State, side: str, x_GNL: Tensor, ctx: StepContext) -> Tensor:
        """(U D U^T + lam I)^(-1) x, with the spectrum continued; x itself where D = 0."""
        vectors, values = state[f"{side}_vectors"], state[f"{side}_values"]
        largest = flushed(values[:, 0])
        damping = ctx.value(self.damping) * largest
        if self.authors_code:
            damping = damping + self.factor_decay ** state[f"{side}_updates"]
        if values.dtype != torch.float64:
            damping = torch.maximum(damping, _LEAST_DAMPING * largest)
        if self.continuation:
            last = state[f"{side}_width"].long().sub(1).clamp(min=0).unsqueeze(-1)
            smallest = values.gather(1, last)
            damping = damping + smallest.squeeze(-1)
            values = (values - smallest).clamp(min=0)
        alive = largest > 0
        shift = torch.where(alive, damping, torch.ones_like(damping)).unsqueeze(-1)
        outer = 1 / shift
        weights = (1 / (values + shift) - outer) * alive.unsqueeze(-1)
        outside = torch.where(alive.unsqueeze(-1), outer, torch.ones_like(outer)).unsqueeze(-1)
        # In place, and through the transpose where that is the one without gaps in memory: copies
        # of x are what an application costs beside its products.
        scaled = x_GNL * outside
        if scaled.mT.is_contiguous():
            scaled.mT.baddbmm_((x_GNL.mT @ vectors) * weights.unsqueeze(-2), vectors.mT)
        else:
            scaled.baddbmm_(vectors, weights.unsqueeze(-1) * (vectors.mT @ x_GNL))
        return scaled


def widened(vectors: Tensor, values: Tensor, width: int) -> State:
    """A form in state of ``width`` columns: what it does not have is zero."""
    missing = width - values.shape[-1]
    if missing > 0:
        vectors = torch.cat([vectors, vectors.new_zeros(*vectors.shape[:-1], missing)], -1)
        values = torch.cat([values, values.new_zeros(*values.shape[:-1], missing)], -1)
    return {"vectors": vectors, "values": values}
