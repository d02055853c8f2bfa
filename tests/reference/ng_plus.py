"""NG+: the gradient times the inverse of a running average of G G^T, on its smaller side.

Yang, Xu, Cui, Wen, Xu: "NG+: A Multi-Step Matrix-Product Natural Gradient Method for Deep Learning"
(2021), with the mini-batch curvature of Eq. 12. One group = one m x n matrix G:

    L <- beta L + gamma G G^T,   d = (L + lam I)^{-1} G     where m <= n   (Eq. 12 and 6)
    R <- beta R + gamma G^T G,   d = G (R + lam I)^{-1}     where m > n

with L_0 = lam I. Eq. 17 estimates G G^T from q columns (here without replacement) times n / q;
Eq. 18 keeps its diagonal blocks of size p, the last one smaller.

From samples, whose gradients G_i average to G (Eq. 4, 5 and 11), the Gram matrix is

    1/N sum_i G_i G_i^T   or   1/N sum_i G_i^T G_i,

which takes the place of L, or is averaged with it: L <- beta L + (1 - beta) new, the first one as
it is. With U = [G_1 ... G_N] / sqrt(N) that is U U^T, and (lam I + U U^T)^{-1} G is what the
Sherman-Morrison-Woodbury formula computes (Eq. 14). Sketched (Eq. 16, with its missing 1 / lam):

    C = (U^T Om^T Om U + lam I)^{-1} U^T Om^T Om G,   d = (G - U C) / lam,

Om taking q of the m rows, times sqrt(m / q).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_precond.preconditioners.schedule import Schedule
from tests.reference.columns import ReferenceColumns, gradient_columns
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
        curvature: "minibatch"; "per_sample" or "per_sample_ema": from the columns of a step.
        solver: "inverse"; "smw", the same with every position a sample of its own; "sketched".
        draw_rows: (step, m) -> the rows that Om takes; ``None``: all of them.
        authors_code: the left side always, the square root of the damping, beta 0.1, gamma 0.9 and
            L_0 = 1e-8 I.
    """

    shape: tuple[int, int]
    beta: float = 0.99
    gamma: float = 0.01
    damping: Schedule | str | float = 0.16
    damping_mode: str = "absolute"
    block_size: int | None = None
    draw: DrawColumns | None = None
    update_interval: int = 1
    curvature: str = "minibatch"
    solver: str = "inverse"
    draw_rows: DrawColumns | None = None
    authors_code: bool = False
    steps_per_epoch: float | None = None
    step: int = 0
    curvatures: list[Tensor] = field(init=False)  # L, block by block
    inverses: list[Tensor] = field(init=False)  # (L + lam I)^{-1}
    seen: bool = False  # whether samples came in

    def __post_init__(self) -> None:
        if self.authors_code:
            self.beta, self.gamma = 0.1, 0.9
        start = 1e-8 if self.authors_code else Schedule.parse(self.damping).initial
        start = start if self.damping_mode == "absolute" else 0.0
        start = start if self.curvature == "minibatch" else 0.0
        blocks = self._blocks(torch.empty(self.shape, dtype=torch.float64))
        self.curvatures = [start * torch.eye(len(block), dtype=block.dtype) for block in blocks]
        self.inverses = [self._inverse(curvature) for curvature in self.curvatures]

    def update(self, grads: Tensor, columns: ReferenceColumns | None = None) -> None:
        """Takes the gradient of one step into the curvature, where that is due.

        Args:
            columns: for a curvature from samples, which stays if there are none (``count`` 0).
                ``None``: made up from the gradient.
        """
        self.step += 1
        if (self.step - 1) % self.update_interval:
            return
        if self.curvature == "minibatch":
            self.curvatures = [
                self.beta * curvature + self.gamma * self._square(block)
                for curvature, block in zip(self.curvatures, self._blocks(grads), strict=True)
            ]
            self.inverses = [self._inverse(curvature) for curvature in self.curvatures]
        else:
            columns = gradient_columns(grads) if columns is None else columns
            if columns.count:
                self._take_samples(columns)

    def _take_samples(self, columns: ReferenceColumns) -> None:
        """L from the gradients of the samples, and what applies it."""
        if self.solver != "inverse":
            columns = columns.positions_as_samples()
        samples = [self._blocks(g) for g in columns.sample_gradients()]
        new = [
            sum(map(self._square, blocks)) / len(samples) for blocks in zip(*samples, strict=True)
        ]
        if self.curvature == "per_sample_ema" and self.seen:
            pairs = zip(self.curvatures, new, strict=True)
            new = [self.beta * old + (1.0 - self.beta) * gram for old, gram in pairs]
        self.curvatures, self.seen = new, True
        if self.solver == "sketched":
            stacked = zip(*samples, strict=True)
            roots = [torch.cat(blocks, dim=1) / len(samples) ** 0.5 for blocks in stacked]
            self.inverses = list(map(self._sketched_inverse, roots, new))
        else:
            self.inverses = list(map(self._inverse, new))

    def _sketched_inverse(self, u: Tensor, curvature: Tensor) -> Tensor:
        """What takes G to d (Eq. 16)."""
        if self.draw is not None:
            raise NotImplementedError("one sketch at a time")
        m = len(u)
        eye, lam = torch.eye(m, dtype=u.dtype), self._damping(curvature)
        drawn = torch.arange(m) if self.draw_rows is None else self.draw_rows(self.step, m)
        om = (m / len(drawn)) ** 0.5 * eye[drawn]
        if lam == 0.0:
            return torch.eye(len(curvature), dtype=curvature.dtype)
        inner = u.T @ om.T @ om @ u + lam * torch.eye(u.shape[1], dtype=u.dtype)
        return (eye - u @ torch.linalg.solve(inner, u.T @ om.T @ om)) / lam

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
        """(L + lam I)^{-1}, the identity where there is no curvature to be relative to."""
        lam = self._damping(curvature)
        if lam == 0.0:
            return torch.eye(len(curvature), dtype=curvature.dtype)
        return torch.linalg.inv(curvature + lam * torch.eye(len(curvature), dtype=curvature.dtype))

    def _damping(self, curvature: Tensor) -> float:
        step = max(self.step, 1)
        lam = Schedule.parse(self.damping).at(step, lambda: (step - 1) / self.steps_per_epoch)
        lam = lam**0.5 if self.authors_code else lam
        if self.damping_mode == "relative":
            lam *= torch.linalg.eigvalsh(curvature)[-1].item()
        return lam


def _build(
    options: Options, shape: tuple[int, int], curvature: str = "minibatch"
) -> NgPlusReference:
    """The reference under an optimizer's flat options, of which a row may have fixed some."""

    def draw(option: str) -> DrawColumns | None:
        def first(step: int, n: int) -> Tensor:
            rng = torch.Generator().manual_seed(options["seed"] + 1_000_003 * step)
            return torch.randperm(n, generator=rng)[: options[option]]

        return None if options.get(option) is None else first

    same = ("beta", "gamma", "damping", "damping_mode", "block_size", "update_interval")
    return NgPlusReference(
        shape=shape,
        curvature=options.get("curvature", curvature),
        solver=options.get("solver", "inverse"),
        draw=draw("sketch_size"),
        draw_rows=draw("sketch_rows"),
        steps_per_epoch=options.get("steps_per_epoch"),
        authors_code=options["authors_code"],
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

_SAMPLES: dict[str, Options] = {
    "per_sample": {},
    "per_sample_every_third": {"update_interval": 3},
    "per_sample_relative": {"damping_mode": "relative"},
    "per_sample_damping_schedule": {"damping": "0.16/0.08@step5", "update_interval": 3},
    "per_sample_blocks_of_two": {"block_size": 2},
    "per_sample_blocks_relative": {"block_size": 2, "damping_mode": "relative"},
    "per_sample_sketch": {"sketch_size": 2},
    "per_sample_sketch_of_blocks": {"sketch_size": 3, "block_size": 2, "update_interval": 3},
    "per_sample_sketch_with_another_seed": {"sketch_size": 2, "seed": 5},
    "per_sample_authors_code": {"authors_code": True},
    "per_sample_authors_code_relative": {"authors_code": True, "damping_mode": "relative"},
    "smw": {"solver": "smw"},
    "smw_every_third": {"solver": "smw", "update_interval": 3},
    "smw_relative": {"solver": "smw", "damping_mode": "relative"},
    "smw_damping_schedule": {
        "solver": "smw",
        "damping": "0.16/0.08@step5",
        "update_interval": 3,
    },
    "smw_authors_code": {"solver": "smw", "authors_code": True},
    "sketched_solver": {"solver": "sketched", "sketch_rows": 2},
    "sketched_solver_every_third": {
        "solver": "sketched",
        "sketch_rows": 3,
        "update_interval": 3,
    },
    "sketched_solver_relative": {
        "solver": "sketched",
        "sketch_rows": 2,
        "damping_mode": "relative",
    },
    "sketched_solver_with_another_seed": {"solver": "sketched", "sketch_rows": 2, "seed": 5},
    "sketched_solver_exactly": {"solver": "sketched", "sketch_rows": 64},
}
_EMA: dict[str, Options] = {
    "per_sample_ema": {},
    "per_sample_ema_short": {"beta": 0.5},
    "per_sample_ema_every_third": {"update_interval": 3, "beta": 0.8},
    "per_sample_ema_relative": {"damping_mode": "relative", "beta": 0.8},
    "per_sample_ema_blocks": {"block_size": 2, "beta": 0.8},
    "per_sample_ema_sketch": {"sketch_size": 2, "beta": 0.8},
    "per_sample_ema_authors_code": {"authors_code": True},
}
_CURVATURE_SETS: dict[str, Options] = {
    **{label: {"curvature": "per_sample", **options} for label, options in _SAMPLES.items()},
    **{label: {"curvature": "per_sample_ema", **options} for label, options in _EMA.items()},
}
ROWS: dict[str, ReferenceRow] = {
    "ng_plus": ReferenceRow(build=_build, option_sets=_SETS | _CURVATURE_SETS),
    "ng_plus_per_sample": ReferenceRow(
        build=lambda options, shape: _build(options, shape, "per_sample"),
        paper={"damping": "0.16", "damping_mode": "absolute", "graft": "none"},
        option_sets=_SAMPLES,
    ),
}
