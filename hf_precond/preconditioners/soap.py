"""SOAP: Adam in the eigenbases of Shampoo's factors.

Vyas et al.: SOAP: Improving and Stabilizing Shampoo using Adam (2024). L <- sb L + (1 - sb) G G^T
and R alike; G' = Q_L^T G Q_R, Adam's moments of G', direction Q_L (M / (sqrt(V) + eps)) Q_R^T. The
bases follow by one step of orthogonal iteration (QR) every ``basis_interval`` steps.

    L, R  left, right    Q_L, Q_R  left_basis, right_basis    M, V  exp_avg, exp_avg_sq [G, M, B]

As in the authors' program the first step only makes the bases (its weight decay is the shell's), so
that a gradient is never seen in its own eigenbasis, where most of it would be rounding. New bases
are taken at the beginning of the step after the one that made them due. M is kept in the bases and
turned along with them, which equals keeping it outside and turning it at every step.

Deviations: the iteration is shifted by a millionth of the trace and null spaces are completed from
the previous basis, so that factors of low rank leave nothing to chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.eigen import eigh
from hf_precond.linalg.subspace import complete_basis, fix_signs, orthogonal_iteration
from hf_precond.preconditioners.base import (
    OptimizerInfo,
    Shape,
    State,
    StepContext,
    check_options,
    option,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Soap:
    """Adam in slowly turning Kronecker bases."""

    exact_state: ClassVar[tuple[str, ...]] = ("left", "left_basis", "right", "right_basis")

    max_dim: int = option(10000, "a side with a larger dimension is not rotated", low=1)
    basis_interval: int = option(10, "steps between new bases", symbol="f", low=1)
    basis_method: str = option(
        "qr", "one step of orthogonal iteration, or all eigenvectors", choices=("qr", "eigh")
    )
    stagger: bool = option(False, "spread the new bases of the layers over the interval")
    shampoo_beta: float | None = option(
        None, "decay of the factors (none: beta2)", low=0, high=1, high_open=True
    )
    beta1: float = option(0.9, "decay of the first moment", low=0, high=1, high_open=True)
    beta2: float = option(0.999, "decay of the second moment", low=0, high=1, high_open=True)
    eps: float = option(
        1e-8, "added to the root of the second moment", symbol="epsilon", low=0, low_open=True
    )

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, rows, columns = shape
        state = {
            "exp_avg": torch.zeros(shape, dtype=dtype, device=device),
            "exp_avg_sq": torch.zeros(shape, dtype=dtype, device=device),
        }
        for side, size in (("left", rows), ("right", columns)):
            if size <= self.max_dim:
                eye = torch.eye(size, dtype=dtype, device=device)
                state[side] = torch.zeros(groups, size, size, dtype=dtype, device=device)
                state[f"{side}_basis"] = eye.expand(groups, size, size).clone()
        return state

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        if ctx.step == 2:
            ctx.refreshed = True
            self._refresh(state, slice(None), first=True)
        elif ctx.step > 2:
            interval = self.basis_interval
            groups = ctx.due_groups(interval, first=2 + interval, stagger=self.stagger)
            if groups is not None:
                self._refresh(state, groups, first=False)
        if ctx.step > 1:
            rotated = self._rotate(state, g_GMB)
            state["exp_avg"].lerp_(rotated, 1 - self.beta1)
            state["exp_avg_sq"].mul_(self.beta2).addcmul_(rotated, rotated, value=1 - self.beta2)
        decay = self.beta2 if self.shampoo_beta is None else self.shampoo_beta
        for side, x in (("left", g_GMB), ("right", g_GMB.mT)):
            if side in state:
                state[side].baddbmm_(x, x.mT, beta=decay, alpha=1 - decay)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        if ctx.step == 1:
            return torch.zeros_like(g_GMB)
        step = ctx.step - 1  # the first gradient is in the bases, not in the moments
        root = (state["exp_avg_sq"] / (1 - self.beta2**step)).sqrt_().add_(self.eps)
        out = torch.div(state["exp_avg"], root, out=root).div_(1 - self.beta1**step)
        if "left" in state:
            out = state["left_basis"] @ out
        return out @ state["right_basis"].mT if "right" in state else out

    def _rotate(self, state: State, x: Tensor) -> Tensor:
        """Q_L^T x Q_R."""
        if "left" in state:
            x = state["left_basis"].mT @ x
        return x @ state["right_basis"] if "right" in state else x

    def _refresh(self, state: State, groups: list[int] | slice, *, first: bool) -> None:
        """Takes new bases from the factors and turns the moments along."""
        first_moment, second = state["exp_avg"][groups], state["exp_avg_sq"][groups]
        new: State = {}
        for side, dim in (("left", -2), ("right", -1)):
            if side not in state:
                continue
            factor, old = state[side][groups], state[f"{side}_basis"][groups]
            if first or self.basis_method == "eigh":
                basis = _eigenbasis(factor, old)
            else:
                order = (old * (factor @ old)).sum(-2).argsort(-1, descending=True)
                sorted_basis = old.gather(-1, order.unsqueeze(-2).expand_as(old))
                index = order.unsqueeze(-1 if dim == -2 else -2).expand_as(second)
                second = second.gather(dim, index)
                basis = orthogonal_iteration(factor, sorted_basis)
            turn = basis.mT @ old
            first_moment = turn @ first_moment if dim == -2 else first_moment @ turn.mT
            new[f"{side}_basis"] = basis
        # Written only when both bases are there: after a failure bases and moments still fit.
        for name, value in {**new, "exp_avg": first_moment, "exp_avg_sq": second}.items():
            state[name][groups] = value


def _eigenbasis(factor: Tensor, previous: Tensor) -> Tensor:
    """All eigenvectors, largest eigenvalue first, null space from the previous basis."""
    values, vectors = (part.flip(-1) for part in eigh(factor))
    noise = factor.shape[-1] * torch.finfo(factor.dtype).eps
    keep = values > noise * values[..., :1].clamp(min=0)
    return complete_basis(vectors * fix_signs(vectors), keep, previous)


INFOS = (
    OptimizerInfo(
        name="soap",
        algorithm=Soap,
        defaults={"momentum": "none", "graft": "none", "attention_grouping": "kernel"},
        summary="Adam in the eigenbases of Shampoo's factors",
        formula=(
            "L averages G G^T and R averages G^T G; P and Q are their eigenvectors. Adam runs "
            "on P^T G Q, with the momentum turned along, and its direction is turned back."
        ),
        paper="Vyas et al., SOAP, 2024",
        exemptions={
            "every_scale_of_gradients_works_in_float32": (
                "the first step makes the bases and moves nothing, as in the authors' program; "
                "later steps follow the first moment"
            ),
        },
    ),
)
