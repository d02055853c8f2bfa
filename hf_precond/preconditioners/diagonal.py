"""Elementwise algorithms, used for parameters without a matrix view.

Adam: Kingma and Ba 2015, Algorithm 1, as ``torch.optim.AdamW`` computes it (decoupled decay is the
shell's). SGD: heavy-ball momentum as ``torch.optim.SGD``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.linalg.fused import fused
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
        betas = {"beta1": self.beta1, "beta2": self.beta2}
        _take_in_(state["exp_avg"], state["exp_avg_sq"], g_GMB, **betas)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        # (m / c1) / (sqrt(v) / c2 + eps) with both corrections outside, to pass memory less often.
        correction = (1 - self.beta2**ctx.step) ** 0.5
        factor = correction / (1 - self.beta1**ctx.step)
        return _scaled(state["exp_avg"], state["exp_avg_sq"], self.eps * correction, factor)


@fused
def _take_in_(first: Tensor, second: Tensor, g: Tensor, *, beta1: float, beta2: float) -> None:
    """m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2."""
    first.lerp_(g, 1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)


@fused
def _scaled(first: Tensor, second: Tensor, eps: float | Tensor, factor: float | Tensor) -> Tensor:
    """factor m / (sqrt(v) + eps)."""
    root = second.sqrt().add_(eps)
    return torch.div(first, root, out=root).mul_(factor)


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
