"""Frequent directions of one group (Ghashami et al. 2016), with the N x N matrix formed, N = m b.

With v = vec(G) and w_1 >= w_2 >= ... the eigenvalues of U diag(s) U^T + v v^T,

    s_j <- w_j - w_rank,   rho <- rho + w_rank,   d = (U diag(s) U^T + (rho + eps) I)^{-p} vec(x),

U the leading eigenvectors; p = 1/2 in Ada-FD (Wan and Zhang 2021), 1 in SON-FD (Luo et al. 2016).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.row import Options, ReferenceRow


@dataclass(kw_only=True)
class Sketch:
    """U diag(s) U^T + rho I in place of a matrix of size d.

    Args:
        subtracted: the position, from one, of the eigenvalue that is subtracted from all. Beyond
            the last one nothing is subtracted.
    """

    size: int
    rank: int
    subtracted: int
    vectors: Tensor = field(init=False)  # U, [d, at most rank]
    values: Tensor = field(init=False)  # s, descending
    tail: Tensor = field(init=False)  # rho

    def __post_init__(self) -> None:
        kept = min(self.rank, self.size)
        self.vectors = torch.eye(self.size, dtype=torch.float64)[:, :kept]
        self.values = torch.zeros(kept, dtype=torch.float64)
        self.tail = torch.zeros((), dtype=torch.float64)

    def add(self, matrix: Tensor, *, decay: float = 1.0, tail_decay: float = 1.0) -> None:
        """Shrinks decay U diag(s) U^T + matrix back to the rank."""
        old = (self.vectors * self.values) @ self.vectors.T
        eigenvalues, vectors = torch.linalg.eigh(decay * old + matrix)
        w, vectors = eigenvalues.flip(0).clamp(min=0), vectors.flip(1)
        escaped = w[self.subtracted - 1] if self.subtracted <= self.size else torch.zeros_like(w[0])
        self.vectors = vectors[:, : self.rank]
        self.values = (w[: self.rank] - escaped).clamp(min=0)
        self.tail = tail_decay * self.tail + escaped

    def inverse_power(self, exponent: float, *, ridge: float | Tensor) -> Tensor:
        """U (diag(s) + c I)^{-p} U^T + c^{-p} (I - U U^T) with c = rho + ridge."""
        c = self.tail + ridge
        inside = (self.vectors * (self.values + c) ** -exponent) @ self.vectors.T
        identity = torch.eye(self.size, dtype=torch.float64)
        return inside + c**-exponent * (identity - self.vectors @ self.vectors.T)


@dataclass(kw_only=True)
class FrequentDirectionsReference:
    """One group as one vector.

    Args:
        power: p.
    """

    size: int
    rank: int
    eps: float
    power: float
    sketch: Sketch = field(init=False)

    def __post_init__(self) -> None:
        self.sketch = Sketch(size=self.size, rank=self.rank, subtracted=self.rank)

    def update(self, grads: Tensor) -> None:
        """Adds v v^T to the sketch."""
        v = grads.flatten()
        self.sketch.add(torch.outer(v, v))

    def apply(self, x: Tensor) -> Tensor:
        """(U diag(s) U^T + (rho + eps) I)^{-p} vec(x)."""
        root = self.sketch.inverse_power(self.power, ridge=self.eps)
        return (root @ x.flatten()).view_as(x)


def _build(
    options: Options, shape: tuple[int, int], *, power: float
) -> FrequentDirectionsReference:
    return FrequentDirectionsReference(
        size=shape[0] * shape[1], rank=options["rank"], eps=options["eps"], power=power
    )


_SETS: dict[str, Options] = {
    "paper": {},
    "rank_one": {"rank": 1},
    "rank_five": {"rank": 5},
    "rank_of_the_smallest": {"rank": 12, "eps": 1e-2},
    "full_rank": {"rank": 64, "eps": 0.01},
    "large_eps": {"eps": 0.1},
}

ROWS: dict[str, ReferenceRow] = {
    "ada_fd": ReferenceRow(
        build=lambda options, shape: _build(options, shape, power=0.5), option_sets=_SETS
    ),
    "son_fd": ReferenceRow(
        build=lambda options, shape: _build(options, shape, power=1.0),
        # The inverse magnifies the rounding of a sketch with fewer directions than its rank.
        paper={"eps": 1e-4},
        option_sets=_SETS,
    ),
}
