"""Block-diagonal Adam (AdaBlock, Yun et al. 2022): full-matrix Adam on small pieces of each row.

Every row of the group is cut into pieces of ``block_size`` entries. For the piece g of a row

    H <- beta2 H + (1 - beta2) g g^T,   d = (H / (1 - beta2^t) + eps I)^{-1/2} x.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.full_matrix import inverse_power
from tests.reference.row import Options, ReferenceRow
from tests.reference.tiles import Tile, tiles


@dataclass(kw_only=True)
class BlockAdamReference:
    """One group.

    Args:
        shape: (rows, columns) of the group.
        root_interval: roots are recomputed at steps 1, 1 + T, 1 + 2T, ...
    """

    shape: tuple[int, int]
    beta2: float
    block_size: int
    eps: float
    root_interval: int
    step: int = 0
    pieces: list[Tile] = field(init=False)  # one row high
    second_moments: list[Tensor] = field(init=False)  # H of each piece
    roots: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.pieces = tiles(self.shape, (1, self.block_size))
        identities = [
            torch.eye(columns.stop - columns.start, dtype=torch.float64)
            for _, columns in self.pieces
        ]
        self.second_moments = [torch.zeros_like(identity) for identity in identities]
        self.roots = identities

    def update(self, grads: Tensor) -> None:
        """Takes the gradient into every H and, when due, recomputes the roots."""
        self.step += 1
        for i, piece in enumerate(self.pieces):
            g = grads[piece].flatten()
            new = (1.0 - self.beta2) * torch.outer(g, g)
            self.second_moments[i] = self.beta2 * self.second_moments[i] + new
        if (self.step - 1) % self.root_interval == 0:
            correction = 1.0 - self.beta2**self.step
            self.roots = [
                inverse_power(moment / correction, 0.5, ridge=self.eps)
                for moment in self.second_moments
            ]

    def apply(self, x: Tensor) -> Tensor:
        """Every piece of x times its last root."""
        out = torch.zeros_like(x)
        for piece, root in zip(self.pieces, self.roots, strict=True):
            out[piece] = root @ x[piece].flatten()
        return out


def _build(options: Options, shape: tuple[int, int]) -> BlockAdamReference:
    same = ("block_size", "eps", "root_interval")
    return BlockAdamReference(
        shape=shape, beta2=options["betas"][1], **{key: options[key] for key in same}
    )


# Pieces short enough for their H to have full rank before the first preconditioned step: where it
# has not, a root that outlives its step divides by what is mostly rounding.
_PAPER: Options = {"block_size": 3, "start_step": 6}
_SETS: dict[str, Options] = {
    "paper": {},
    "pairs": {"block_size": 2},
    "blocks_of_four": {"block_size": 4},
    "diagonal": {"block_size": 1},
    "whole_rows": {"block_size": 64},
    "root_every_step": {"root_interval": 1},
    "root_every_third": {"root_interval": 3, "block_size": 4},
    "large_eps": {"eps": 0.1},
    "short_memory": {"betas": (0.8, 0.6)},
    "newton": {"root_method": "newton", "eps": 1e-3},
    "newton_whole_rows": {"root_method": "newton", "eps": 1e-3, "block_size": 64},
}

ROWS: dict[str, ReferenceRow] = {
    "block_adam": ReferenceRow(
        build=_build,
        paper=_PAPER,
        option_sets=_SETS,
        # Fewer gradients than weights in a block: an eps of 1e-8 bounds what is else rounding.
        tolerances={"whole_rows": 1e-6},
    )
}
