"""NG+: the gradient times the inverse of a running average of G G^T, on its smaller side.

Yang, Xu, Cui, Wen, Xu: "NG+: A Multi-Step Matrix-Product Natural Gradient Method for Deep Learning"
(2021), with the mini-batch curvature of Eq. 12. One group = one m x n matrix G:

    L <- beta L + gamma G G^T,   d = (L + lam I)^{-1} G     where m <= n   (Eq. 12 and 6)
    R <- beta R + gamma G^T G,   d = G (R + lam I)^{-1}     where m > n

with L_0 = lam I. Eq. 17 estimates G G^T from q columns (here without replacement) times n / q;
Eq. 18 keeps its diagonal blocks of size p, the last one smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.row import Options, ReferenceRow

DrawColumns = Callable[[int, int], Tensor]


@dataclass(kw_only=True)
class NgPlusReference:
    """One group.

    Args:
        damping_mode: "absolute": lam = damping; "relative": damping times the largest eigenvalue
            of the (block's) curvature, which then starts from zero.
        block_size: p; ``None``: one block.
        draw: (step, n) -> the columns of G to estimate from; ``None``: all of them.
        authors_code: the left side always, the square root of the damping, beta 0.1, gamma 0.9 and
            L_0 = 1e-8 I.
    """

    shape: tuple[int, int]
    beta: float = 0.99
    gamma: float = 0.01
    damping: float = 0.16
    damping_mode: str = "absolute"
    block_size: int | None = None
    draw: DrawColumns | None = None
    update_interval: int = 1
    authors_code: bool = False
    step: int = 0
    curvatures: list[Tensor] = field(init=False)  # L, block by block
    inverses: list[Tensor] = field(init=False)  # (L + lam I)^{-1}

    def __post_init__(self) -> None:
        if self.authors_code:
            self.beta, self.gamma, self.damping = 0.1, 0.9, self.damping**0.5
        start = 1e-8 if self.authors_code else self.damping
        start = start if self.damping_mode == "absolute" else 0.0
        blocks = self._blocks(torch.empty(self.shape, dtype=torch.float64))
        self.curvatures = [start * torch.eye(len(block), dtype=block.dtype) for block in blocks]
        self.inverses = [self._inverse(curvature) for curvature in self.curvatures]

    def update(self, grads: Tensor) -> None:
        """Takes the gradient of one step into the curvature, where that is due."""
        self.step += 1
        if (self.step - 1) % self.update_interval == 0:
            self.curvatures = [
                self.beta * curvature + self.gamma * self._square(block)
                for curvature, block in zip(self.curvatures, self._blocks(grads), strict=True)
            ]
            self.inverses = [self._inverse(curvature) for curvature in self.curvatures]

    def apply(self, x: Tensor) -> Tensor:
        """(L + lam I)^{-1} x, or x (R + lam I)^{-1}, block by block."""
        pairs = zip(self.inverses, self._blocks(x), strict=True)
        return self._oriented(torch.cat([inverse @ block for inverse, block in pairs]))

    def _oriented(self, x: Tensor) -> Tensor:
        """To the side of the curvature on the left, and back."""
        right = self.shape[0] > self.shape[1] and not self.authors_code
        return x.T if right else x

    def _blocks(self, x: Tensor) -> tuple[Tensor, ...]:
        oriented = self._oriented(x)
        return oriented.split(self.block_size or len(oriented))

    def _square(self, g: Tensor) -> Tensor:
        """G G^T, or n / q times that of q columns."""
        if self.draw is None:
            return g @ g.T
        n = g.shape[1]
        drawn = self.draw(self.step, n)
        return n / len(drawn) * g[:, drawn] @ g[:, drawn].T

    def _inverse(self, curvature: Tensor) -> Tensor:
        """(L + lam I)^{-1}, zero where there is no curvature to be relative to."""
        lam = self.damping
        if self.damping_mode == "relative":
            lam *= torch.linalg.eigvalsh(curvature)[-1].item()
        if lam == 0.0:
            return torch.zeros_like(curvature)
        return torch.linalg.inv(curvature + lam * torch.eye(len(curvature), dtype=curvature.dtype))


def _build(options: Options, shape: tuple[int, int]) -> NgPlusReference:
    def draw(step: int, n: int) -> Tensor:
        rng = torch.Generator().manual_seed(options["seed"] + 1_000_003 * step)
        return torch.randperm(n, generator=rng)[: options["sketch_size"]]

    same = ("beta", "gamma", "damping_mode", "block_size", "update_interval", "authors_code")
    return NgPlusReference(
        shape=shape,
        damping=float(str(options["damping"])),
        draw=None if options["sketch_size"] is None else draw,
        **{key: options[key] for key in same},
    )


_SETS: dict[str, Options] = {
    "paper": {},
    "every_third": {"update_interval": 3},
    "beta_gamma": {"beta": 0.7, "gamma": 0.5},
    "sum": {"beta": 1.0, "gamma": 1.0},
    "last_batch": {"beta": 0.0, "gamma": 1.0},
    "damping": {"damping": "0.5"},
    "relative": {"damping_mode": "relative"},
    "relative_every_third": {"damping_mode": "relative", "update_interval": 3, "damping": "0.01"},
    "blocks_of_two": {"block_size": 2},
    "blocks_of_three": {"block_size": 3, "update_interval": 3},
    "blocks_relative": {"block_size": 2, "damping_mode": "relative"},
    "one_large_block": {"block_size": 64},
    "sketched": {"sketch_size": 2},
    "sketched_relative": {"sketch_size": 2, "damping_mode": "relative"},
    "sketched_blocks": {"sketch_size": 3, "block_size": 2, "update_interval": 3},
    "sketched_with_another_seed": {"sketch_size": 2, "seed": 5},
    "sketched_exactly": {"sketch_size": 64},
    "authors_code": {"authors_code": True},
    "authors_code_relative": {"authors_code": True, "damping_mode": "relative"},
    "authors_code_blocks": {"authors_code": True, "block_size": 2, "update_interval": 3},
    "authors_code_sketched": {"authors_code": True, "sketch_size": 2},
}

ROWS: dict[str, ReferenceRow] = {"ng_plus": ReferenceRow(build=_build, option_sets=_SETS)}
