"""RS-KFAC and SRE-KFAC: the leading eigenpairs of the factors by random projection.

Puiu, Brand New K-FACs (2022), Algorithm 1 and section 2.2 (and Puiu, Randomized K-FACs, 2022):
quadratic in the width where K-FAC is cubic. The state is that of
:mod:`hf_precond.preconditioners.kronecker`, with K the largest rank of the schedule.

``adaptive_rank`` moves each factor's rank by ``rank_step`` towards a smallest eigenvalue of
``rank_target`` times the largest, as the author's program does; here the rank of the options is its
ceiling, because state must not change its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from hf_precond.linalg.randomized import leading_eigenpairs
from hf_precond.preconditioners.base import OptimizerInfo, Shape, State, StepContext, option
from hf_precond.preconditioners.kfac import ROW_DEFAULTS
from hf_precond.preconditioners.kronecker import Kronecker, widened
from hf_precond.preconditioners.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomizedKFac(Kronecker):
    """K-FAC with randomized low-rank decompositions."""

    inverse_interval: int = option(250, "steps between decompositions of the factors", low=1)
    rank: Schedule = option(
        Schedule.parse(220), "eigenpairs kept of each factor", symbol="r", low=1
    )
    oversampling: Schedule = option(
        Schedule.parse(10), "further columns of the random projection", symbol="r_o", low=0
    )
    power_iterations: int = option(4, "power iterations of the projection", low=0)
    decomposition: str = option(
        "rsvd",
        "randomized singular value or symmetric eigenvalue decomposition",
        choices=("rsvd", "srevd"),
    )
    adaptive_rank: bool = option(False, "let each factor's rank follow its spectrum")
    rank_target: float = option(
        0.033, "smallest eigenvalue kept, as a share of the largest", low=0, low_open=True
    )
    rank_step: int = option(10, "by how much the rank moves", low=1)

    def __post_init__(self) -> None:
        # A zero-argument super() does not work in a dataclass with slots.
        Kronecker.__post_init__(self)
        for name in ("rank", "oversampling"):
            schedule = getattr(self, name)
            if schedule.factor != 1 or any(value % 1 for value in schedule.values):
                raise ValueError(
                    f"{name} = {schedule} is not allowed: it must be a whole number or a table of "
                    "them"
                )

    @property
    def _adapts(self) -> bool:
        return self.adaptive_rank or self.authors_code

    def effective_rank(self, shape: Shape) -> int:
        """Rank of the inputs' factor, for the explanation table."""
        return min(shape[2], self._rank_ceiling)

    @property
    def _rank_ceiling(self) -> int:
        return int(max(self.rank.values))

    def _width(self, size: int) -> int:
        return min(size, self._rank_ceiling)

    def _init_side(self, size: int, groups: int, dtype: torch.dtype, device: torch.device) -> State:
        if not self._adapts:
            return {}
        return {"rank": torch.full((groups,), inf, dtype=dtype, device=device)}

    def _update_side(self, side: State, columns: Tensor | None, ctx: StepContext) -> State:
        changed: State = {}
        if columns is not None and ctx.due(self.update_interval, refreshes=False):
            changed = self.updated_factor(side, columns)
        if ctx.due(self.inverse_interval):
            factor = changed.get("factor", side["factor"])
            changed |= self._decomposed(factor, side, ctx)
            if self._adapts:
                changed |= self._next_rank(changed, side["rank"], self._rank(len(factor[0]), ctx))
        return changed

    def _rank(self, size: int, ctx: StepContext) -> int:
        return min(size, int(ctx.value(self.rank)))

    def _decomposed(self, factor: Tensor, side: State, ctx: StepContext) -> State:
        """The leading eigenpairs of a factor as a form."""
        size = factor.shape[-1]
        rank = self._rank(size, ctx)
        vectors, values = leading_eigenpairs(
            factor,
            rank,
            oversampling=int(ctx.value(self.oversampling)),
            power_iterations=self.power_iterations,
            seed=self.seed + 1_000_003 * ctx.step,
            method=self.decomposition,
        )
        if not self._adapts:
            width = torch.full_like(side["width"], rank)
            return {**widened(vectors, values, side["values"].shape[-1]), "width": width}
        width = side["rank"].clamp(max=rank)
        kept = torch.arange(rank, device=values.device) < width.unsqueeze(-1)
        form = widened(vectors * kept.unsqueeze(-2), values * kept, side["values"].shape[-1])
        return {**form, "width": width}

    def _next_rank(self, form: State, rank: Tensor, ceiling: int) -> State:
        """More where the eigenvalue at the rank is still large, fewer where it is small."""
        values, rank = form["values"], rank.clamp(max=ceiling)
        last = values.gather(1, rank.long().sub(1).unsqueeze(-1)).squeeze(-1)
        step = torch.where(last > self.rank_target * values[:, 0], self.rank_step, -self.rank_step)
        return {"rank": (rank + step).clamp(min(self.rank_step, ceiling), ceiling)}


_DEFAULTS = {**ROW_DEFAULTS, "rank": Schedule.parse(64)}

INFOS = (
    OptimizerInfo(
        name="rs_kfac",
        algorithm=RandomizedKFac,
        defaults=_DEFAULTS,
        fixed={"decomposition": "rsvd"},
        summary="K-FAC with randomized singular value decompositions of the factors",
        formula=(
            "As kfac, with the leading eigenpairs of A and B from a randomized singular value "
            "decomposition."
        ),
        paper="Puiu, Brand New K-FACs, 2022, Algorithm 1",
    ),
    OptimizerInfo(
        name="sre_kfac",
        algorithm=RandomizedKFac,
        defaults=_DEFAULTS,
        fixed={"decomposition": "srevd"},
        summary="K-FAC with randomized symmetric eigenvalue decompositions of the factors",
        formula=(
            "As kfac, with the leading eigenpairs of A and B from a randomized symmetric "
            "eigenvalue decomposition."
        ),
        paper="Puiu, Brand New K-FACs, 2022, section 2.2",
    ),
)
