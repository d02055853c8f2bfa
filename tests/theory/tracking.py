"""Runs the shared-basis algorithm over a gradient stream and keeps what the theorems speak of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.linalg.symmetric import unpack
from hf_precond.preconditioners.base import StepContext
from hf_precond.preconditioners.shared_basis import SharedBasis


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """State after one step, in float64.

    Attributes:
        basis: Q, [G, B, K].
        coef: R, [G, M, K, K].
        escaped_mass: rho, [G, M].
    """

    basis: Tensor
    coef: Tensor
    escaped_mass: Tensor

    @property
    def low_rank(self) -> Tensor:
        """Q R_i Q^T, [G, M, B, B]."""
        basis = self.basis.unsqueeze(1)
        return basis @ self.coef @ basis.mT

    @property
    def approximation(self) -> Tensor:
        """Q R_i Q^T + rho_i I, [G, M, B, B]."""
        eye = torch.eye(self.basis.shape[1], dtype=torch.float64)
        return self.low_rank + self.escaped_mass[..., None, None] * eye

    def project(self, dense: Tensor) -> Tensor:
        """Q^T X_i Q, [G, M, K, K]."""
        basis = self.basis.unsqueeze(1)
        return basis.mT @ dense @ basis


class Tracker:
    """The algorithm with its state and history, one gradient [G, M, B] at a time.

    Args:
        beta2: ``None`` for the sum of Algorithm 1.
        forget_mass: start every step with rho = 0, so that rho afterwards is that step's norm to
            full precision.
        options: fields of the algorithm; unless told, the rank is not capped and every step
            updates the basis.
    """

    def __init__(
        self,
        *,
        beta2: float | None = None,
        dtype: torch.dtype = torch.float64,
        forget_mass: bool = False,
        **options: Any,
    ) -> None:
        average = {} if beta2 is None else {"accumulate": "ema", "beta2": beta2}
        defaults = {"max_rank_ratio": 1e9, "update_interval": 1}
        self.algorithm = SharedBasis(**defaults | average | options)
        self.decay, self.weight = (1.0, 1.0) if beta2 is None else (beta2, 1.0 - beta2)
        self.dtype, self.forget_mass = dtype, forget_mass
        self.state: dict[str, Tensor] = {}
        self.snapshots: list[Snapshot] = []
        self.grads: list[Tensor] = []

    def step(self, g: Tensor) -> Tensor:
        """Takes a gradient in and returns its direction, in float64."""
        g = g.to(self.dtype)
        if not self.state:
            self.state = self.algorithm.init(tuple(g.shape), dtype=self.dtype, device=g.device)
            self.snapshots.append(self._snapshot())
        if self.forget_mass:
            self.state["escaped_mass"].zero_()
        self.grads.append(g.double())
        ctx = StepContext(step=len(self.grads))
        self.algorithm.update(self.state, g, ctx)
        self.snapshots.append(self._snapshot())
        return self.algorithm.apply(self.state, g, ctx).double()

    def moment(self, t: int) -> Tensor:
        """M_i = a Q_{t-1} R_i Q_{t-1}^T + c g_i g_i^T of step t = 1, 2, ..., [G, M, B, B]."""
        return self.decay * self.snapshots[t - 1].low_rank + self.weight * outer(self.grads[t - 1])

    def exact_norms(self, t: int) -> Tensor:
        """||M_i - Q_t R_i Q_t^T||_2 of step t, [G, M]."""
        return spectral_norm(self.moment(t) - self.snapshots[t].low_rank)

    def claimed_norms(self, t: int) -> Tensor:
        """nu_i = rho_i - a rho_i(previous) of step t, [G, M]."""
        before, after = self.snapshots[t - 1].escaped_mass, self.snapshots[t].escaped_mass
        return after if self.forget_mass else after - self.decay * before

    def second_moments(self, interval: int = 1) -> Iterator[Tensor]:
        """H_i after each step, [G, M, B, B], over the gradients of every ``interval``-th step."""
        total = torch.zeros_like(self.snapshots[0].low_rank)
        for index, g in enumerate(self.grads):
            if index % interval == 0:
                total = self.decay * total + self.weight * outer(g)
            yield total

    def _snapshot(self) -> Snapshot:
        rank = self.algorithm.effective_rank((1, 1, self.state["basis"].shape[-2]))
        coef = self.state["coef"].double()
        return Snapshot(
            basis=self.state["basis"][..., :rank].double().clone(),
            coef=unpack(coef, rank) if self.algorithm.packed else coef.clone(),
            escaped_mass=self.state["escaped_mass"].double().clone(),
        )


def track(grads: Tensor, **options: Any) -> Tracker:
    """A tracker that has taken ``grads`` [T, G, M, B]."""
    tracker = Tracker(**options)
    for g in grads:
        tracker.step(g)
    return tracker


def outer(g: Tensor) -> Tensor:
    """g_i g_i^T of [..., B]."""
    return g.unsqueeze(-1) * g.unsqueeze(-2)


def spectral_norm(dense: Tensor) -> Tensor:
    """Largest absolute eigenvalue of symmetric [..., B, B]."""
    return torch.linalg.eigvalsh(dense).abs().amax(-1)
