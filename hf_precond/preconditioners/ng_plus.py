"""NG+: the natural gradient of a matrix from the smaller of its two Gram matrices.

Yang, Xu, Cui, Wen, Xu: NG+ (2021), the mini-batch form, Eq. 12: L <- beta L + gamma G G^T from
lam_0 I, direction (L + lam I)^(-1) G where M <= B, else G (R + lam I)^(-1) with R from G^T G.
Curvature and inverse are refreshed every ``update_interval`` steps.

    L or R  curvature [G, S, S]    (L + lam I)^(-1)  inverse [G, S, S]

``block_size`` keeps diagonal blocks only (Eq. 18), ``sketch_size`` estimates G G^T from some of G's
columns, drawn without replacement (Eq. 17; the paper's drawing with replacement would not be exact
where all are drawn).

The authors' program differs from the paper in what ``authors_code`` reproduces: it always takes the
left side, adds sqrt(damping), weighs the new matrix with 0.9 and starts from 1e-8 I. (Its online
form also reads the momentum buffer in place of the gradient: not reproduced.)

Deviation: ``damping_mode="relative"`` takes the damping as a share of the largest eigenvalue and
starts from zero, because an absolute one ties the step to the scale of the loss. In float32 the
damping is not below 1e-6 of that eigenvalue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.linalg.roots import largest_eigenvalue, positive_inverse
from hf_precond.preconditioners.base import (
    OptimizerInfo,
    Placement,
    Shape,
    State,
    StepContext,
    check_options,
    option,
)
from hf_precond.preconditioners.schedule import Schedule

# The authors' program: decay of the old matrix and weight of the new one, and the first matrix.
_AUTHORS_WEIGHTS = (0.1, 0.9)
_AUTHORS_START = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class NgPlus:
    """Natural gradient on the smaller side, curvature from mini-batch gradients."""

    beta: float = option(0.99, "decay of the curvature", symbol="beta", low=0, high=1)
    gamma: float = option(0.01, "weight of a new Gram matrix", symbol="gamma", low=0)
    damping: Schedule = option(
        Schedule.parse(0.16),
        "added to the curvature's eigenvalues",
        symbol="lambda",
        low=0,
        low_open=True,
    )
    damping_decay: float = option(
        1.0, "factor of the damping every ten epochs", low=0, low_open=True
    )
    damping_mode: str = option(
        "absolute",
        "damping as it is, or as a share of the largest eigenvalue",
        choices=("absolute", "relative"),
    )
    update_interval: int = option(
        200, "steps between curvatures (paper: 500 for vision, 200 for SchNet)", low=1
    )
    block_size: int | None = option(
        None, "size of the curvature's diagonal blocks (none: one block)", symbol="p", low=1
    )
    sketch_size: int | None = option(
        None, "columns that estimate a Gram matrix (none: all)", symbol="q", low=1
    )
    authors_code: bool = option(
        False, "as the authors' program: left side, sqrt(damping), 0.9 of each new Gram matrix"
    )
    seed: int = option(0, "seed of the sketch", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    def place(self, shape: Shape) -> Placement:
        """Diagonal blocks: the curvature's side cut, the other one whole."""
        _, rows, columns = shape
        if self.block_size is None:
            return Placement()
        left = self._is_left(shape)
        return Placement(tile=(self.block_size, columns) if left else (rows, self.block_size))

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, rows, columns = shape
        size = rows if self._is_left(shape) else columns
        eye = torch.eye(size, dtype=dtype, device=device).expand(groups, size, size)
        first = _AUTHORS_START if self.authors_code else self.damping.initial
        if self.damping_mode == "relative":
            first = 0.0
        return {"curvature": first * eye, "inverse": torch.zeros_like(eye).contiguous()}

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        if not ctx.due(self.update_interval):
            return
        x = self._sampled(g_GMB if self._is_left(g_GMB.shape) else g_GMB.mT, ctx.step)
        decay, weight = _AUTHORS_WEIGHTS if self.authors_code else (self.beta, self.gamma)
        curvature = torch.baddbmm(state["curvature"], x, x.mT, beta=decay, alpha=weight)
        inverse = self._inverse(curvature, ctx)
        # Written only when all is computed: a failed factorisation leaves both as they were.
        state["curvature"].copy_(curvature)
        state["inverse"].copy_(inverse)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        if self._is_left(g_GMB.shape):
            return state["inverse"] @ g_GMB
        return g_GMB @ state["inverse"]

    def _is_left(self, shape: Sequence[int]) -> bool:
        return self.authors_code or shape[1] <= shape[2]

    def _damping(self, ctx: StepContext) -> float:
        damping = ctx.value(self.damping)
        if self.damping_decay != 1.0:
            damping *= self.damping_decay ** (ctx.epoch() / 10)
        return damping**0.5 if self.authors_code else damping

    def _sampled(self, x: Tensor, step: int) -> Tensor:
        """Columns drawn without replacement, scaled so that their Gram matrix is unbiased."""
        count = x.shape[-1]
        if self.sketch_size is None or self.sketch_size >= count:
            return x
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * step)
        drawn = torch.randperm(count, generator=generator)[: self.sketch_size].to(x.device)
        return x[..., drawn] * (count / self.sketch_size) ** 0.5

    def _inverse(self, curvature: Tensor, ctx: StepContext) -> Tensor:
        """(L + lam I)^(-1); zero where relative damping meets a zero curvature."""
        damping = curvature.new_full(curvature.shape[:1], self._damping(ctx))
        if self.damping_mode == "relative" or curvature.dtype != torch.float64:
            largest = largest_eigenvalue(curvature)
            if self.damping_mode == "relative":
                damping = damping * largest
            if curvature.dtype != torch.float64:
                damping = torch.maximum(damping, 1e-6 * largest)
        alive = damping > 0
        damping = torch.where(alive, damping, torch.ones_like(damping)).unsqueeze(-1)
        damped = curvature + torch.diag_embed(damping.expand(curvature.shape[:-1]))
        return positive_inverse(damped) * alive[:, None, None]


INFOS = (
    OptimizerInfo(
        name="ng_plus",
        algorithm=NgPlus,
        defaults={
            "update_interval": 10,
            "damping": Schedule.parse(0.01),
            "damping_mode": "relative",
            "graft": "adam",
            "momentum_site": "gradient",
            "attention_grouping": "kernel",
        },
        summary="natural gradient from the smaller Gram matrix of the mini-batch gradient",
        paper="Yang et al., NG+, 2021, Eq. 12, 17, 18",
    ),
)
