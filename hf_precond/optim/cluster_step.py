"""One step of stacks that share parameters: from their gradients to their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_precond.optim import fused_adam
from hf_precond.optim.banks import Bank
from hf_precond.optim.capture import Capture
from hf_precond.optim.faults import Faults
from hf_precond.optim.health import Health
from hf_precond.optim.laid_out import LaidOut
from hf_precond.optim.options import Recipe
from hf_precond.optim.pipeline import Cohort, Scope, Updates, run, split_into_cohorts, update_alone
from hf_precond.optim.roles import algorithm_of
from hf_precond.optim.sharding import Sharding, slot_key
from hf_precond.preconditioners.base import FALLBACK, MAIN, StepContext
from hf_precond.preconditioners.diagonal import Adam
from hf_precond.views.plan import PlannedView, Slot, add_from_blocks

Rates = Mapping[int, "float | Tensor"]
"""Learning rate of each parameter that takes part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStep:
    """What a step of any cluster needs to know.

    Attributes:
        param_groups: of the optimizer, with learning rates and weight decays.
        steps_per_epoch: for schedules in epochs.
    """

    recipe: Recipe
    laid: LaidOut
    param_groups: Sequence[Mapping[str, Any]]
    capture: Capture
    faults: Faults
    health: Health
    steps_per_epoch: float | None

    def run(
        self,
        cluster: Sequence[Bank],
        gradients: Mapping[int, Tensor],
        work: Mapping[int, Tensor],
    ) -> None:
        """Takes all banks of a cluster from their gradients to their weights.

        Args:
            gradients: of the parameters that take part.
            work: those that this rank works on, as its views expect them.

        Raises:
            DecompositionError: if a parameter's factorisation failed too often in a row.
        """
        laid, sharding = self.laid, self.laid.ranks.sharding
        rates = self._rates(cluster, gradients)
        if self._step_fused(cluster, gradients, rates):
            return
        cohorts = self._cohorts(cluster, work)
        device = cluster[0].bucket.key.device if cluster else laid.device
        scope = Scope(
            stages=self.recipe.stages,
            owners=laid.owners,
            like=torch.empty((), dtype=self.recipe.numerics.dtype, device=device),
            comm=laid.ranks.comm if sharding and sharding.work.is_shared else None,
        )
        run(cohorts, partial(self._update, gradients), scope=scope, rates=rates, health=self.health)
        weights = laid.weights.taken(rates)
        for index, rate in rates.items():
            decay = self.param_groups[laid.group_of[index]]["weight_decay"]
            if decay != 0:
                weights[index].mul_(1 - rate * decay)
        if sharding is None:
            for cohort in cohorts:
                for slot, groups in cohort.parts():
                    alphas = self._alphas(slot, rates, cohort.factor)
                    slot.add_from_blocks(weights, cohort.direction[groups], alphas)
        else:
            self._add_shared(sharding, cohorts, weights, rates)
        laid.weights.round_back(weights, laid.steps)

    def _step_fused(
        self, cluster: Sequence[Bank], gradients: Mapping[int, Tensor], rates: Rates
    ) -> bool:
        """Steps a cluster of the fallback's Adam in torch's kernel, where that can take it."""
        algorithm, laid = self.recipe.fallback_algorithm, self.laid
        if laid.ranks.sharding is not None or not isinstance(algorithm, Adam):
            return False
        if laid.weights.are_copies(rates):  # the kernel rounds to nearest
            return False
        weights = laid.weights.taken(rates)
        if not all(fused_adam.can_fuse(bank, weights, gradients) for bank in cluster):
            return False
        decays = {
            index: float(self.param_groups[laid.group_of[index]]["weight_decay"]) for index in rates
        }
        ratio = self.recipe.fallback.fallback_lr_ratio
        if ratio != 1:
            # Decay goes by the group's rate, which the kernel does not know.
            for index, decay in decays.items():
                if decay != 0:
                    weights[index].mul_(1 - rates[index] * decay)
            decays, rates = dict.fromkeys(decays, 0.0), {i: r * ratio for i, r in rates.items()}
        for bank in cluster:
            fused_adam.step_(algorithm, bank, weights, gradients, laid.steps, rates, decays)
        return True

    def _cohorts(self, cluster: Sequence[Bank], work: Mapping[int, Tensor]) -> list[Cohort]:
        """The slots of all banks whose parameters take part."""
        columns_of = self.capture.columns_of(self.laid.steps, self.faults)
        return [
            cohort
            for bank in cluster
            for cohort in split_into_cohorts(
                bank,
                *algorithm_of(self.recipe, bank.bucket.key),
                work,
                self.laid.steps,
                self.recipe.numerics.dtype,
                self.steps_per_epoch,
                columns_of if bank.bucket.key.role == MAIN else None,
            )
        ]

    def _update(self, active: Mapping[int, Tensor], cohorts: Sequence[Cohort]) -> None:
        """Takes gradients into the statistics, in step with other ranks where there are some."""
        together = self.laid.ranks.together
        if together is None:
            updates = Updates()
            for cohort in cohorts:
                update_alone(cohort, updates)
        else:
            updates = together.update(cohorts, active, self.laid.steps)
        updates.report(self.faults)

    def _rates(
        self, cluster: Sequence[Bank], gradients: Mapping[int, Tensor]
    ) -> dict[int, float | Tensor]:
        """Learning rate of each parameter that takes part; of all of them where ranks share."""
        here = {index for bank in cluster for index in bank.bucket.params}
        schedule, scales, rates = self.recipe.schedules.lr_schedule, dict[int, float](), {}
        for index in gradients:
            if index in here or self.laid.ranks.sharding is not None:
                step = self.laid.steps[index] + 1
                if step not in scales:
                    ctx = StepContext(step=step, steps_per_epoch=self.steps_per_epoch)
                    scales[step] = ctx.value(schedule)
                rates[index] = scales[step] * self.param_groups[self.laid.group_of[index]]["lr"]
        return rates

    def _alphas(
        self, item: Slot | PlannedView, rates: Rates, factor: float
    ) -> list[float | Tensor]:
        """What a direction is multiplied with before it is added to its parameters."""
        fallback = item.role == FALLBACK
        ratio = self.recipe.fallback.fallback_lr_ratio if fallback else 1.0
        return [-rates[index] * ratio * factor for index in item.params]

    def _add_shared(
        self,
        sharding: Sharding,
        cohorts: Sequence[Cohort],
        weights: Mapping[int, Tensor],
        rates: Rates,
    ) -> None:
        """Adds directions to weights, those of other ranks as well."""
        targets = sharding.targets(weights)
        sent: dict[tuple[int, str], Tensor] = {}
        for cohort in cohorts:
            for slot, groups in cohort.parts():
                direction = cohort.direction[groups]
                if sharding.is_exchanged(slot):
                    sent[slot_key(slot)] = direction * cohort.factor
                else:
                    slot.add_from_blocks(
                        targets, direction, self._alphas(slot, rates, cohort.factor)
                    )
        for share, direction in sharding.exchange(sent, weights):
            alphas = self._alphas(share.view, rates, 1.0)
            add_from_blocks(share.view, targets, direction, alphas)
        for index, delta in sharding.delivered(targets):
            weights[index].add_(delta)
