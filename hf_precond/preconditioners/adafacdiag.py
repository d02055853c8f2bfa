"""AdafacDiag and AdafacDiag++: Adafactor in the bases of the gradient's singular vectors.

Nguyen et al. 2024, Algorithm 3; the bases are :mod:`hf_precond.preconditioners.rotation`'s. With
G~ = P^T G (Q): r <- beta2 r + (1 - beta2) (G~^2 + eps) 1, c alike for columns, V = (r / sum r) c^T,
u = G~ / sqrt(V), u <- u / max(1, RMS(u) / clip_threshold), M <- beta1 M + (1 - beta1) u; direction
P M (Q^T) with M bias-corrected, or P u (Q^T) without a first moment.

    P, Q  left, right    r  row_sq [G, S]    c  column_sq [G, L]    M  exp_avg [G, S, L]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.preconditioners.base import OptimizerInfo, Shape, State, StepContext, option
from hf_precond.preconditioners.rotation import Rotated, orient, orient_back, oriented


@dataclass(frozen=True, slots=True, kw_only=True)
class AdafacDiag(Rotated):
    """Adafactor in rotated coordinates."""

    eps: float = option(1e-30, "added to the squares", symbol="epsilon", low=0, low_open=True)
    clip_threshold: float = option(
        1.0, "largest root mean square of a group's update", low=0, low_open=True
    )

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, small, large = oriented(shape)
        return {
            **self.init_bases(shape, dtype=dtype, device=device),
            "row_sq": torch.zeros(groups, small, dtype=dtype, device=device),
            "column_sq": torch.zeros(groups, large, dtype=dtype, device=device),
        }

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        g = orient(g_GMB)
        self.refresh_bases(state, g, ctx)
        rotated = self.rotate(state, g)
        squares = rotated.square().add_(self.eps)
        state["row_sq"].lerp_(squares.sum(-1), 1 - self.beta2)
        state["column_sq"].lerp_(squares.sum(-2), 1 - self.beta2)
        if self.rotated_momentum:
            state["exp_avg"].lerp_(self._normalized(state, rotated), 1 - self.beta1)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        if self.rotated_momentum:
            scaled = state["exp_avg"] / (1 - self.beta1**ctx.step)
        else:
            scaled = self._normalized(state, self.rotate(state, orient(g_GMB)))
        return orient_back(self.rotate_back(state, scaled), g_GMB.shape)

    def _normalized(self, state: State, rotated: Tensor) -> Tensor:
        """G~ / sqrt(V), its root mean square clipped."""
        rows, columns = state["row_sq"], state["column_sq"]
        # In this order: r c^T first would underflow.
        share = rows / rows.sum(-1, keepdim=True)
        u = rotated * share.rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)
        rms = u.square().mean((-2, -1), keepdim=True).sqrt()
        return u / (rms / self.clip_threshold).clamp(min=1)


_PAPER = "Nguyen et al., Preconditioner Diagonalization, 2024, Algorithm 3"
_DEFAULTS = {"momentum": "none", "graft": "none", "attention_grouping": "kernel"}

INFOS = (
    OptimizerInfo(
        name="adafacdiag",
        algorithm=AdafacDiag,
        fixed={"two_sided": False},
        defaults=_DEFAULTS,
        summary="Adafactor in the basis of the gradient's left singular vectors",
        formula=(
            "As adadiag, with row and column means in place of the mean square of every entry, "
            "as Adafactor has them."
        ),
        paper=_PAPER,
    ),
    OptimizerInfo(
        name="adafacdiag_pp",
        algorithm=AdafacDiag,
        fixed={"two_sided": True},
        defaults=_DEFAULTS,
        summary="Adafactor in the bases of the gradient's left and right singular vectors",
        formula=(
            "As adadiag_pp, with row and column means in place of the mean square of every "
            "entry, as Adafactor has them."
        ),
        paper=_PAPER,
    ),
)
