"""AdaDiag and AdaDiag++: Adam in the bases of the gradient's singular vectors.

Nguyen et al. 2024, Algorithms 1 and 2; the bases are :mod:`hf_precond.preconditioners.rotation`'s.
G~ = P^T G (Q), M <- beta1 M + (1 - beta1) G~, V <- beta2 V + (1 - beta2) G~^2, both bias-corrected,
direction P (M / (sqrt(V) + eps)) (Q^T).

    P, Q  left, right    M  exp_avg [G, S, L]    V  exp_avg_sq [G, S, L]    S <= L
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.preconditioners.base import OptimizerInfo, Shape, State, StepContext, option
from hf_precond.preconditioners.rotation import Rotated, orient, orient_back, oriented


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaDiag(Rotated):
    """Adam in rotated coordinates."""

    eps: float = option(
        1e-8, "added to the root of the second moment", symbol="epsilon", low=0, low_open=True
    )

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        second = torch.zeros(oriented(shape), dtype=dtype, device=device)
        return {**self.init_bases(shape, dtype=dtype, device=device), "exp_avg_sq": second}

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        g = orient(g_GMB)
        self.refresh_bases(state, g, ctx)
        rotated = self.rotate(state, g)
        if self.rotated_momentum:
            state["exp_avg"].lerp_(rotated, 1 - self.beta1)
        state["exp_avg_sq"].mul_(self.beta2).addcmul_(rotated, rotated, value=1 - self.beta2)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        root = (state["exp_avg_sq"] / (1 - self.beta2**ctx.step)).sqrt_().add_(self.eps)
        if self.rotated_momentum:
            scaled = torch.div(state["exp_avg"], root, out=root).div_(1 - self.beta1**ctx.step)
        else:
            scaled = self.rotate(state, orient(g_GMB)) / root
        return orient_back(self.rotate_back(state, scaled), g_GMB.shape)


_PAPER = "Nguyen et al., Preconditioner Diagonalization, 2024"
_DEFAULTS = {"momentum": "none", "graft": "none", "attention_grouping": "kernel"}

INFOS = (
    OptimizerInfo(
        name="adadiag",
        algorithm=AdaDiag,
        fixed={"two_sided": False},
        defaults=_DEFAULTS,
        summary="Adam in the basis of the gradient's left singular vectors",
        formula=(
            "P has the left singular vectors of the gradient, from time to time. Adam runs on "
            "P^T G, and its direction is turned back by P."
        ),
        paper=f"{_PAPER}, Algorithm 1",
    ),
    OptimizerInfo(
        name="adadiag_pp",
        algorithm=AdaDiag,
        fixed={"two_sided": True},
        defaults=_DEFAULTS,
        summary="Adam in the bases of the gradient's left and right singular vectors",
        formula=(
            "P and Q have the left and right singular vectors of the gradient, from time to "
            "time. Adam runs on P^T G Q, and its direction is turned back by both."
        ),
        paper=f"{_PAPER}, Algorithm 2",
    ),
)
