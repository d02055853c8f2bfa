"""SENG with the matrix of per-sample gradients formed.

Yang, Xu, Wen, Chen, Xu: "Sketch-Based Empirical Natural Gradient Methods" (2021). One group, N
samples with gradients G_i, their mean the gradient:

    U = [vec(G_1) ... vec(G_N)] / sqrt(N),   F = U U^T,
    d = (F + lam I)^{-1} g = (g - U (lam I + U^T U)^{-1} U^T g) / lam.

Sketched, the inner products U^T U and U^T g are taken over some rows of U and g: those of q_M rows
and q_B columns of the weight, each side scaled by sqrt(full / drawn).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_precond.preconditioners.schedule import Schedule
from tests.reference.columns import ReferenceColumns, gradient_columns
from tests.reference.row import Options, ReferenceRow


@dataclass(kw_only=True)
class SengReference:
    """One group.

    Args:
        damping: lam, a schedule; its value at the step of the samples counts.
        damping_mode: "absolute", or "relative": times the largest eigenvalue of the inner U^T U.
            Where lam is zero the direction is the gradient.
        sample_size: rows and columns that are drawn, with the samples; ``None``: all of them.
    """

    shape: tuple[int, int]
    damping: Schedule | str | float = 2.0
    damping_mode: str = "absolute"
    update_interval: int = 1
    sample_size: int | None = None
    seed: int = 0
    steps_per_epoch: float | None = None
    step: int = 0
    value: float = 0.0  # of the damping
    samples: Tensor = field(init=False)  # U [M B, N]
    drawn: tuple[Tensor, Tensor] = field(init=False)  # rows and columns of the weight

    def __post_init__(self) -> None:
        self.damping = Schedule.parse(self.damping)
        rows, columns = self.shape
        self.samples = torch.zeros(rows * columns, 0, dtype=torch.float64)
        self.drawn = torch.arange(rows), torch.arange(columns)

    def update(self, grads: Tensor, columns: ReferenceColumns | None = None) -> None:
        """Takes the samples of a step over, where that is due and there are any.

        Args:
            columns: ``None``: made up from the gradient.
        """
        self.step += 1
        columns = gradient_columns(grads) if columns is None else columns
        if (self.step - 1) % self.update_interval or not columns.count:
            return
        vectors = [g.flatten() for g in columns.sample_gradients()]
        self.samples = torch.stack(vectors, dim=1) / len(vectors) ** 0.5
        rng = torch.Generator().manual_seed(self.seed + 1_000_003 * self.step)
        of_columns, of_rows = (
            torch.randperm(size, generator=rng)[: self.sample_size]
            for size in (self.shape[1], self.shape[0])
        )
        self.drawn = of_rows, of_columns
        self.value = self.damping.at(self.step, lambda: (self.step - 1) / self.steps_per_epoch)

    def apply(self, x: Tensor) -> Tensor:
        """(x - U (lam I + Us^T Us)^{-1} Us^T x_s) / lam."""
        sketched = self._sketch(self.samples.view(*self.shape, self.samples.shape[1]))
        inner = sketched.T @ sketched
        lam = self._damping(inner)
        if lam == 0.0:
            return x
        damped = inner + lam * torch.eye(len(inner), dtype=inner.dtype)
        solved = torch.linalg.solve(damped, sketched.T @ self._sketch(x.unsqueeze(-1)))
        return (x - (self.samples @ solved).view_as(x)) / lam

    def _sketch(self, x: Tensor) -> Tensor:
        """The drawn entries of each matrix [M, B, n] as a column [q_M q_B, n], scaled."""
        sampled = x[self.drawn[0]][:, self.drawn[1]]
        share = sampled.shape[0] * sampled.shape[1] / (x.shape[0] * x.shape[1])
        return sampled.flatten(0, 1) / share**0.5

    def _damping(self, inner: Tensor) -> float:
        if self.damping_mode == "absolute":
            return self.value
        return self.value * torch.linalg.eigvalsh(inner)[-1].item() if len(inner) else 0.0


def _build(options: Options, shape: tuple[int, int]) -> SengReference:
    same = ("damping", "damping_mode", "update_interval", "sample_size", "seed")
    return SengReference(
        shape=shape,
        steps_per_epoch=options.get("steps_per_epoch"),
        **{key: options[key] for key in same},
    )


_SETS: dict[str, Options] = {
    "paper": {"damping_mode": "absolute", "damping": "2.0"},
    "every_third": {"damping_mode": "absolute", "damping": "2.0", "update_interval": 3},
    "small_damping": {"damping_mode": "absolute", "damping": "0.5"},
    "damping_schedule": {"damping": "0.2/0.1@step5", "update_interval": 3},
    "relative": {"damping_mode": "relative", "damping": "0.1"},
    "relative_every_third": {"damping_mode": "relative", "damping": "0.1", "update_interval": 3},
    "sampled": {"sample_size": 3},
    "sampled_every_third": {"sample_size": 3, "update_interval": 3},
    "sampled_relative": {"sample_size": 3, "damping_mode": "relative", "damping": "0.5"},
    "sampled_from_one_side": {"sample_size": 5},
    "sampled_with_another_seed": {"sample_size": 3, "seed": 5},
    "sampled_exactly": {"sample_size": 64},
    "heavy_ball": {"momentum": "heavy_ball"},
}
_PAPER: Options = {
    "damping": "0.1",
    "damping_mode": "relative",
    "sample_size": None,
    "graft": "none",
    "momentum_site": "direction",
}

ROWS: dict[str, ReferenceRow] = {
    "seng": ReferenceRow(build=_build, paper=_PAPER, option_sets=_SETS)
}
