"""K-FAC: full eigendecompositions of both Kronecker factors.

Martens and Grosse (2015), as the benchmark of Puiu, Brand New K-FACs (2022), section 2.1: factors
every ``update_interval`` steps, eigendecompositions every ``inverse_interval``. The state is that
of :mod:`hf_precond.preconditioners.kronecker`, with K the size of the factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_precond.linalg.eigen import eigh
from hf_precond.preconditioners.base import OptimizerInfo, State, StepContext, option
from hf_precond.preconditioners.kronecker import Kronecker
from hf_precond.preconditioners.schedule import Schedule

# What the registered rows of the family have in common: steps as long as Adam's, on the momentum of
# the gradient, and intervals for runs of thousands of steps, not of a hundred thousand.
ROW_DEFAULTS = {
    "graft": "adam",
    "momentum_site": "gradient",
    "attention_grouping": "kernel",
    "update_interval": 10,
    "inverse_interval": 50,
    "damping": Schedule.parse(0.01),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KFac(Kronecker):
    """K-FAC with exact eigendecompositions."""

    # What rounding adds to the momentum would be scaled by up to 1 / damping on either side.
    exact_state: ClassVar[tuple[str, ...]] = (*Kronecker.exact_state, "exp_avg")

    inverse_interval: int = option(250, "steps between decompositions of the factors", low=1)

    def _width(self, size: int) -> int:
        return size

    def _update_side(self, side: State, columns: Tensor | None, ctx: StepContext) -> State:
        changed: State = {}
        if columns is not None and ctx.due(self.update_interval, refreshes=False):
            changed = self.updated_factor(side, columns)
        if ctx.due(self.inverse_interval):
            values, vectors = eigh(changed.get("factor", side["factor"]))
            changed["values"] = values.flip(-1).clamp(min=0)
            changed["vectors"] = vectors.flip(-1)
            changed["width"] = torch.full_like(side["width"], values.shape[-1])
        return changed


INFOS = (
    OptimizerInfo(
        name="kfac",
        algorithm=KFac,
        defaults=ROW_DEFAULTS,
        summary="natural gradient from Kronecker factors, decomposed in full",
        formula=(
            "A averages a a^T of a layer's inputs, B averages b b^T of the gradients of its "
            "outputs. The direction is (B + damping)^(-1) M (A + damping)^(-1)."
        ),
        paper="Martens and Grosse, K-FAC, 2015",
    ),
)
