"""From gradients to directions, for buckets that share parameters.

    gather -> [momentum of the gradient] -> statistics when due -> direction -> graft -> [momentum]

Everything works on cohorts: the slots of a bucket whose parameters are at the same step. As a rule
that is the whole bucket, worked on in place; after a missing or non-finite gradient its rows are
selected and written back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError
from hf_precond.linalg.norms import group_squares
from hf_precond.optim.banks import Bank, BankRows
from hf_precond.optim.comm import Comm
from hf_precond.optim.faults import Faults
from hf_precond.optim.health import Health
from hf_precond.optim.stages import (
    NORM_EPS,
    StageOptions,
    graft_,
    momentum_,
)
from hf_precond.preconditioners.base import Columns, Preconditioner, State, StepContext
from hf_precond.views.plan import Slot


@dataclass(slots=True, kw_only=True)
class Cohort:
    """Slots of one bucket in flight.

    Attributes:
        gradient: ``[G, M, B]``; may alias ``param.grad``.
        direction: ``[G, M, B]``: the moment first, then the direction; may alias gradient or state.
        factor: factor of the direction, the bias correction of its first moment.
        graft_sq: squares of the graft partner's step summed per group, ``[G]``.
    """

    slots: Sequence[Slot]
    algorithm: Preconditioner
    stages: StageOptions
    rows: BankRows
    ctx: StepContext
    gradient: Tensor
    direction: Tensor
    factor: float = 1.0
    graft_sq: Tensor | None = None

    @property
    def state(self) -> State:
        """The stacked state of the cohort."""
        return self.rows.state

    def parts(self) -> Iterator[tuple[Slot, slice]]:
        """Yields each slot with its groups in this stack."""
        start = 0
        for slot in self.slots:
            stop = start + slot.stop - slot.start
            yield slot, slice(start, stop)
            start = stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What norms are taken over.

    Attributes:
        stages: of the algorithm.
        owners: number of parameters, views and groups of the optimizer, by the names of the scopes.
        like: a tensor of the state's dtype and device.
        comm: the ranks that have other parts of the same parameters, if any.
    """

    stages: StageOptions
    owners: Mapping[str, int]
    like: Tensor
    comm: Comm | None = None

    def sum(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all ranks."""
        return list(totals) if self.comm is None else self.comm.sum(totals)


def run(
    cohorts: Sequence[Cohort],
    update: Callable[[Sequence[Cohort]], None],
    *,
    scope: Scope,
    rates: Mapping[int, float | Tensor],
    health: Health,
) -> None:
    """Takes cohorts that share parameters from their gradients to their directions.

    Args:
        update: takes gradients into the statistics.
        rates: learning rate of each parameter.

    Raises:
        DecompositionError: if a parameter's factorisation failed too often in a row.
    """
    norms = _graft_input_norms(cohorts, scope)
    update(cohorts)
    _precondition(cohorts, norms)
    _graft(cohorts, scope, health)
    _clip(cohorts, scope, rates, health)
    for cohort in cohorts:
        if cohort.stages.momentum_site == "direction":
            cohort.direction, cohort.factor = momentum_(
                cohort.stages, cohort.state, cohort.direction, cohort.ctx.step
            )
        cohort.rows.commit(cohort.ctx.step)


def split_into_cohorts(
    bank: Bank,
    algorithm: Preconditioner,
    stages: StageOptions,
    gradients: Mapping[int, Tensor],
    steps: Sequence[int],
    dtype: torch.dtype,
    steps_per_epoch: float | None = None,
    columns_of: Callable[[Slot, Mapping[int, Tensor]], Columns | None] | None = None,
) -> Iterator[Cohort]:
    """Yields the cohorts of a bucket with their gradients stacked in the state dtype.

    Args:
        gradients: gradient of each parameter that takes part.
        steps: steps done so far, per parameter.
        columns_of: what the layer of a slot has seen, for algorithms that need it. Layers that have
            seen batches of another shape are cohorts of their own.
    """
    alike: dict[tuple[Any, ...], list[tuple[Slot, Columns | None]]] = defaultdict(list)
    for slot in bank.bucket.slots:
        if all(index in gradients for index in slot.params):
            columns = columns_of(slot, gradients) if columns_of else None
            seen = None if columns is None else columns.kind
            alike[steps[slot.param] + 1, seen].append((slot, columns))
    for (step, _), members in alike.items():
        slots = [slot for slot, _ in members]
        rows = bank.rows(slots)
        blocks = [slot.to_blocks(gradients) for slot in slots]
        parts = [columns for _, columns in members if columns is not None]
        gradient = (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).to(dtype)
        moment = gradient
        if stages.momentum_site == "gradient":
            moment, factor = momentum_(stages, rows.state, gradient, step)
            # Exactly one after some hundred steps: no copy then.
            moment = moment if factor == 1 else moment * factor
        yield Cohort(
            slots=slots,
            algorithm=algorithm,
            stages=stages,
            rows=rows,
            ctx=StepContext(
                step=step,
                phases=rows.phases,
                steps_per_epoch=steps_per_epoch,
                moment=moment,
                columns=Columns.stack(parts) if parts else None,
            ),
            gradient=gradient,
            direction=moment,
        )


def _precondition(cohorts: Sequence[Cohort], norms: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Replaces each moment by its direction.

    Args:
        norms: of each cohort's gradients and moments, as their graft partners see them.
    """
    for cohort, (gradient_norm, moment_norm) in zip(cohorts, norms, strict=True):
        stages, moment, step = cohort.stages, cohort.direction, cohort.ctx.step
        partner = None
        if stages.graft != "none":
            gradient = cohort.gradient, gradient_norm
            partner = graft_(stages, cohort.state, gradient, (moment, moment_norm), step)
        if step < stages.start_step:
            cohort.direction = cohort.gradient if partner is None else partner
            continue
        cohort.direction = cohort.algorithm.apply(cohort.state, moment, cohort.ctx)
        if partner is not None:
            cohort.graft_sq = group_squares(partner)


@dataclass(slots=True)
class Updates:
    """How the updates of a step went.

    Attributes:
        failed: parameter -> what went wrong.
        refreshed: parameters whose factorisations were due and succeeded.
    """

    failed: dict[int, str] = field(default_factory=dict)
    refreshed: set[int] = field(default_factory=set)

    def report(self, faults: Faults) -> None:
        """Counts what failed.

        Raises:
            DecompositionError: if a parameter's factorisation failed too often in a row.
        """
        for index in sorted(self.failed):
            faults.count([index], "failed_updates", self.failed[index], DecompositionError)
        faults.clear(self.refreshed - set(self.failed), "failed_updates")


def update_alone(cohort: Cohort, updates: Updates) -> None:
    """Updates statistics; a failed factorisation leaves only its own parameters' as they were."""
    params = {slot.param for slot in cohort.slots}
    try:
        cohort.algorithm.update(cohort.state, cohort.gradient, cohort.ctx)
    except DecompositionError as error:
        if len(cohort.slots) == 1:
            updates.failed |= dict.fromkeys(params, str(error))
            return
        for slot, groups in cohort.parts():
            update_alone(part_of(cohort, slot, groups), updates)
        return
    if cohort.ctx.refreshed:
        updates.refreshed |= params


def part_of(cohort: Cohort, slot: Slot, groups: slice) -> Cohort:
    """One slot of a cohort as a cohort of its own, on the same state."""
    state = {name: tensor[groups] for name, tensor in cohort.state.items()}
    rows = BankRows(cohort.rows.bank, [slot], state, None)
    columns = cohort.ctx.columns
    columns = None if columns is None else columns.select(groups)
    return replace(
        cohort,
        slots=[slot],
        rows=rows,
        ctx=replace(
            cohort.ctx,
            phases=rows.phases,
            moment=None if cohort.ctx.moment is None else cohort.ctx.moment[groups],
            columns=columns,
            refreshed=False,
        ),
        gradient=cohort.gradient[groups],
        direction=cohort.direction[groups],
    )


def _graft(cohorts: Sequence[Cohort], scope: Scope, health: Health) -> None:
    """Gives each direction the norm of its graft partner's step."""
    if scope.stages.graft == "none":
        return
    grafted = [(c, c.graft_sq) for c in cohorts if c.graft_sq is not None]
    members = [cohort for cohort, _ in grafted]
    wanted_sq = [squares for _, squares in grafted]
    own_sq = [group_squares(c.direction) for c in members]
    kind = scope.stages.graft_scope
    wanted, own = _norms(members, [wanted_sq, own_sq], kind, scope)
    for cohort, target, norm in zip(members, wanted, own, strict=True):
        ratio = target / (norm + NORM_EPS)
        cohort.direction = cohort.direction * ratio
        health.observe("graft_ratio", ratio)


def _clip(
    cohorts: Sequence[Cohort], scope: Scope, rates: Mapping[int, float | Tensor], health: Health
) -> None:
    """Shortens directions that would move the weights, or the model's outputs, too far."""
    if scope.stages.clip_mode == "none":
        return
    clipped = [cohort for cohort in cohorts if cohort.stages.clip_mode != "none"]
    limit = scope.stages.clip_limit
    if scope.stages.clip_mode == "update_rms":
        squares = [group_squares(cohort.direction) for cohort in clipped]
        norms, counts = _norms(clipped, [squares, _sizes(clipped)], "parameter", scope)
        counts = [count.square() for count in counts]
        ratios = [
            limit * count.sqrt() / norm.clamp(min=NORM_EPS)
            for count, norm in zip(counts, norms, strict=True)
        ]
    else:
        change = scope.like.new_zeros(())
        for cohort in clipped:
            change = change + _step_product(cohort, rates)
        (change,) = scope.sum([change])
        ratio = (limit / change.clamp(min=NORM_EPS)).sqrt()
        ratios = [ratio] * len(clipped)
    for cohort, ratio in zip(clipped, ratios, strict=True):
        factor = ratio.clamp(max=1)
        cohort.direction = cohort.direction * factor
        health.observe("clip_factor", factor)


def _step_product(cohort: Cohort, rates: Mapping[int, float | Tensor]) -> Tensor:
    """lr^2 <direction, gradient> summed over a cohort: twice the change of the model's outputs."""
    dtype = cohort.direction.dtype
    lr = torch.stack([torch.as_tensor(rates[slot.param], dtype=dtype) for slot in cohort.slots])
    sizes = torch.tensor([slot.stop - slot.start for slot in cohort.slots])
    inner = (cohort.direction * cohort.gradient).sum((-2, -1))
    return (inner * lr.to(inner).repeat_interleave(sizes.to(inner.device)).square()).sum()


def _sizes(cohorts: Sequence[Cohort]) -> list[Tensor]:
    """Entries of each group, ``[G]``."""
    return [c.gradient.new_full(c.gradient.shape[:1], c.gradient[0].numel()) for c in cohorts]


def _graft_input_norms(cohorts: Sequence[Cohort], scope: Scope) -> list[tuple[Tensor, Tensor]]:
    """Norms of gradients and of moments over whole parameters, for normalized grafts; ones where
    nobody asks for them."""
    if not scope.stages.graft_normalizes:
        one = scope.like.new_ones(())
        return [(one, one) for _ in cohorts]
    squares = [group_squares(cohort.gradient) for cohort in cohorts]
    if scope.stages.momentum_site == "direction":
        (norms,) = _norms(cohorts, [squares], "parameter", scope)
        return list(zip(norms, norms, strict=True))
    of_moments = [group_squares(cohort.direction) for cohort in cohorts]
    norms, moment_norms = _norms(cohorts, [squares, of_moments], "parameter", scope)
    return list(zip(norms, moment_norms, strict=True))


def _norms(
    cohorts: Sequence[Cohort], squares: Sequence[Sequence[Tensor]], kind: str, scope: Scope
) -> list[list[Tensor]]:
    """Norms over whole parameters, views or groups from squares per group ``[G]``.

    Args:
        squares: several kinds of them, each with one tensor for each cohort.

    Returns:
        of each kind one tensor ``[G, 1, 1]`` for each cohort.
    """
    indices = [cohort.rows.owner(kind) for cohort in cohorts]
    totals = [scope.like.new_zeros(scope.owners[kind]) for _ in squares]
    for total, of_kind in zip(totals, squares, strict=True):
        for index, square in zip(indices, of_kind, strict=True):
            total.index_add_(0, index, square)
    return [
        [total[index].sqrt()[:, None, None] for index in indices] for total in scope.sum(totals)
    ]
