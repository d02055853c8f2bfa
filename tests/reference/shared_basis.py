"""Shared-basis block low-rank Adagrad and Adam, with every b x b matrix formed.

One group = one matrix of m gradients g_i in R^b (its rows). Second moment of block i:

    H_i <- a H_i + c g_i g_i^T,   (a, c) = (1, 1) for Adagrad, (beta2, 1 - beta2) for the Adam form,

approximated by Q R_i Q^T + rho_i I with a basis Q all blocks share. Every quantity is evaluated
from its definition (paper: Algorithm 1, equations 4 to 6), in Python loops over groups and blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt

import torch
from torch import Tensor

from hf_precond.linalg.subspace import random_basis
from tests.reference.row import Options, ReferenceRow

SHIFT = 1e-8  # delta of the power iteration in float64
DrawStart = Callable[[int], Tensor]


@dataclass(kw_only=True)
class SharedBasisReference:
    """One group of blocks.

    Args:
        rank: k, at most b.
        draw_start: step -> orthonormal [b, k + p], p at most b - k. The first power iteration
            starts from ``draw_start(0)``; without ``warm_start`` that of step t from step t's.
        beta2: ``None`` for the sum (Adagrad).
        basis_from: "second_moments": A = sum_i M_i M_i^T; "moment": X^T X of what is
            preconditioned.
        pool: p, share of all blocks' common shape in each block's coefficients under the root.
        coef_interval: between basis updates, coefficients move at these steps (``None``: never).
        root_interval: ``None`` recomputes the inverse roots whenever coefficients moved. A root
            that outlives its basis is projected onto the new one.
    """

    rank: int
    draw_start: DrawStart
    beta2: float | None = None
    num_iters: int = 1
    warm_start: bool = True
    deflate: bool = True
    escaped_norm: str = "block"
    tail: str = "isotropic"
    basis_from: str = "second_moments"
    update_interval: int = 1
    coef_interval: int | None = None
    root_interval: int | None = None
    eps: float = 1e-8
    pool: float = 0.0
    step: int = 0
    columns: Tensor = field(init=False)  # the k + p iterated ones; the basis is the first k
    coef: list[Tensor] = field(init=False)
    escaped_mass: list[Tensor] = field(init=False)
    excess_roots: list[Tensor] = field(init=False)  # (R_i + c_i I)^{-1/2} - c_i^{-1/2} I
    tail_roots: list[Tensor] = field(init=False)  # c_i^{-1/2}
    moment: Tensor = field(init=False)
    tail_sq: list[Tensor] = field(init=False)  # second moments of (I - QQ^T) g_i, per weight

    @property
    def weights(self) -> tuple[float, float]:
        """(a, c): the decay of the old second moment and the weight of the new gradient."""
        return (1.0, 1.0) if self.beta2 is None else (self.beta2, 1.0 - self.beta2)

    @property
    def basis(self) -> Tensor:
        """Q, [b, k]."""
        return self.columns[:, : self.rank]

    def follow(self, moment: Tensor) -> None:
        """Tells what will be preconditioned in the next step."""
        self.moment = moment

    def update(self, grads: Tensor) -> None:
        """Takes the gradients [m, b] of one step into the statistics."""
        self.step += 1
        if self.step == 1:
            self._allocate(grads)
        basis_moves = _due(self.step, self.update_interval)
        coef_moves = basis_moves or _due(self.step, self.coef_interval)
        if coef_moves:
            self._move(grads, basis_moves)
        if coef_moves if self.root_interval is None else _due(self.step, self.root_interval):
            self._recompute_roots()

    def apply(self, grads: Tensor) -> Tensor:
        """d_i = Q [(R_i + c_i I)^{-1/2} - c_i^{-1/2} I] Q^T g_i + c_i^{-1/2} g_i."""
        q = self.basis
        rows = zip(grads, self.excess_roots, self.tail_roots, strict=True)
        if self.tail == "diagonal":
            return self._apply_diagonal_tail(grads)
        return torch.stack([q @ excess @ q.T @ g + tail * g for g, excess, tail in rows])

    def _apply_diagonal_tail(self, grads: Tensor) -> Tensor:
        """d_i = Q (R_i + c_i I)^{-1/2} Q^T g_i + max(T_i + eps, c_i/100)^{-1/2} (I - QQ^T) g_i."""
        q, directions = self.basis, []
        for g, excess, tail, second in zip(
            grads, self.excess_roots, self.tail_roots, self.tail_sq, strict=True
        ):
            inside = q @ (excess + tail * torch.eye(self.rank, dtype=g.dtype)) @ q.T @ g
            scale = torch.maximum(second + self.eps, 0.01 * tail**-2).rsqrt()
            directions.append(inside + scale * (g - q @ q.T @ g))
        return torch.stack(directions)

    def _allocate(self, grads: Tensor) -> None:
        self.columns = self.draw_start(0)
        self.coef = [grads.new_zeros(self.rank, self.rank) for _ in grads]
        self.escaped_mass = [grads.new_zeros(()) for _ in grads]
        self.tail_sq = [torch.zeros_like(g) for g in grads]
        self._recompute_roots()

    def _move(self, grads: Tensor, basis_moves: bool) -> None:
        decay, weight = self.weights
        moments = [  # M_i = a Q R_i Q^T + c g_i g_i^T
            decay * self.basis @ coef @ self.basis.T + weight * torch.outer(g, g)
            for coef, g in zip(self.coef, grads, strict=True)
        ]
        if basis_moves:
            followed = sum(moment @ moment.T for moment in moments)
            if self.basis_from == "moment":
                followed = self.moment.T @ self.moment
            self._move_basis(followed)
        for i, moment in enumerate(moments):
            projected = self.basis.T @ moment @ self.basis
            smallest = torch.linalg.eigvalsh(projected)[0].clamp(min=0)
            deflated = smallest if self.deflate and basis_moves else torch.zeros_like(smallest)
            self.coef[i] = _clamp_eigenvalues(
                projected - deflated * torch.eye(self.rank, dtype=grads.dtype)
            )
            norm = self._norm(moment, self.coef[i], deflated)
            outside = grads[i] - self.basis @ self.basis.T @ grads[i]
            self.tail_sq[i] = decay * self.tail_sq[i] + weight * outside**2
            self.escaped_mass[i] = decay * self.escaped_mass[i] + norm

    def _move_basis(self, a: Tensor) -> None:
        """Power iteration on A, then the Ritz vectors of A in its result, largest first."""
        before = self.basis
        y = self.columns if self.warm_start else self.draw_start(self.step)
        if a.any():
            for _ in range(self.num_iters):
                y = torch.linalg.qr(a @ y + SHIFT * a.trace() * y).Q
            y = y @ torch.linalg.eigh(y.T @ a @ y).eigenvectors.flip(-1)
        self.columns = y
        overlap = self.basis.T @ before
        self.excess_roots = [overlap @ excess @ overlap.T for excess in self.excess_roots]

    def _norm(self, moment: Tensor, coef: Tensor, deflated: Tensor) -> Tensor:
        """||M_i - Q R_i Q^T||_2, its bound from block norms, or the mean eigenvalue outside Q."""
        inside = self.basis @ self.basis.T
        outside = torch.eye(len(inside), dtype=inside.dtype) - inside
        if self.escaped_norm == "exact":
            return torch.linalg.matrix_norm(moment - self.basis @ coef @ self.basis.T, ord=2)
        if self.escaped_norm == "mean":
            dimensions = max(1, len(inside) - self.rank)
            return deflated + (outside @ moment @ outside).trace() / dimensions
        off = torch.linalg.matrix_norm(self.basis.T @ moment @ outside)
        rest = torch.linalg.matrix_norm(outside @ moment @ outside)
        return (deflated + rest) / 2 + torch.hypot((deflated - rest) / 2, off)

    def _pooled(self) -> list[Tensor]:
        """(1 - p) R_i + p tr(R_i) sum_j R_j / tr(sum_j R_j)."""
        total = sum(self.coef)
        if total.trace() == 0:
            return self.coef
        common = total / total.trace()
        return [(1 - self.pool) * coef + self.pool * coef.trace() * common for coef in self.coef]

    def _recompute_roots(self) -> None:
        self.excess_roots, self.tail_roots = [], []
        for coef, mass in zip(self._pooled(), self.escaped_mass, strict=True):
            eigenvalues, vectors = torch.linalg.eigh(coef)
            tail = (mass + self.eps).rsqrt()
            excess = (eigenvalues + mass + self.eps).rsqrt() - tail
            self.excess_roots.append((vectors * excess) @ vectors.T)
            self.tail_roots.append(tail)


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and (step - 1) % interval == 0


def _clamp_eigenvalues(matrix: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * eigenvalues.clamp(min=0)) @ vectors.T


def _build(options: Options, shape: tuple[int, int], *, ema: bool) -> SharedBasisReference:
    size = shape[1]
    cap = isqrt(int(options["max_rank_ratio"] * size))  # m k^2 <= ratio * m b
    rank = max(1, min(options["rank"], size, cap))
    width = min(rank + options["oversample"], size)

    def draw_start(step: int) -> Tensor:
        seed = options["seed"] + 1_000_003 * step
        return random_basis(size, width, seed=seed, dtype=torch.float64, device=torch.device("cpu"))

    same = (
        "num_iters",
        "warm_start",
        "deflate",
        "escaped_norm",
        "tail",
        "basis_from",
        "update_interval",
        "coef_interval",
        "root_interval",
        "eps",
        "pool",
    )
    return SharedBasisReference(
        rank=rank,
        draw_start=draw_start,
        beta2=options["betas"][1] if ema else None,
        **{key: options[key] for key in same},
    )


_PAPER: Options = {
    "escaped_norm": "block",
    "deflate": True,
    "tail": "isotropic",
    "root_interval": None,
    "eps": 1e-8,
    "graft": "rmsprop_normalized",
    "momentum_site": "direction",
    "start_step": 1,
}
_SETS: dict[str, Options] = {
    "paper": {},
    "registered_defaults": {
        "escaped_norm": "mean",
        "deflate": False,
        "tail": "diagonal",
        "root_interval": 10,
        "graft": "adam",
        "momentum_site": "gradient",
        "start_step": 11,
    },
    "three_iterations": {"num_iters": 3},
    "oversampled": {"oversample": 2},
    "cold_start": {"warm_start": False},
    "no_deflation": {"deflate": False},
    "exact_norm": {"escaped_norm": "exact"},
    "mean_outside": {"escaped_norm": "mean", "deflate": False},
    "diagonal_tail": {"tail": "diagonal"},
    "diagonal_tail_intervals": {
        "tail": "diagonal",
        "escaped_norm": "mean",
        "deflate": False,
        "update_interval": 4,
        "coef_interval": 1,
        "root_interval": 2,
    },
    "mean_outside_intervals": {"escaped_norm": "mean", "update_interval": 3, "coef_interval": 1},
    "packed": {"packed": True},
    "follows_the_gradient": {"basis_from": "moment"},
    "follows_the_momentum": {"basis_from": "moment", "momentum_site": "gradient"},
    "follows_the_momentum_at_intervals": {
        "basis_from": "moment",
        "momentum_site": "gradient",
        "num_iters": 2,
        "oversample": 1,
        "update_interval": 2,
        "coef_interval": 1,
    },
    "pooled": {"pool": 1.0},
    "half_pooled": {"pool": 0.5},
    "pooled_registered": {
        "pool": 1.0,
        "escaped_norm": "mean",
        "deflate": False,
        "tail": "diagonal",
        "root_interval": 3,
    },
    "pooled_packed_deflated": {"pool": 0.7, "packed": True, "root_interval": 2},
    "rank_one": {"rank": 1},
    "full_rank": {"rank": 64, "max_rank_ratio": 64.0},
    "capped_rank": {"rank": 64, "max_rank_ratio": 0.5},
    "large_eps": {"eps": 0.1},
    "another_seed": {"seed": 5},
    "every_third": {"update_interval": 3},
    "coefficients_every_step": {"update_interval": 4, "coef_interval": 1},
    "coefficients_every_second": {"update_interval": 6, "coef_interval": 2, "deflate": False},
    "late_roots": {"root_interval": 4},
    "late_roots_packed": {"root_interval": 3, "update_interval": 2, "packed": True},
    "all_intervals": {"update_interval": 5, "coef_interval": 2, "root_interval": 3},
}

ROWS: dict[str, ReferenceRow] = {
    "shared_basis_adagrad": ReferenceRow(
        build=lambda options, shape: _build(options, shape, ema=False),
        paper=_PAPER,
        option_sets=_SETS,
    ),
    "shared_basis_adam": ReferenceRow(
        build=lambda options, shape: _build(options, shape, ema=True),
        paper=_PAPER,
        option_sets=_SETS,
    ),
}
