"""Elementwise algorithms, used for parameters without a matrix view.

Adam: Kingma and Ba 2015, Algorithm 1, as ``torch.optim.AdamW`` computes it (decoupled decay is the
shell's). SGD: heavy-ball momentum as ``torch.optim.SGD``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.preconditioners.base import Shape, State, StepContext, check_options, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam's direction: bias-corrected first moment over the root of the second, plus eps."""

    beta1: float = option(0.9, "decay of the first moment", low=0, high=1, high_open=True)
    beta2: float = option(0.999, "decay of the second moment", low=0, high=1, high_open=True)
    eps: float = option(1e-8, "added to the root of the second moment", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        return {
            "exp_avg": torch.zeros(shape, dtype=dtype, device=device),
            "exp_avg_sq": torch.zeros(shape, dtype=dtype, device=device),
        }

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        state["exp_avg"].lerp_(g_GMB, 1 - self.beta1)
        state["exp_avg_sq"].mul_(self.beta2).addcmul_(g_GMB, g_GMB, value=1 - self.beta2)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        # (m / c1) / (sqrt(v) / c2 + eps) with both corrections outside, to pass memory less often.
        correction = (1 - self.beta2**ctx.step) ** 0.5
        root = state["exp_avg_sq"].sqrt().add_(self.eps * correction)
        direction = torch.div(state["exp_avg"], root, out=root)
        return direction.mul_(correction / (1 - self.beta1**ctx.step))


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The gradient itself, without state: for views that are left to the graft partner's step."""

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        return {}

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        pass

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        return g_GMB


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd:
    """The gradient, or its heavy-ball momentum."""

    momentum: float = option(0.9, "heavy-ball momentum", low=0, high=1, high_open=True)

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        return {"momentum_buffer": torch.zeros(shape, dtype=dtype, device=device)}

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        state["momentum_buffer"].mul_(self.momentum).add_(g_GMB)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        return state["momentum_buffer"].clone()
