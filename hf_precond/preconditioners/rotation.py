"""Bases in which AdaDiag and AdafacDiag keep their moments.

Nguyen et al. 2024 (Improving Adaptive Moment Optimization via Preconditioner Diagonalization):
every ``projection_interval`` steps the gradient's singular vectors G = P S Q^T become the bases;
moments live in P^T G (one-sided) or P^T G Q (two-sided, "++").

    P  left  [G, S, S]     Q  right  [G, L, L], two-sided only     S <= L, others are transposed

The paper leaves two choices to LAPACK that change the step after a refresh. Here the largest entry
of each left vector is positive, its right partner flipped along, and a null space is completed from
the previous basis (of the identity at first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.eigen import eigh
from hf_precond.linalg.subspace import complete_basis, fix_signs, orthogonal_iteration
from hf_precond.linalg.svd import thin_svd
from hf_precond.preconditioners.base import Shape, State, StepContext, check_options, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """Moments in bases that follow the gradient's singular vectors."""

    exact_state: ClassVar[tuple[str, ...]] = ("left", "right")

    two_sided: bool = option(False, "rotate both sides (++)")
    projection_interval: int = option(
        200, "steps between new bases (paper: 500 for vision, 200 for language)", symbol="T", low=1
    )
    basis_method: str = option(
        "svd",
        "exact singular vectors, eigenvectors of the Gram matrix in float64, or one step of "
        "orthogonal iteration",
        choices=("svd", "eigh", "qr"),
    )
    first_svd: str = option(
        "interval",
        "first bases at the end of the first interval, or from the first gradient already",
        choices=("interval", "step1"),
    )
    stagger: bool = option(False, "spread the new bases of the layers over the interval")
    rotated_momentum: bool = option(True, "keep a first moment in the bases (paper)")
    reproject_moments: bool = option(
        False, "carry the first moment over to new bases (off: as it is, the paper's)"
    )
    beta1: float = option(0.9, "decay of the first moment", low=0, high=1, high_open=True)
    beta2: float = option(0.999, "decay of the second moment", low=0, high=1, high_open=True)

    def __post_init__(self) -> None:
        check_options(self)

    def init_bases(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        """Identities, and the first moment where there is one."""
        groups, small, large = oriented(shape)
        sizes = {"left": small, "right": large} if self.two_sided else {"left": small}
        state = {
            side: torch.eye(size, dtype=dtype, device=device).expand(groups, size, size).clone()
            for side, size in sizes.items()
        }
        if self.rotated_momentum:
            state["exp_avg"] = torch.zeros(groups, small, large, dtype=dtype, device=device)
        return state

    def refresh_bases(self, state: State, g_GSL: Tensor, ctx: StepContext) -> None:
        """Takes new bases from this step's gradient, for the groups whose turn it is."""
        groups = ctx.due_groups(
            self.projection_interval, first=self.projection_interval, stagger=self.stagger
        )
        if self.first_svd == "step1" and ctx.step == 1:
            groups = slice(None)
        if groups is None:
            return
        old: State = {side: state[side][groups] for side in ("left", "right") if side in state}
        new = self._bases(old, g_GSL[groups])
        if self.reproject_moments and self.rotated_momentum:
            moment = new["left"].mT @ old["left"] @ state["exp_avg"][groups]
            if self.two_sided:
                moment = moment @ old["right"].mT @ new["right"]
            state["exp_avg"][groups] = moment
        for side, basis in new.items():
            state[side][groups] = basis

    def rotate(self, state: State, x_GSL: Tensor) -> Tensor:
        """P^T x (Q)."""
        out = state["left"].mT @ x_GSL
        return out @ state["right"] if self.two_sided else out

    def rotate_back(self, state: State, x_GSL: Tensor) -> Tensor:
        """P x (Q^T)."""
        out = state["left"] @ x_GSL
        return out @ state["right"].mT if self.two_sided else out

    def _bases(self, old: State, g: Tensor) -> State:
        if self.basis_method == "qr":
            grams = {"left": lambda: g @ g.mT, "right": lambda: g.mT @ g}
            return {side: orthogonal_iteration(grams[side](), basis) for side, basis in old.items()}
        left, right, keep = _singular_vectors(g, self.basis_method)
        signs = fix_signs(left)
        new = {"left": complete_basis(left * signs, keep, old["left"])}
        if self.two_sided:
            new["right"] = complete_basis(right * signs, keep, old["right"])
        return new


def _singular_vectors(g_GSL: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right singular vectors ``[G, S, S]`` and ``[G, L, S]``, and which are no noise."""
    noise = g_GSL.shape[-1] * torch.finfo(g_GSL.dtype).eps
    if method == "svd":
        left, values, right = thin_svd(g_GSL)
        return left, right, values > noise * values[..., :1]
    # Squares lose half the digits: in float32 the small directions would be gone.
    wide = g_GSL.double()
    values, left = (part.flip(-1) for part in eigh(wide @ wide.mT))
    values = values.clamp(min=0)
    keep = values > noise * values[..., :1]
    right = wide.mT @ left / torch.where(keep, values, torch.ones_like(values)).sqrt().unsqueeze(-2)
    return left.to(g_GSL.dtype), right.to(g_GSL.dtype), keep


def oriented(shape: Shape) -> Shape:
    """(G, S, L) with S <= L."""
    groups, rows, columns = shape
    return groups, min(rows, columns), max(rows, columns)


def orient(x_GMB: Tensor) -> Tensor:
    """``[G, M, B]`` with the smaller side first."""
    return x_GMB if x_GMB.shape[1] <= x_GMB.shape[2] else x_GMB.mT


def orient_back(x_GSL: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of :func:`orient` for a tensor that was of ``shape``."""
    return x_GSL if x_GSL.shape == shape else x_GSL.mT
