"""Block Adam: a full second-moment matrix for every few weights of an output neuron.

AdaBlock (Yun et al. 2022), the block-diagonal baseline of paper Yen et al. 2023:
H <- beta2 H + (1 - beta2) g g^T over blocks of ``block_size`` inputs of one neuron, direction
(H / (1 - beta2^t) + eps I)^(-1/2) m with m the momentum of the gradient.

    second_moment  [G, M, Q, Q]    root  [G, M, Q, Q], identities at first

The weights of a neuron are cut into tiles of Q = ``block_size`` (paper: 10 and 8); a remainder
makes a smaller block. Deviation: roots are recomputed every ``root_interval`` steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.roots import ROOT_METHODS, inverse_root
from hf_precond.preconditioners.base import (
    OptimizerInfo,
    Placement,
    Shape,
    State,
    StepContext,
    check_options,
    option,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAdam:
    """Full-matrix Adam over small blocks of each row."""

    exact_state: ClassVar[tuple[str, ...]] = ("second_moment",)

    rows_may_split: ClassVar[bool] = True

    block_size: int = option(8, "weights of a block; the last of a row may be smaller", low=1)
    root_interval: int = option(1, "steps between inverse roots", low=1)
    stagger: bool = option(False, "spread the inverse roots of the layers over the interval")
    beta2: float = option(
        0.999, "decay of the second moments", symbol="beta2", low=0, high=1, high_open=True
    )
    eps: float = option(1e-8, "added inside the root", symbol="epsilon", low=0, low_open=True)
    root_method: str = option(
        "eigh",
        "eigendecomposition, or a Newton iteration of matrix products alone",
        choices=ROOT_METHODS,
    )

    def __post_init__(self) -> None:
        check_options(self)

    def place(self, shape: Shape) -> Placement:
        """Whole rows of tiles, ``block_size`` wide."""
        return Placement(tile=(shape[1], self.block_size))

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        size = shape[-1]
        eye = torch.eye(size, dtype=dtype, device=device)
        return {
            "second_moment": torch.zeros(*shape, size, dtype=dtype, device=device),
            "root": eye.expand(*shape, size).clone(),
        }

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        groups = ctx.due_groups(self.root_interval, first=1, stagger=self.stagger)
        left, right = g_GMB.unsqueeze(-1), g_GMB.unsqueeze(-2)
        if groups is None:
            state["second_moment"].mul_(self.beta2).addcmul_(left, right, value=1 - self.beta2)
            return
        moment = (self.beta2 * state["second_moment"]).addcmul_(left, right, value=1 - self.beta2)
        unbiased = moment[groups] / (1 - self.beta2**ctx.step)
        ridge = unbiased.new_full(unbiased.shape[:2], self.eps)
        root = inverse_root(unbiased, 0.5, ridge, method=self.root_method)
        state["second_moment"].copy_(moment)
        state["root"][groups] = root

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        return (state["root"] @ g_GMB.unsqueeze(-1)).squeeze(-1)


INFOS = (
    OptimizerInfo(
        name="block_adam",
        algorithm=BlockAdam,
        defaults={
            "root_interval": 10,
            "graft": "adam",
            "momentum_site": "gradient",
            "start_step": 11,
            "attention_grouping": "kernel",
        },
        summary="full-matrix Adam over small blocks inside each output neuron",
        formula=(
            "H_j averages g_j g_j^T of every block j of a few weights of one neuron. The "
            "direction is H_j^(-1/2) m_j, at the length of an Adam step."
        ),
        paper="Yun et al., AdaBlock, 2022",
    ),
)
