"""B-KFAC, B-R-KFAC and B-KFAC-C: the factors' eigenpairs updated online, linear in the width.

Puiu, Brand New K-FACs (2022), Algorithms 3 to 8. A running average gains n columns at a time, so
its eigendecomposition needs no more than a symmetric Brand update: truncate the form to rank r, add
the columns, decompose a matrix of size r + n. The form in use has r + n columns.

    b_kfac      Brand updates alone: no factor is ever formed (Algorithm 4)
    b_r_kfac    every ``rsvd_interval`` steps the form is replaced by the factor's own (Algorithm 5)
    b_kfac_c    every ``correction_interval`` some random directions are put right (Algorithms 6, 7)

A side is kept this way where r + n is less than its size, n being ``max_columns``; other sides
follow RS-KFAC. Convolutions and token layers have more positions than that: their statistics are
drawn, which the paper leaves to RS-KFAC altogether.

With ``application="linear"`` (Algorithm 8) the step is formed from preconditioned columns in place
of the gradient, cost linear in the width, where the columns of this very step are complete and
fewer than the layer is wide; it takes the norm that the gradient has after clipping. Without
``form_gradient`` the backward pass leaves the product out that nobody needs then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.linalg.eigen import eigh
from hf_precond.linalg.lowrank import add_gram
from hf_precond.preconditioners.base import (
    LayerNeeds,
    OptimizerInfo,
    State,
    StepContext,
    is_due,
    option,
)
from hf_precond.preconditioners.kfac import ROW_DEFAULTS
from hf_precond.preconditioners.kronecker import widened
from hf_precond.preconditioners.randomized_kfac import RandomizedKFac
from hf_precond.preconditioners.schedule import Schedule

_AUTHORS_SHARE = 0.2
_FORM = ("vectors", "values", "width")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrandKFac(RandomizedKFac):
    """K-FAC whose low-rank forms are updated online."""

    max_columns: int | None = option(
        256, "positions of a batch that statistics take at most", symbol="n", low=1
    )
    brand_interval: int = option(125, "steps between Brand updates", low=1)
    factor_form: str = option(
        "auto",
        "Brand's form where it is small enough, always, or never",
        choices=("auto", "brand", "rsvd"),
    )
    application: str = option(
        "plain",
        "precondition the gradient, or the columns it is made of",
        choices=("plain", "linear"),
    )
    form_gradient: bool = option(
        True, "form the weights' gradients; without, columns alone stand for them"
    )

    def __post_init__(self) -> None:
        RandomizedKFac.__post_init__(self)
        if self.max_columns is None:
            raise ValueError("max_columns = None is not allowed: Brand's form needs a number")
        if not self.form_gradient and self.application != "linear":
            raise ValueError(
                f"form_gradient = False is not allowed with application = {self.application!r}: "
                "use application = 'linear'"
            )
        if not self.form_gradient and self.weight_sharing == "reduce":
            raise ValueError(
                "form_gradient = False is not allowed with weight_sharing = 'reduce': the reduced "
                "columns do not make the gradient; use weight_sharing = 'expand'"
            )

    @property
    def layer_needs(self) -> LayerNeeds:
        """All positions where the step is made of them; the statistics draw some later."""
        linear = self.application == "linear"
        return LayerNeeds(
            max_columns=None if linear else self.max_columns,
            reduce=self.weight_sharing == "reduce",
            form_gradient=self.form_gradient,
            seed=self.seed,
        )

    def check_stages(self, stages: Any) -> None:
        """Raises ValueError where a stage would put something else in the gradient's place."""
        allowed = {"graft": ("none",), "start_step": (1,), "clip_mode": ("none", "update_rms")}
        for name, values in allowed.items():
            value = getattr(stages, name)
            if not self.form_gradient and value not in values:
                raise ValueError(
                    f"{name} = {value!r} is not allowed with form_gradient = False, which leaves "
                    f"no gradient to take it from: it must be one of {values}"
                )
        of_moment = stages.momentum_site == "gradient" and stages.momentum != "none"
        if self.application == "linear" and of_moment:
            raise ValueError(
                "application = 'linear' is not allowed with momentum_site = 'gradient': the "
                "columns are those of the gradient, not of its momentum; use "
                "momentum_site = 'direction'"
            )

    def captures_at(self, step: int) -> bool:
        """Columns of all steps for the linear application, else of those that take them in."""
        return self.application == "linear" or self._takes_in(step)

    def _takes_in(self, step: int) -> bool:
        # Sides in another form, and the factors of refreshed ones, follow update_interval.
        return is_due(step, self.brand_interval) or is_due(step, self.update_interval)

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        columns = ctx.columns
        if self.application == "plain" or columns is None or not columns.complete:
            # Zero-argument super() does not work in a dataclass with slots.
            return RandomizedKFac.apply(self, state, g_GMB, ctx)
        inputs, outputs = columns.flat()
        if inputs.shape[1] >= max(g_GMB.shape[1:]):  # not fewer columns than the layer is wide
            gradient = columns.gradient() * columns.clip if columns.alone else g_GMB
            return RandomizedKFac.apply(self, state, gradient, ctx)
        clip = columns.clip if columns.alone else _clip_factor(g_GMB, inputs, outputs)
        left = self.precondition(state, "output", outputs.mT * clip, ctx)
        right = self.precondition(state, "input", inputs.mT, ctx)
        return left @ right.mT

    def _is_brand(self, size: int) -> bool:
        assert self.max_columns is not None
        fits = self._rank_ceiling + self.max_columns < size
        return self.factor_form == "brand" or (self.factor_form == "auto" and fits)

    def _has_factor(self, size: int) -> bool:
        return not self._is_brand(size)

    def _width(self, size: int) -> int:
        assert self.max_columns is not None
        extra = self.max_columns if self._is_brand(size) else 0
        return min(size, self._rank_ceiling + extra)

    def _update_side(self, side: State, columns: Tensor | None, ctx: StepContext) -> State:
        size = side["vectors"].shape[-2]
        taken = columns is not None and self._takes_in(ctx.step)
        columns = self._drawn(columns, ctx) if columns is not None and taken else None
        if not self._is_brand(size):
            return RandomizedKFac._update_side(self, side, columns, ctx)
        changed: State = {}
        kept = self._has_factor(size) and ctx.due(self.update_interval, refreshes=False)
        if kept and columns is not None:
            changed = self.updated_factor(side, columns)
        before = form = {name: side[name] for name in _FORM}
        form = form | self._overwritten(form, side, changed, ctx)
        if columns is not None and ctx.due(self.brand_interval) and self._adds_columns(ctx):
            form |= self._brand(form, columns, self._truncation(side, size, ctx))
            if not self._has_factor(size):
                changed["updates"] = side["updates"] + 1
        refreshed = form["values"] is not before["values"]
        form |= self._corrected(form, side, changed, ctx)
        if refreshed and self._adapts:
            form |= self._next_rank(form, side["rank"], self._rank(size, ctx))
        return {**changed, **form}

    def _drawn(self, columns: Tensor, ctx: StepContext) -> Tensor:
        """At most ``max_columns`` of the columns, drawn without replacement, scaled for all."""
        count, limit = columns.shape[1], self.max_columns
        if limit is None or count <= limit:
            return columns
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * ctx.step)
        drawn = torch.randperm(count, generator=generator)[:limit].to(columns.device)
        return columns[:, drawn] * (count / limit) ** 0.5

    # -- what keeps a form close to its factor --

    def _overwritten(self, form: State, side: State, changed: State, ctx: StepContext) -> State:
        """What takes the form's place before the columns are added."""
        return {}

    def _adds_columns(self, ctx: StepContext) -> bool:
        """Whether a form of this step lacks the step's columns."""
        return True

    def _corrected(self, form: State, side: State, changed: State, ctx: StepContext) -> State:
        """What takes the form's place after the columns were added."""
        return {}

    # -- Algorithm 4 --

    def _truncation(self, side: State, size: int, ctx: StepContext) -> Tensor:
        """Columns of each form that stay before an update, ``[G]``."""
        rank = torch.full_like(side["width"], self._rank(size, ctx))
        return torch.minimum(rank, side["rank"]) if "rank" in side else rank

    def _brand(self, form: State, columns: Tensor, kept: Tensor) -> State:
        """rho U_r D_r U_r^T + (1 - rho) C C^T; the first columns count in full."""
        capacity = form["values"].shape[-1]
        ranks = min(capacity, self._rank_ceiling)
        inside = torch.arange(ranks, device=kept.device) < kept.unsqueeze(-1)
        first = (form["width"] == 0).to(columns.dtype)
        weight = (first + (1 - first) * (1 - self.factor_decay)).sqrt()
        vectors, values = add_gram(
            form["vectors"][..., :ranks] * inside.unsqueeze(-2),
            form["values"][..., :ranks] * inside * self.factor_decay,
            (columns * weight[:, None, None]).mT,
            keep=capacity,
        )
        width = torch.minimum(form["width"], kept) + columns.shape[1]
        grown = widened(vectors, values[..., : vectors.shape[-1]], capacity)
        return {**grown, "width": width.clamp(max=vectors.shape[-1])}


@dataclass(frozen=True, slots=True, kw_only=True)
class BrandRKFac(BrandKFac):
    """B-KFAC whose forms are overwritten by their factors' randomized decompositions (Alg. 5)."""

    rsvd_interval: int = option(250, "steps between overwritings of a form", low=1)
    overwrite: str = option(
        "previous",
        "overwrite by the factor before this step's columns, which a Brand update then adds, or by "
        "the one with them",
        choices=("previous", "factor"),
    )

    def _has_factor(self, size: int) -> bool:
        return True

    @property
    def _with_columns(self) -> bool:
        return self.overwrite == "factor" or self.authors_code

    def _overwrites(self, ctx: StepContext) -> bool:
        return ctx.step > 1 and ctx.due(self.rsvd_interval)

    def _overwritten(self, form: State, side: State, changed: State, ctx: StepContext) -> State:
        if not self._overwrites(ctx):
            return {}
        newest = changed.get("factor", side["factor"])
        own = self._decomposed(newest if self._with_columns else side["factor"], side, ctx)
        started = side["width"] > 0
        return {name: _where(started, own[name], form[name]) for name in form}

    def _adds_columns(self, ctx: StepContext) -> bool:
        return not (self._with_columns and self._overwrites(ctx))


@dataclass(frozen=True, slots=True, kw_only=True)
class BrandCKFac(BrandKFac):
    """B-KFAC whose forms are corrected in some random directions (Alg. 6, 7)."""

    correction_interval: int = option(500, "steps between corrections of a form", low=1)
    correction_share: float = option(
        0.5,
        "share of the directions that are corrected",
        symbol="phi",
        low=0,
        high=1,
        low_open=True,
    )

    def _has_factor(self, size: int) -> bool:
        return True

    def _corrected(self, form: State, side: State, changed: State, ctx: StepContext) -> State:
        """The directions drawn get the factor's own eigenpairs among them."""
        if ctx.step == 1 or not ctx.due(self.correction_interval):
            return {}
        factor = changed.get("factor", side["factor"])
        vectors, values = form["vectors"].clone(), form["values"].clone()
        rank = min(self._rank(vectors.shape[-2], ctx), max(1, int(form["width"].max())))
        share = _AUTHORS_SHARE if self.authors_code else self.correction_share
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * ctx.step)
        count = max(1, round(share * rank))
        drawn = torch.randperm(rank, generator=generator)[:count].to(values.device)
        some = vectors[..., drawn]
        small = some.mT @ factor @ some
        found, inner = eigh((small + small.mT) / 2)
        vectors[..., drawn], values[..., drawn] = some @ inner, found.clamp(min=0)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return {
            "vectors": vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors)),
            "values": values,
        }


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Groups from one tensor where the condition holds, else from the other."""
    return torch.where(condition.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def _clip_factor(g_GMB: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Norm of the gradient as given over that of its columns' product, by Gram matrices."""
    square = ((inputs @ inputs.mT) * (outputs @ outputs.mT)).sum((-2, -1), keepdim=True)
    norm = torch.linalg.matrix_norm(g_GMB, keepdim=True)
    alive = square > 0
    return torch.where(alive, norm / torch.where(alive, square, 1).sqrt(), 1.0)


_BRAND_DEFAULTS = {
    **ROW_DEFAULTS,
    "brand_interval": 10,
    "rank": Schedule.parse(32),
    "max_columns": 64,
}

INFOS = (
    OptimizerInfo(
        name="b_kfac",
        algorithm=BrandKFac,
        defaults=_BRAND_DEFAULTS,
        fixed={"decomposition": "rsvd"},
        summary="K-FAC with eigenpairs updated online, linear in the width",
        formula=(
            "As kfac, with the leading eigenpairs of A and B updated online by Brand's method, "
            "without A and B themselves."
        ),
        paper="Puiu, Brand New K-FACs, 2022, Algorithm 4",
    ),
    OptimizerInfo(
        name="b_r_kfac",
        algorithm=BrandRKFac,
        defaults={**_BRAND_DEFAULTS, "rsvd_interval": 100},
        fixed={"decomposition": "rsvd"},
        summary="B-KFAC, from time to time replaced by randomized decompositions",
        formula=(
            "As b_kfac, with the eigenpairs taken anew from a randomized decomposition from "
            "time to time."
        ),
        paper="Puiu, Brand New K-FACs, 2022, Algorithm 5",
    ),
    OptimizerInfo(
        name="b_kfac_c",
        algorithm=BrandCKFac,
        defaults={**_BRAND_DEFAULTS, "correction_interval": 100},
        fixed={"decomposition": "rsvd"},
        summary="B-KFAC with random directions corrected from time to time",
        formula=(
            "As b_kfac, with random directions of the eigenpairs corrected from time to time."
        ),
        paper="Puiu, Brand New K-FACs, 2022, Algorithms 6, 7",
    ),
)
