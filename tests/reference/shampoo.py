"""Shampoo (Gupta et al. 2018, Anil et al. 2020) with every tile in a loop.

A group is cut into tiles. Each tile G has a left and a right factor, started at zero:

    L <- a L + c G G^T,   R <- a R + c G^T G,   d = (L + l I)^{-e} x (R + r I)^{-e},

(a, c) = (beta2, 1 - beta2) for the mean, (1, 1) for the sum; e = 1/2 over the number of sides that
are preconditioned; ridges l, r = eps, or eps times the largest eigenvalue of the factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.full_matrix import inverse_power
from tests.reference.row import Options, ReferenceRow
from tests.reference.tiles import Tile, tiles


@dataclass(kw_only=True)
class ShampooReference:
    """One group.

    Args:
        shape: (rows, columns) of the group.
        large_dim: "one_sided" leaves a dimension over ``max_dim`` whole, and that side as it is.
        merge_dims: a tile of at most ``block_size`` entries is one column with one side.
        exponent: e; ``None`` for 1/2 over the number of sides.
        update_interval: of the factors; steps 1, 1 + T, 1 + 2T, ...
        inverse_interval: of the roots, taken after the factors of the same step.
    """

    shape: tuple[int, int]
    beta2: float
    block_size: int
    max_dim: int
    large_dim: str
    merge_dims: bool
    exponent: float | None
    accumulate: str
    update_interval: int
    inverse_interval: int
    eps: float
    eps_mode: str
    step: int = 0
    tiles: list[Tile] = field(init=False)
    factors: list[list[Tensor]] = field(init=False)  # L and R of each tile
    roots: list[list[Tensor]] = field(init=False)  # P_L and P_R of each tile

    def __post_init__(self) -> None:
        high, wide = (self.block_size if self._fits(size) else size for size in self.shape)
        self.tiles = tiles(self.shape, (high, wide))
        zeros = [self._matrix(torch.zeros(self.shape, dtype=torch.float64)[t]) for t in self.tiles]
        self.factors = [[matrix @ matrix.T, matrix.T @ matrix] for matrix in zeros]
        self.roots = [[torch.eye(size, dtype=torch.float64) for size in z.shape] for z in zeros]

    @property
    def weights(self) -> tuple[float, float]:
        """(a, c): the decay of the old factor and the weight of the new one."""
        return (1.0, 1.0) if self.accumulate == "sum" else (self.beta2, 1.0 - self.beta2)

    def update(self, grads: Tensor) -> None:
        """Moves the factors and recomputes the roots, each when due."""
        self.step += 1
        decay, weight = self.weights
        if _due(self.step, self.update_interval):
            for i, tile in enumerate(self.tiles):
                g = self._matrix(grads[tile])
                left, right = self.factors[i]
                self.factors[i] = [
                    decay * left + weight * g @ g.T,
                    decay * right + weight * g.T @ g,
                ]
        if _due(self.step, self.inverse_interval):
            self.roots = [self._roots(*factors) for factors in self.factors]

    def apply(self, x: Tensor) -> Tensor:
        """P_L x P_R of every tile, with the last roots."""
        out = torch.zeros_like(x)
        for tile, (left, right) in zip(self.tiles, self.roots, strict=True):
            out[tile] = (left @ self._matrix(x[tile]) @ right).view_as(x[tile])
        return out

    def _matrix(self, tile: Tensor) -> Tensor:
        """The tile, as one column where its dimensions are merged."""
        merged = self.merge_dims and tile.numel() <= self.block_size
        return tile.reshape(-1, 1) if merged else tile

    def _fits(self, size: int) -> bool:
        return self.large_dim != "one_sided" or size <= self.max_dim

    def _roots(self, left: Tensor, right: Tensor) -> list[Tensor]:
        """P_L and P_R; the identity for a side that is not preconditioned."""
        merged = self.merge_dims and len(left) * len(right) <= self.block_size and len(right) == 1
        sides = [self._fits(len(left)), self._fits(len(right)) and not merged]
        exponent = 0.5 / max(1, sum(sides)) if self.exponent is None else self.exponent
        return [
            self._root(factor, exponent) if side else torch.eye(len(factor), dtype=factor.dtype)
            for factor, side in zip((left, right), sides, strict=True)
        ]

    def _root(self, factor: Tensor, exponent: float) -> Tensor:
        """(A + ridge I)^{-e}; zero for a zero factor without an absolute ridge."""
        if self.eps_mode == "absolute":
            return inverse_power(factor, exponent, ridge=self.eps)
        largest = torch.linalg.eigvalsh(factor)[-1]
        if largest <= 0:
            return torch.zeros_like(factor)
        return inverse_power(factor, exponent, ridge=self.eps * largest)


def _due(step: int, interval: int) -> bool:
    return (step - 1) % interval == 0


def _build(options: Options, shape: tuple[int, int]) -> ShampooReference:
    same = (
        "block_size",
        "max_dim",
        "large_dim",
        "merge_dims",
        "exponent",
        "accumulate",
        "update_interval",
        "inverse_interval",
        "eps",
        "eps_mode",
    )
    return ShampooReference(
        shape=shape, beta2=options["betas"][1], **{key: options[key] for key in same}
    )


# A root ten steps old has the inverse of the ridge wherever the gradients were yet to go.
_PAPER: Options = {"inverse_interval": 2}
_NEWTON: Options = {"root_method": "newton", "eps_mode": "absolute", "eps": 1e-3}
_ONE_SIDED: Options = {"large_dim": "one_sided", "max_dim": 4}
_SETS: dict[str, Options] = {
    "paper": {},
    "small_tiles": {"block_size": 3},
    "tiles_of_two": {"block_size": 2},
    "tiles_of_one": {"block_size": 1},
    "sum": {"accumulate": "sum"},
    "sum_small_tiles": {"accumulate": "sum", "block_size": 3},
    "square_root": {"exponent": 0.5},
    "eighth_root": {"exponent": 0.125, "block_size": 3},
    "absolute_eps": {"eps_mode": "absolute"},
    "absolute_eps_small_tiles": {"eps_mode": "absolute", "block_size": 3},
    "large_eps": {"eps": 0.1},
    "short_memory": {"betas": (0.8, 0.6)},
    "inverse_every_step": {"inverse_interval": 1},
    "inverse_every_third": {"inverse_interval": 3, "block_size": 3},
    "inverse_every_tenth": {"inverse_interval": 10},
    "factors_every_third": {"update_interval": 3, "inverse_interval": 1},
    "both_intervals": {"update_interval": 3, "inverse_interval": 2},
    "roots_after_factors": {"update_interval": 2, "inverse_interval": 4, "accumulate": "sum"},
    "one_sided": _ONE_SIDED,
    "one_sided_small_tiles": {**_ONE_SIDED, "block_size": 3},
    "one_sided_exponent": {**_ONE_SIDED, "exponent": 0.25, "block_size": 2},
    "no_side": {**_ONE_SIDED, "max_dim": 2, "block_size": 2},
    "merged": {"merge_dims": True, "block_size": 64},
    "merged_where_small": {"merge_dims": True, "block_size": 20},
    "merged_exponent": {"merge_dims": True, "block_size": 64, "exponent": 0.25},
    "merged_absolute_eps": {"merge_dims": True, "block_size": 64, "eps_mode": "absolute"},
    "newton": _NEWTON,
    "newton_small_tiles": {**_NEWTON, "block_size": 3},
    "newton_square_root": {**_NEWTON, "exponent": 0.5},
    "newton_one_sided": {**_NEWTON, **_ONE_SIDED},
    "newton_merged": {**_NEWTON, "merge_dims": True, "block_size": 64},
}

ROWS: dict[str, ReferenceRow] = {
    "shampoo": ReferenceRow(build=_build, paper=_PAPER, option_sets=_SETS)
}
