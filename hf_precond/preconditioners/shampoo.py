"""Shampoo: one second-moment matrix for the rows and one for the columns of each tile.

Gupta, Koren, Singer: Shampoo (ICML 2018); Anil et al.: Scalable Second Order Optimization for Deep
Learning (2020). L <- a L + c G G^T, R <- a R + c G^T G, direction L^(-1/4) G R^(-1/4).

    paper   here
    L, R    left, right            [G, M, M], [G, B, B]
    -1/4    left_root, right_root  the inverse roots, identities at first

Matrices are cut into tiles of at most ``block_size`` rows and columns; equal tiles of all layers
share one batched root. The ridge is relative to the largest eigenvalue, so that the step does not
depend on the scale of the gradient; in float32 it is not below 1e-6 of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.roots import ROOT_METHODS, inverse_root, root_order
from hf_precond.preconditioners.base import (
    GRAFT,
    OptimizerInfo,
    Placement,
    Shape,
    State,
    StepContext,
    check_options,
    option,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shampoo:
    """Kronecker factors per tile, and their inverse roots."""

    exact_state: ClassVar[tuple[str, ...]] = ("left", "right")

    block_size: int = option(1024, "largest tile; remainders make smaller tiles", low=1)
    max_dim: int = option(4096, "a matrix with a larger dimension is a large one", low=1)
    large_dim: str = option(
        "graft",
        "a large matrix takes the graft partner's step, or is preconditioned on its other side",
        choices=("graft", "one_sided"),
    )
    merge_dims: bool = option(False, "a tile of at most block_size entries is taken as one vector")
    exponent: float | None = option(
        None,
        "of the inverse roots (none: one over twice the number of sides)",
        low=0,
        low_open=True,
    )
    accumulate: str = option("ema", "factors as a moving average or a sum", choices=("ema", "sum"))
    beta2: float = option(0.999, "decay of the factors", symbol="beta2", low=0, high=1)
    update_interval: int = option(1, "steps between updates of the factors", low=1)
    inverse_interval: int = option(10, "steps between inverse roots", low=1)
    stagger: bool = option(False, "spread the inverse roots of the tiles over the interval")
    eps: float = option(1e-6, "ridge under the roots", symbol="epsilon", low=0, low_open=True)
    eps_mode: str = option(
        "relative",
        "ridge as a share of the largest eigenvalue, or as it is",
        choices=("relative", "absolute"),
    )
    root_method: str = option(
        "eigh",
        "eigendecomposition, or a Newton iteration of matrix products alone",
        choices=ROOT_METHODS,
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_root_method(self.root_method, self.exponent)

    def place(self, shape: Shape) -> Placement:
        """Tiles; a large matrix to the graft step, or cut along its other side only."""
        _, *dims = shape
        large = [size > self.max_dim for size in dims]
        if all(large) or (any(large) and self.large_dim == "graft"):
            reason = f"a dimension over max_dim = {self.max_dim}"
            return Placement(role=GRAFT, reason=reason)
        rows, columns = (
            size if is_large else min(size, self.block_size)
            for size, is_large in zip(dims, large, strict=True)
        )
        return Placement(tile=(rows, columns))

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups = shape[0]
        state = {}
        for side, size in self._sides(shape).items():
            eye = torch.eye(size, dtype=dtype, device=device)
            state[side] = torch.zeros(groups, size, size, dtype=dtype, device=device)
            state[f"{side}_root"] = eye.expand(groups, size, size).clone()
        return state

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        sides = self._sides(g_GMB.shape)
        groups = ctx.due_groups(self.inverse_interval, first=1, stagger=self.stagger)
        factors = {side: state[side] for side in sides}
        if ctx.due(self.update_interval, refreshes=False):
            decay, weight = (1.0, 1.0) if self.accumulate == "sum" else (self.beta2, 1 - self.beta2)
            for side, factor in factors.items():
                x = self._as_columns(side, g_GMB)
                # Roots may fail and be tried again: until they are there nothing may count.
                add = factor.baddbmm_ if groups is None else factor.baddbmm
                factors[side] = add(x, x.mT, beta=decay, alpha=weight)
        if groups is None:
            return
        roots = {side: self._root(factors[side][groups], len(sides)) for side in sides}
        for side in sides:
            state[side].copy_(factors[side])
            state[f"{side}_root"][groups] = roots[side]

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        if self._is_vector(g_GMB.shape):
            flat = g_GMB.flatten(1).unsqueeze(-1)
            return (state["left_root"] @ flat).view(g_GMB.shape)
        out = state["left_root"] @ g_GMB if "left_root" in state else g_GMB
        return out @ state["right_root"] if "right_root" in state else out

    def _is_vector(self, shape: Sequence[int]) -> bool:
        return self.merge_dims and shape[1] * shape[2] <= self.block_size

    def _sides(self, shape: Sequence[int]) -> dict[str, int]:
        """The preconditioned sides of a tile and their sizes."""
        _, rows, columns = shape
        if self._is_vector(shape):
            return {"left": rows * columns}
        sizes = {"left": rows, "right": columns}
        return {side: size for side, size in sizes.items() if size <= self.max_dim}

    def _as_columns(self, side: str, g_GMB: Tensor) -> Tensor:
        """The gradient such that its Gram matrix is what the side's factor gains."""
        if self._is_vector(g_GMB.shape):
            return g_GMB.flatten(1).unsqueeze(-1)
        return g_GMB if side == "left" else g_GMB.mT

    def _root(self, factor: Tensor, order: int) -> Tensor:
        exponent = 1 / (2 * order) if self.exponent is None else self.exponent
        ridge = factor.new_full(factor.shape[:1], self.eps)
        relative = self.eps_mode == "relative"
        return inverse_root(factor, exponent, ridge, relative=relative, method=self.root_method)


def check_root_method(method: str, exponent: float | None) -> None:
    """Raises ValueError for an exponent that products of matrices cannot reach."""
    if method == "newton" and exponent is not None and root_order(exponent) is None:
        raise ValueError(
            f"exponent = {exponent!r} is not allowed with root_method = 'newton': "
            "it must be one over a whole number"
        )


INFOS = (
    OptimizerInfo(
        name="shampoo",
        algorithm=Shampoo,
        defaults={
            "graft": "adam",
            "momentum_site": "gradient",
            "start_step": 11,
            "attention_grouping": "kernel",
        },
        summary="Kronecker-factored second moments of rows and columns, in tiles",
        formula=(
            "L averages G G^T and R averages G^T G. The direction is L^(-1/4) M R^(-1/4), at "
            "the length of an Adam step."
        ),
        paper="Gupta et al., ICML 2018; Anil et al., Scalable Second Order Optimization, 2020",
    ),
)
