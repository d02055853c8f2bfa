"""NG+: the natural gradient of a matrix from the smaller of its two Gram matrices.

Yang, Xu, Cui, Wen, Xu: NG+ (2021): direction (L + lam I)^(-1) G where M <= B, else
G (R + lam I)^(-1) with R from G^T G in place of G G^T. Curvature and inverse are refreshed every
``update_interval`` steps, in one of three forms:

    minibatch        L <- beta L + gamma G G^T from lam_0 I (Eq. 12): needs the gradient alone
    per_sample       L = 1/N sum_i G_i G_i^T over per-sample gradients, a sample a sequence (Eq. 4)
    per_sample_ema   L <- beta L + (1 - beta) of the same (Eq. 11)

    L or R  curvature [G, S, S]    (L + lam I)^(-1)  inverse [G, S, S]

``block_size`` keeps diagonal blocks only (Eq. 18), ``sketch_size`` estimates each Gram matrix from
some of its columns, drawn without replacement (Eq. 17; the paper's drawing with replacement would
not be exact where all are drawn).

Where each position is a sample, L = U U^T is of low rank and ``solver`` may work between samples:
``"smw"`` by (G - U (lam I + U^T U)^(-1) U^T G) / lam (Eq. 14, which lacks the 1/lam) and
``"sketched"`` by regularised least squares on ``sketch_rows`` rows of U and G (Eq. 16; its unknown
is the coefficients, not the direction).

    U  columns [G, S, n]    (lam I + U_s^T U_s)^(-1)  inverse [G, n, n]    lam  shift [G]
    rows of the sketch  picks [G, sketch_rows]

The authors' program differs from the paper in what ``authors_code`` reproduces: it always takes the
left side, adds sqrt(damping), weighs the new matrix with 0.9 and starts from 1e-8 I. (Its online
form also reads the momentum buffer in place of the gradient: not reproduced.)

Deviation: ``damping_mode="relative"`` takes the damping as a share of the largest eigenvalue and
starts from zero, because an absolute one ties the step to the scale of the loss. In float32 the
damping is not below 1e-6 of that eigenvalue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.precision import flushed
from hf_precond.linalg.roots import largest_eigenvalue, positive_inverse
from hf_precond.preconditioners.base import (
    LayerNeeds,
    OptimizerInfo,
    Placement,
    Shape,
    State,
    StepContext,
    check_options,
    is_due,
    option,
)
from hf_precond.preconditioners.sample_grams import drawn_without_replacement, sum_of_grams
from hf_precond.preconditioners.schedule import Schedule

# The authors' program: decay of the old matrix and weight of the new one, and the first matrix.
_AUTHORS_WEIGHTS = (0.1, 0.9)
_AUTHORS_START = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class NgPlus:
    """Natural gradient on the smaller side."""

    exact_state: ClassVar[tuple[str, ...]] = ("curvature", "picks")

    curvature: str = option(
        "minibatch",
        "Gram matrix of the gradient, of per-sample gradients, or its running average",
        choices=("minibatch", "per_sample", "per_sample_ema"),
    )
    solver: str = option(
        "inverse",
        "invert the curvature, or solve between positions where each is a sample of its own",
        choices=("inverse", "smw", "sketched"),
    )
    beta: float = option(0.99, "decay of the curvature", symbol="beta", low=0, high=1)
    gamma: float = option(0.01, "weight of a new Gram matrix", symbol="gamma", low=0)
    damping: Schedule = option(
        Schedule.parse(0.16),
        "added to the curvature's eigenvalues",
        symbol="lambda",
        low=0,
        low_open=True,
    )
    damping_decay: float = option(
        1.0, "factor of the damping every ten epochs", low=0, low_open=True
    )
    damping_mode: str = option(
        "absolute",
        "damping as it is, or as a share of the largest eigenvalue",
        choices=("absolute", "relative"),
    )
    update_interval: int = option(
        200, "steps between curvatures (paper: 500 for vision, 200 for SchNet)", low=1
    )
    block_size: int | None = option(
        None, "size of the curvature's diagonal blocks (none: one block)", symbol="p", low=1
    )
    sketch_size: int | None = option(
        None, "columns that estimate a Gram matrix (none: all)", symbol="q", low=1
    )
    sketch_rows: int | None = option(
        None, "rows of the sketched least squares (none: all)", symbol="q", low=1
    )
    max_columns: int | None = option(
        4096, "positions of a batch that per-sample curvature takes at most (none: all)", low=1
    )
    authors_code: bool = option(
        False, "as the authors' program: left side, sqrt(damping), 0.9 of each new Gram matrix"
    )
    seed: int = option(0, "seed of the sketch", low=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.solver == "inverse":
            return
        if self.curvature != "per_sample" or self.max_columns is None:
            raise ValueError(
                f"solver = {self.solver!r} is not allowed with curvature = {self.curvature!r} and "
                f"max_columns = {self.max_columns}: it needs curvature = 'per_sample' and a number "
                "of columns"
            )

    @property
    def layer_needs(self) -> LayerNeeds | None:
        """Whole samples for per-sample curvature, positions for the solvers between them."""
        if self.curvature == "minibatch":
            return None
        return LayerNeeds(
            max_columns=self.max_columns,
            by_sample=self.solver == "inverse",
            joint_bias=False,
            seed=self.seed,
        )

    def captures_at(self, step: int) -> bool:
        """Whether a step's samples are wanted."""
        return self.curvature != "minibatch" and is_due(step, self.update_interval)

    def place(self, shape: Shape) -> Placement:
        """Diagonal blocks: the curvature's side cut, the other one whole."""
        _, rows, columns = shape
        if self.block_size is None:
            return Placement()
        left = self._is_left(shape)
        return Placement(tile=(self.block_size, columns) if left else (rows, self.block_size))

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        groups, rows, columns = shape
        size = rows if self._is_left(shape) else columns
        if self.solver != "inverse":
            assert self.max_columns is not None
            n, picks = self.max_columns, min(size, self.sketch_rows or size)
            sizes = {"columns": (size, n), "inverse": (n, n), "shift": (), "picks": (picks,)}
            return {
                name: torch.zeros(groups, *rest, dtype=dtype, device=device)
                for name, rest in sizes.items()
            }
        eye = torch.eye(size, dtype=dtype, device=device).repeat(groups, 1, 1)
        first = _AUTHORS_START if self.authors_code else self.damping.initial
        if self.damping_mode == "relative" or self.curvature != "minibatch":
            first = 0.0
        return {"curvature": first * eye, "inverse": eye}

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        samples = None
        if self.curvature != "minibatch":
            if ctx.columns is None:
                return
            samples = ctx.columns.outputs, ctx.columns.inputs
            if not self._is_left(g_GMB.shape):
                samples = samples[1], samples[0]
        if not ctx.due(self.update_interval):
            return
        if samples is None:
            new = self._updated(state, self._minibatch(state, g_GMB, ctx.step), ctx)
        elif self.solver == "inverse":
            new = self._updated(state, self._per_sample(state, *samples, ctx.step), ctx)
        else:
            own, other = (x.flatten(1, 2) for x in samples)
            new = self._low_rank(state, own, other, ctx)
        # Written only when all is computed: a failed factorisation leaves all as it was.
        for name, tensor in new.items():
            state[name].copy_(tensor)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        if self._is_left(g_GMB.shape):
            return self._solved(state, g_GMB)
        return self._solved(state, g_GMB.mT).mT

    # -- curvature --

    def _minibatch(self, state: State, g_GMB: Tensor, step: int) -> Tensor:
        x = self._sampled(g_GMB if self._is_left(g_GMB.shape) else g_GMB.mT, step)
        decay, weight = _AUTHORS_WEIGHTS if self.authors_code else (self.beta, self.gamma)
        return torch.baddbmm(state["curvature"], x, x.mT, beta=decay, alpha=weight)

    def _per_sample(self, state: State, own: Tensor, other: Tensor, step: int) -> Tensor:
        """1/N sum_i G_i G_i^T, G_i = N O_i^T I_i; ``own`` is the side of the curvature."""
        gram = sum_of_grams(own, self._sampled(other, step)) * own.shape[1]
        if self.curvature == "per_sample":
            return gram
        decay = _AUTHORS_WEIGHTS[0] if self.authors_code else self.beta
        # The first one counts in full: nothing has been seen where the trace is zero.
        trace = state["curvature"].diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        return torch.where(trace > 0, torch.lerp(gram, state["curvature"], decay), gram)

    def _updated(self, state: State, curvature: Tensor, ctx: StepContext) -> State:
        return {"curvature": curvature, "inverse": self._inverse(curvature, ctx)}

    def _low_rank(self, state: State, own: Tensor, other: Tensor, ctx: StepContext) -> State:
        """U = sqrt(n) |a_s| g_s for n positions, and what the solver between them needs."""
        count, size = own.shape[1:]
        lengths = torch.linalg.vector_norm(self._sampled(other, ctx.step), dim=-1, keepdim=True)
        columns = torch.zeros_like(state["columns"])
        # Padded positions are no samples.
        alive = ((own != 0).any(-1) | (other != 0).any(-1)).sum(-1)[:, None, None]
        columns[..., :count] = (own * lengths * alive.to(own.dtype).sqrt()).mT
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * ctx.step)
        rows = self.sketch_rows if self.solver == "sketched" else None
        picks = drawn_without_replacement(size, rows, generator, own.device)
        picked = torch.zeros_like(state["picks"])
        picked[:, : len(picks)] = picks.to(own.dtype)
        part = columns[:, picks] * (size / len(picks)) ** 0.5
        inner = part.mT @ part
        shift = self._shift(columns.mT @ columns, ctx)
        return {
            "columns": columns,
            "inverse": positive_inverse(_damped(inner, shift)),
            "shift": shift,
            "picks": picked,
        }

    # -- direction --

    def _solved(self, state: State, x: Tensor) -> Tensor:
        """(L + lam I)^(-1) x, or what a sketch makes of it; x before anything was seen."""
        if self.solver == "inverse":
            return state["inverse"] @ x
        columns, shift = state["columns"], state["shift"][:, None, None]
        if self.solver == "smw":
            inner = columns.mT @ x
        else:
            rows = state["picks"].long().unsqueeze(-1)
            scale = x.shape[1] / rows.shape[1]
            some = columns.gather(1, rows.expand(-1, -1, columns.shape[2]))
            inner = some.mT @ x.gather(1, rows.expand(-1, -1, x.shape[2])) * scale
        alive = shift > 0
        solved = (x - columns @ (state["inverse"] @ inner)) / torch.where(alive, shift, 1.0)
        return torch.where(alive, solved, x)

    def _is_left(self, shape: Sequence[int]) -> bool:
        return self.authors_code or shape[1] <= shape[2]

    def _damping(self, ctx: StepContext) -> float:
        damping = ctx.value(self.damping)
        if self.damping_decay != 1.0:
            damping *= self.damping_decay ** (ctx.epoch() / 10)
        return damping**0.5 if self.authors_code else damping

    def _sampled(self, x: Tensor, step: int) -> Tensor:
        """Columns drawn without replacement, scaled so that their Gram matrix is unbiased."""
        count = x.shape[-1]
        if self.sketch_size is None or self.sketch_size >= count:
            return x
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * step)
        drawn = torch.randperm(count, generator=generator)[: self.sketch_size].to(x.device)
        return x[..., drawn] * (count / self.sketch_size) ** 0.5

    def _inverse(self, curvature: Tensor, ctx: StepContext) -> Tensor:
        """(L + lam I)^(-1); the identity where relative damping meets a zero curvature."""
        return positive_inverse(_damped(curvature, self._shift(curvature, ctx)))

    def _shift(self, curvature: Tensor, ctx: StepContext) -> Tensor:
        """lam of each group, ``[G]``."""
        damping = curvature.new_full(curvature.shape[:1], self._damping(ctx))
        if self.damping_mode == "absolute" and curvature.dtype == torch.float64:
            return damping
        largest = flushed(largest_eigenvalue(curvature))
        if self.damping_mode == "relative":
            damping = damping * largest
        if curvature.dtype != torch.float64:
            damping = torch.maximum(damping, 1e-6 * largest)
        return damping


def _damped(curvature: Tensor, shift: Tensor) -> Tensor:
    """L + lam I; L + I where lam is zero."""
    shift = torch.where(shift > 0, shift, torch.ones_like(shift)).unsqueeze(-1)
    return curvature + torch.diag_embed(shift.expand(curvature.shape[:-1]))


_ROW_DEFAULTS = {
    "update_interval": 10,
    "damping": Schedule.parse(0.01),
    "damping_mode": "relative",
    "graft": "adam",
    "momentum_site": "gradient",
    "attention_grouping": "kernel",
}

INFOS = (
    OptimizerInfo(
        name="ng_plus",
        algorithm=NgPlus,
        defaults=_ROW_DEFAULTS,
        summary="natural gradient from the smaller Gram matrix of the mini-batch gradient",
        formula=(
            "C averages G G^T, or G^T G where that is smaller, of the mini-batch gradient G as "
            "a matrix. The direction is (C + damping)^(-1) M."
        ),
        paper="Yang et al., NG+, 2021, Eq. 11, 12, 14, 16, 17, 18",
    ),
    OptimizerInfo(
        name="ng_plus_per_sample",
        algorithm=NgPlus,
        # Without an average over steps the curvature is noisier: more damping.
        defaults={**_ROW_DEFAULTS, "damping": Schedule.parse(0.1)},
        fixed={"curvature": "per_sample"},
        summary="natural gradient from the smaller Gram matrix of per-sample gradients",
        formula=(
            "C averages G_i G_i^T, or G_i^T G_i where that is smaller, over the gradients G_i "
            "of single samples. The direction is (C + damping)^(-1) M."
        ),
        paper="Yang et al., NG+, 2021, Eq. 4, 5, 14, 16, 17, 18",
    ),
)
