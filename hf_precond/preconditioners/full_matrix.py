"""Full-matrix Adagrad on small tensors.

Duchi, Hazan, Singer (2011): H <- H + g g^T over all weights of a group, direction
(H + eps I)^(-1/2) g.

    second_moment  [G, N, N]    root  [G, N, N], identities at first    N = M B

A group with more than ``max_elements`` weights goes to the fallback algorithm, with a log line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.roots import ROOT_METHODS, inverse_root
from hf_precond.preconditioners.base import (
    FALLBACK,
    OptimizerInfo,
    Placement,
    Shape,
    State,
    StepContext,
    check_options,
    option,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullMatrix:
    """The whole second-moment matrix of each group."""

    # What rounding adds outside of the gradients seen so far would be scaled by up to 1 / eps.
    exact_state: ClassVar[tuple[str, ...]] = ("second_moment", "root", "exp_avg")

    max_elements: int = option(4096, "larger groups follow the fallback algorithm", low=1)
    root_interval: int = option(1, "steps between inverse roots", low=1)
    stagger: bool = option(False, "spread the inverse roots of the groups over the interval")
    eps: float = option(1e-8, "added inside the root", symbol="epsilon", low=0, low_open=True)
    root_method: str = option(
        "eigh",
        "eigendecomposition, or a Newton iteration of matrix products alone",
        choices=ROOT_METHODS,
    )

    def __post_init__(self) -> None:
        check_options(self)

    def place(self, shape: Shape) -> Placement:
        """Small groups only."""
        if shape[1] * shape[2] <= self.max_elements:
            return Placement()
        return Placement(role=FALLBACK, reason=f"more than max_elements = {self.max_elements}")

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, size = shape[0], shape[1] * shape[2]
        eye = torch.eye(size, dtype=dtype, device=device)
        return {
            "second_moment": torch.zeros(groups, size, size, dtype=dtype, device=device),
            "root": eye.expand(groups, size, size).clone(),
        }

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        flat = g_GMB.flatten(1).unsqueeze(-1)
        groups = ctx.due_groups(self.root_interval, first=1, stagger=self.stagger)
        if groups is None:
            state["second_moment"].baddbmm_(flat, flat.mT)
            return
        moment = state["second_moment"].baddbmm(flat, flat.mT)
        chosen = moment[groups]
        ridge = chosen.new_full(chosen.shape[:1], self.eps)
        root = inverse_root(chosen, 0.5, ridge, method=self.root_method)
        state["second_moment"].copy_(moment)
        state["root"][groups] = root

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        return (state["root"] @ g_GMB.flatten(1).unsqueeze(-1)).view(g_GMB.shape)


INFOS = (
    OptimizerInfo(
        name="full_matrix_adagrad",
        algorithm=FullMatrix,
        defaults={
            "root_interval": 10,
            "graft": "adam",
            "momentum_site": "gradient",
            "start_step": 11,
            "attention_grouping": "kernel",
        },
        summary="full-matrix Adagrad on tensors of a few thousand weights, AdamW on the rest",
        formula="H sums g g^T of all weights of a tensor. The direction is H^(-1/2) m.",
        paper="Duchi et al., JMLR 2011",
    ),
)
