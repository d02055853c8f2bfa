"""Muon: the orthogonalised momentum.

Jordan et al. 2024. Direction: the Nesterov momentum of the gradient with all singular values
brought near one by five Newton-Schulz steps. Momentum is the shell's, so there is no state here.

``adjust_lr_fn`` is torch.optim.Muon's adjustment of the learning rate: ``"match_rms_adamw"`` gives
the update the root mean square of AdamW's, so that AdamW's learning rate fits. Heads and fused
pieces are orthogonalised one by one where the views say so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.linalg.newton_schulz import newton_schulz
from hf_precond.preconditioners.base import (
    OptimizerInfo,
    Shape,
    State,
    StepContext,
    check_options,
    option,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Muon:
    """Orthogonalisation by Newton-Schulz iterations."""

    ns_steps: int = option(5, "Newton-Schulz steps", low=1, high=99)
    ns_coefficients: tuple[float, ...] = option(
        (3.4445, -4.7750, 2.0315), "coefficients of the quintic iteration", low=-100, high=100
    )
    ns_dtype: str = option(
        "auto",
        "precision of the iteration (auto: bfloat16 on accelerators, else that of the state)",
        choices=("auto", *_DTYPES),
    )
    adjust_lr_fn: str = option(
        "match_rms_adamw",
        "factor of the update: 0.2 sqrt(max(M, B)), sqrt(max(1, M / B)), or one",
        choices=("match_rms_adamw", "original", "none"),
    )
    eps: float = option(
        1e-20, "smallest norm that is divided by (torch: 1e-7)", low=0, low_open=True
    )

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.ns_coefficients) != 3:
            raise ValueError(
                f"ns_coefficients = {self.ns_coefficients!r} is not allowed: "
                "it must be 3 numbers >= -100 and <= 100"
            )

    def init(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> State:
        return {}

    def update(self, state: State, g_GMB: Tensor, ctx: StepContext) -> None:
        pass

    def apply(self, state: State, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        dtype = _DTYPES.get(self.ns_dtype)
        if dtype is None:
            dtype = g_GMB.dtype if g_GMB.device.type == "cpu" else torch.bfloat16
        orthogonal = newton_schulz(
            g_GMB,
            steps=self.ns_steps,
            coefficients=self.ns_coefficients,
            eps=self.eps,
            dtype=dtype,
        )
        return orthogonal.mul_(self._factor(g_GMB.shape))

    def _factor(self, shape: torch.Size) -> float:
        _, rows, columns = shape
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * max(rows, columns) ** 0.5
        return max(1.0, rows / columns) ** 0.5 if self.adjust_lr_fn == "original" else 1.0


INFOS = (
    OptimizerInfo(
        name="muon",
        algorithm=Muon,
        defaults={
            "betas": (0.95, 0.999),
            "nesterov": True,
            "momentum_site": "gradient",
            "graft": "none",
            "fallback_beta1": 0.9,
            "attention_grouping": "kernel",
        },
        summary="the momentum with its singular values brought to one",
        formula=(
            "M averages the gradients, with Nesterov's look ahead. The direction is U V^T for M "
            "= U S V^T, by a few matrix products."
        ),
        paper="Jordan et al., Muon, 2024",
    ),
)
