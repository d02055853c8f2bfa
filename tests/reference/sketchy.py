"""Sketchy (Feinberg et al. 2023): Shampoo whose factors are frequent-directions sketches.

Each side of a tile G, with C = G G^T or G^T G, is U diag(s) U^T + rho I. With w_1 >= w_2 >= ... the
eigenvalues of beta2 U diag(s) U^T + (1 - beta2) C,

    s_j <- w_j - w_rank,   rho <- tail rho + w_rank,   d = P_L x P_R,
    P = (U diag(s) U^T + (rho + ridge) I)^{-1/4},   ridge = eps (s_1 + rho).

The authors' program adds C unscaled, subtracts the eigenvalue after the last it keeps, and decays
the tail by sqrt(beta2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor

from tests.reference.frequent_directions import Sketch
from tests.reference.row import Options, ReferenceRow
from tests.reference.tiles import Tile, tiles


@dataclass(kw_only=True)
class SketchyReference:
    """One group.

    Args:
        shape: (rows, columns) of the group.
        tail_decay: ``None`` for beta2, or its square root in the authors' program.
        update_interval: of the sketches; steps 1, 1 + T, 1 + 2T, ...
    """

    shape: tuple[int, int]
    beta2: float
    rank: int
    block_size: int
    tail_decay: float | None
    authors_code: bool
    eps: float
    update_interval: int
    step: int = 0
    tiles: list[Tile] = field(init=False)
    sketches: list[list[Sketch]] = field(init=False)  # left and right of each tile

    def __post_init__(self) -> None:
        self.tiles = tiles(self.shape, (self.block_size, self.block_size))
        subtracted = self.rank + 1 if self.authors_code else self.rank
        self.sketches = [
            [
                Sketch(size=cut.stop - cut.start, rank=self.rank, subtracted=subtracted)
                for cut in tile
            ]
            for tile in self.tiles
        ]

    def update(self, grads: Tensor) -> None:
        """Adds the factors of every tile to their sketches, when due."""
        self.step += 1
        if (self.step - 1) % self.update_interval != 0:
            return
        weight = 1.0 if self.authors_code else 1.0 - self.beta2
        for tile, sketches in zip(self.tiles, self.sketches, strict=True):
            g = grads[tile]
            for sketch, factor in zip(sketches, (g @ g.T, g.T @ g), strict=True):
                sketch.add(weight * factor, decay=self.beta2, tail_decay=self._tail_decay())

    def apply(self, x: Tensor) -> Tensor:
        """P_L x P_R of every tile."""
        if self.step == 0:
            return x
        out = torch.zeros_like(x)
        for tile, (left, right) in zip(self.tiles, self.sketches, strict=True):
            out[tile] = self._root(left) @ x[tile] @ self._root(right)
        return out

    def _tail_decay(self) -> float:
        if self.tail_decay is not None:
            return self.tail_decay
        return sqrt(self.beta2) if self.authors_code else self.beta2

    def _root(self, sketch: Sketch) -> Tensor:
        largest = sketch.values[0] + sketch.tail
        if largest == 0:
            return torch.zeros(sketch.size, sketch.size, dtype=torch.float64)
        return sketch.inverse_power(0.25, ridge=self.eps * largest)


def _build(options: Options, shape: tuple[int, int]) -> SketchyReference:
    same = ("rank", "block_size", "tail_decay", "authors_code", "eps", "update_interval")
    return SketchyReference(
        shape=shape, beta2=options["betas"][1], **{key: options[key] for key in same}
    )


_SETS: dict[str, Options] = {
    "paper": {},
    "small_tiles": {"block_size": 3},
    "tiles_of_one": {"block_size": 1},
    "rank_one": {"rank": 1},
    "rank_one_small_tiles": {"rank": 1, "block_size": 3},
    "rank_of_a_tile": {"rank": 3, "block_size": 3},
    "full_rank": {"rank": 64},
    "full_rank_small_tiles": {"rank": 64, "block_size": 3},
    "tail_kept": {"tail_decay": 1.0},
    "tail_between": {"betas": (0.9, 0.8), "tail_decay": 0.95},
    "short_memory": {"betas": (0.8, 0.6), "block_size": 3},
    "large_eps": {"eps": 0.1},
    "every_third": {"update_interval": 3},
    "every_third_small_tiles": {"update_interval": 3, "block_size": 3, "tail_decay": 1.0},
    "authors_code": {"authors_code": True},
    "authors_code_small_tiles": {"authors_code": True, "block_size": 3},
    "authors_code_rank_one": {"authors_code": True, "rank": 1},
    "authors_code_full_rank": {"authors_code": True, "rank": 64},
    "authors_code_tail_kept": {"authors_code": True, "tail_decay": 1.0},
    "authors_code_every_third": {"authors_code": True, "update_interval": 3},
}

ROWS: dict[str, ReferenceRow] = {"sketchy": ReferenceRow(build=_build, option_sets=_SETS)}
