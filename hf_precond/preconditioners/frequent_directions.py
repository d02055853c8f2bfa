"""Frequent directions of the flattened gradient: Ada-FD and SON-FD.

The rows of Table 1 of Yen et al. 2023: the second moment sum_t g g^T of all N weights of a group is
kept as U diag(s) U^T + rho I of rank ell (Ghashami et al. 2016). After a gradient is added, the
ell-th eigenvalue is taken off all and goes to rho. Direction (U diag(s) U^T + (rho + eps) I)^(-p) g
with p = 1/2 (Ada-FD, Wan and Zhang 2018) or p = 1 (SON-FD, Luo et al. 2016).

    U^T, s, rho   sketch_rows [G, L, N], sketch_values [G, L], escaped_mass [G]    N = M B
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.lowrank import add_gram, inverse_power
from hf_precond.preconditioners.base import (
    OptimizerInfo,
    Shape,
    State,
    StepContext,
    check_options,
    option,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrequentDirections:
    """A frequent-directions sketch of each flattened group."""

    # What rounding adds to the momentum outside of the sketch would be scaled by up to 1 / eps.
    exact_state: ClassVar[tuple[str, ...]] = ("sketch_rows", "exp_avg")

    rank: int = option(10, "columns of the sketch", symbol="ell", low=1)
    power: float = option(0.5, "exponent of the inverse", low=0, low_open=True)
    eps: float = option(1e-8, "added to the escaped mass", low=0, low_open=True)

    def __post_init__(self) -> None:
        check_options(self)

    def effective_rank(self, shape: Shape) -> int:
        """The sketch is of the whole group: its rank does not depend on the view."""
        return self.rank

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, size = shape[0], shape[1] * shape[2]
        rank = min(self.rank, size)
        return {
            "sketch_rows": torch.zeros(groups, rank, size, dtype=dtype, device=device),
            "sketch_values": torch.zeros(groups, rank, dtype=dtype, device=device),
            "escaped_mass": torch.zeros(groups, dtype=dtype, device=device),
        }

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        ctx.due(1)  # every step, and it can fail: going well ends a streak of failures
        column = g_GMB.flatten(1).unsqueeze(-1)
        vectors, values = add_gram(
            state["sketch_rows"].mT, state["sketch_values"], column, keep=self.rank
        )
        vectors, values, lost = shrink(vectors, values, self.rank)
        state["sketch_rows"].copy_(vectors.mT)
        state["sketch_values"].copy_(values)
        state["escaped_mass"].add_(lost)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        values = state["sketch_values"]
        tail = state["escaped_mass"] + self.eps
        if values.dtype != torch.float64:
            # Below this the difference of the two powers is rounding noise.
            tail = torch.maximum(tail, 1e-6 * values[..., 0])
        x = g_GMB.flatten(1).unsqueeze(-1)
        out = inverse_power(state["sketch_rows"].mT, values, tail, x, self.power)
        return out.reshape(g_GMB.shape)


def shrink(vectors: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the ``index``-th largest eigenvalue off all; writes to ``vectors``.

    Args:
        vectors: ``[..., N, K]``, of the K largest eigenvalues.
        values: ``[..., J]`` descending, J >= K, all of the spectrum that is not zero.

    Returns:
        vectors, their values ``[..., K]``, and what was taken off, ``[...]``.
    """
    kept, count = vectors.shape[-1], values.shape[-1]
    lost = values[..., index - 1] if index <= count else values.new_zeros(values.shape[:-1])
    values = (values[..., :kept] - lost.unsqueeze(-1)).clamp(min=0)
    return vectors.mul_((values > 0).unsqueeze(-2)), values, lost


_DEFAULTS = {"graft": "adam", "momentum_site": "gradient", "attention_grouping": "kernel"}

INFOS = (
    OptimizerInfo(
        name="ada_fd",
        algorithm=FrequentDirections,
        fixed={"power": 0.5},
        defaults=_DEFAULTS,
        summary="full-matrix Adagrad of each layer in a frequent-directions sketch",
        formula=(
            "H = S^T S + r I with a sketch S of a few rows of the sum of g g^T of all weights "
            "of a layer. The direction is H^(-1/2) m."
        ),
        paper="Wan and Zhang 2018; Yen et al., NeurIPS 2023, Table 1",
    ),
    OptimizerInfo(
        name="son_fd",
        algorithm=FrequentDirections,
        fixed={"power": 1.0},
        defaults=_DEFAULTS,
        summary="online Newton of each layer in a frequent-directions sketch",
        formula=(
            "H = S^T S + r I with a sketch S of a few rows of the sum of g g^T of all weights "
            "of a layer. The direction is H^(-1) m."
        ),
        paper="Luo et al., Sketched Online Newton, NeurIPS 2016",
    ),
)
