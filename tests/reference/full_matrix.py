"""Full-matrix Adagrad of one group (Duchi et al. 2011), with the N x N matrix formed, N = m b:

    H <- H + v v^T,   d = (H + eps I)^{-1/2} vec(x),   v = vec(G),

eps inside the root as in Shampoo (Gupta et al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.row import Options, ReferenceRow


@dataclass(kw_only=True)
class FullMatrixReference:
    """One group as one vector.

    Args:
        root_interval: the root is recomputed at steps 1, 1 + T, 1 + 2T, ...
    """

    size: int
    eps: float
    root_interval: int
    step: int = 0
    second_moment: Tensor = field(init=False)  # H
    root: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.second_moment = torch.zeros(self.size, self.size, dtype=torch.float64)
        self.root = torch.eye(self.size, dtype=torch.float64)

    def update(self, grads: Tensor) -> None:
        """H <- H + v v^T and, when due, its root."""
        self.step += 1
        v = grads.flatten()
        self.second_moment = self.second_moment + torch.outer(v, v)
        if (self.step - 1) % self.root_interval == 0:
            self.root = inverse_power(self.second_moment, 0.5, ridge=self.eps)

    def apply(self, x: Tensor) -> Tensor:
        """The last root times vec(x)."""
        return (self.root @ x.flatten()).view_as(x)


def inverse_power(matrix: Tensor, exponent: float, *, ridge: float | Tensor) -> Tensor:
    """(A + ridge I)^{-exponent}, the eigenvalues of A clamped at zero."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return (vectors * (eigenvalues.clamp(min=0) + ridge) ** -exponent) @ vectors.T


def _build(options: Options, shape: tuple[int, int]) -> FullMatrixReference:
    return FullMatrixReference(
        size=shape[0] * shape[1], eps=options["eps"], root_interval=options["root_interval"]
    )


# H has at most as many nonzero eigenvalues as there were steps: a gradient that an older root has
# not seen, and an eps near rounding, would both leave the direction to chance.
_PAPER: Options = {"root_interval": 1, "eps": 1e-3}
_SETS: dict[str, Options] = {
    "paper": {},
    "root_every_second": {"root_interval": 2},
    "root_every_third": {"root_interval": 3},
    "large_eps": {"eps": 0.1},
    "newton": {"root_method": "newton", "eps": 1e-3},
    "newton_every_third": {"root_method": "newton", "eps": 1e-3, "root_interval": 3},
}

ROWS: dict[str, ReferenceRow] = {
    "full_matrix_adagrad": ReferenceRow(
        build=_build,
        paper=_PAPER,
        option_sets=_SETS,
        # At 1e8 the squares are 1e16 and their rounding far above any eps: the rank of the sum is
        # at most the number of steps, and its null space is noise to the power of -1/2.
        tolerances={"scales": 1e-2},
    )
}
