"""Adam in two low-rank bases and outside of them, with whole projectors and rotations.

One group = one matrix G [m, b]. Complete P [m, l] and Q [b, k] to projectors PP^T and QQ^T. Then

    G = PP^T G QQ^T + PP^T G (I - QQ^T) + (I - PP^T) G QQ^T + (I - PP^T) G (I - QQ^T)

The first part is looked at in the coordinates P^T . Q, the second in P^T ., the third in . Q, the
last as it is, and each goes through Adam's second moment there. No paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_precond.linalg.subspace import random_basis
from tests.reference.row import Options, ReferenceRow

SHIFT = 1e-8
NOISE = 1e-8


@dataclass(kw_only=True)
class TwoSidedBasisReference:
    """One group.

    Args:
        update_rms: root mean square of the direction; ``None``: as it comes.
        tail_ratio: root mean square of the singular values outside, at most, of that of those
            inside of both bases.
    """

    out_basis: Tensor  # P
    in_basis: Tensor  # Q
    update_interval: int
    beta2: float
    eps: float
    update_rms: float | None
    tail_ratio: float | None
    step: int = 0
    squares: list[Tensor | float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])

    def follow(self, moment: Tensor) -> None:
        """Turns the bases, when due, towards the singular vectors of what is preconditioned."""
        if self.step % self.update_interval != 0:
            return
        p, q = self.out_basis, self.in_basis
        if (p.shape[1], p.shape[0]) < (q.shape[1], q.shape[0]):
            self.in_basis, self.out_basis = _iterated(moment.T, q, p)
        else:
            self.out_basis, self.in_basis = _iterated(moment, p, q)

    def update(self, grads: Tensor) -> None:
        """Takes the gradient [m, b] of one step into the second moments."""
        self.step += 1
        self.squares = [
            self.beta2 * old + (1 - self.beta2) * part**2
            for old, part in zip(self.squares, self._parts(grads), strict=True)
        ]

    def apply(self, x: Tensor) -> Tensor:
        """The direction for a gradient or its moment."""
        unbiased = [square / (1 - self.beta2**self.step) for square in self.squares]
        floor = NOISE * sum(float(square.sum()) for square in unbiased[:3]) / x.numel()
        core, out, into, tail = (
            part / (square.clamp(min=floor).sqrt() + self.eps)
            for part, square in zip(self._parts(x), unbiased, strict=True)
        )
        p, q = self.out_basis, self.in_basis
        if self.tail_ratio is not None and core.any() and tail.any():
            known = min(core.shape)
            mean_inside = (torch.linalg.svdvals(core).square().sum() / known).sqrt()
            rest = max(1, min(x.shape) - known)
            mean_outside = (torch.linalg.svdvals(tail).square().sum() / rest).sqrt()
            share = float(self.tail_ratio * mean_inside / mean_outside)
            tail = min(1.0, max(1e-6, share)) * tail
        direction = p @ core @ q.T + p @ out + into @ q.T + tail
        if self.update_rms is None or not direction.any():
            return direction
        return self.update_rms * direction / direction.square().mean().sqrt()

    def _parts(self, x: Tensor) -> list[Tensor]:
        p, q = self.out_basis, self.in_basis
        out_rest, in_rest = (torch.eye(len(u), dtype=x.dtype) - u @ u.T for u in (p, q))
        return [p.T @ x @ q, p.T @ x @ in_rest, out_rest @ x @ q, out_rest @ x @ in_rest]


def _iterated(x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """left from x right, then right from x^T left; columns that are too many begin as zero."""
    seen = torch.zeros_like(left)
    seen[:, : right.shape[1]] = x @ right
    if not seen.any():
        return left, right
    left = _gram_schmidt(seen / seen.norm() + SHIFT * left)
    back = x.T @ left[:, : right.shape[1]]
    return left, _gram_schmidt(back / back.norm() + SHIFT * right)


def _gram_schmidt(columns: Tensor) -> Tensor:
    """The Q of a QR decomposition whose R has a positive diagonal."""
    found: list[Tensor] = []
    for y in columns.T:
        for _ in range(3):  # again and again, until it is orthogonal in all digits
            for column in found:
                y = y - column * (column @ y)
        found.append(y / y.norm())
    return torch.stack(found, dim=1)


def _build(options: Options, shape: tuple[int, int]) -> TwoSidedBasisReference:
    bases = [
        random_basis(
            size,
            min(options["rank"], size),
            seed=options["seed"] + number,
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
        for number, size in enumerate(shape)
    ]
    return TwoSidedBasisReference(
        out_basis=bases[0],
        in_basis=bases[1],
        update_interval=options["update_interval"],
        beta2=options["betas"][1],
        eps=options["eps"],
        update_rms=options["update_rms"],
        tail_ratio=options["tail_ratio"],
    )


ROWS: dict[str, ReferenceRow] = {
    "two_sided_basis": ReferenceRow(
        build=_build,
        option_sets={
            "defaults": {"rank": 32},
            "rank_one": {"rank": 1},
            "full_rank": {"rank": 64},
            "momentum_of_direction": {"momentum_site": "direction"},
            "every_third": {"update_interval": 3},
            "never_again": {"update_interval": 1000},
            "unscaled": {"update_rms": None},
            "unscaled_with_graft": {"update_rms": None, "graft": "adam"},
            "short_steps": {"update_rms": 0.01},
            "whole_tail": {"tail_ratio": None},
            "short_tail": {"tail_ratio": 0.1},
            "unscaled_with_short_tail": {"update_rms": None, "tail_ratio": 0.1},
            "betas": {"betas": (0.5, 0.7)},
            "large_eps": {"eps": 0.1},
            "another_seed": {"seed": 5},
        },
    ),
}
