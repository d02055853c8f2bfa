"""From gradients to directions, for buckets that share parameters.

    gather -> [momentum of the gradient] -> statistics when due -> direction -> graft -> [momentum]

Everything works on cohorts: the slots of a bucket whose parameters are at the same step. As a rule
that is the whole bucket, worked on in place; after a missing or non-finite gradient its rows are
selected and written back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError
from hf_precond.optim.banks import Bank, BankRows
from hf_precond.optim.faults import Faults
from hf_precond.optim.health import Health
from hf_precond.optim.stages import (
    NORM_EPS,
    StageOptions,
    graft_input,
    graft_step,
    graft_update_,
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


def run(
    cohorts: Sequence[Cohort],
    *,
    owners: Mapping[str, int],
    rates: Mapping[int, float | Tensor],
    faults: Faults,
    health: Health,
) -> None:
    """Takes cohorts that share parameters from their gradients to their directions.

    Args:
        owners: number of parameters, views and groups of the optimizer, by the names of the scopes.
        rates: learning rate of each parameter.

    Raises:
        DecompositionError: if a parameter's factorisation failed too often in a row.
    """
    _precondition(cohorts, owners, faults)
    _graft(cohorts, owners, health)
    _clip(cohorts, owners, rates, health)
    for cohort in cohorts:
        if cohort.stages.momentum_site == "direction":
            cohort.direction, cohort.factor = momentum_(
                cohort.stages, cohort.state, cohort.direction, cohort.ctx.step
            )
        cohort.rows.commit()


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
            moment = moment * factor
        yield Cohort(
            slots=slots,
            algorithm=algorithm,
            stages=stages,
            rows=rows,
            ctx=StepContext(
                step=step,
                phases=rows.phases,
                steps_per_epoch=steps_per_epoch,
                columns=Columns.stack(parts) if parts else None,
            ),
            gradient=gradient,
            direction=moment,
        )


def _precondition(cohorts: Sequence[Cohort], owners: Mapping[str, int], faults: Faults) -> None:
    """Takes gradients into the statistics and replaces each moment by its direction."""
    gradient_norms = _graft_input_norms(cohorts, [c.gradient for c in cohorts], owners)
    moment_norms = gradient_norms
    if any(cohort.direction is not cohort.gradient for cohort in cohorts):
        moment_norms = _graft_input_norms(cohorts, [c.direction for c in cohorts], owners)
    for cohort, gradient_norm, moment_norm in zip(
        cohorts, gradient_norms, moment_norms, strict=True
    ):
        _update(cohort, faults)
        stages, moment, step = cohort.stages, cohort.direction, cohort.ctx.step
        partner = None
        if stages.graft != "none":
            seen = graft_input(stages, cohort.gradient, gradient_norm)
            graft_update_(stages, cohort.state, seen)
            if moment is not cohort.gradient:
                seen = graft_input(stages, moment, moment_norm)
            partner = graft_step(stages, cohort.state, seen, step)
        if step < stages.start_step:
            cohort.direction = cohort.gradient if partner is None else partner
            continue
        cohort.direction = cohort.algorithm.apply(cohort.state, moment, cohort.ctx)
        if partner is not None:
            cohort.graft_sq = _group_squares(partner)


def _update(cohort: Cohort, faults: Faults) -> None:
    """Updates statistics; a failed factorisation leaves only its own parameters' as they were."""
    params = {slot.param for slot in cohort.slots}
    try:
        cohort.algorithm.update(cohort.state, cohort.gradient, cohort.ctx)
    except DecompositionError as error:
        if len(cohort.slots) == 1:
            faults.count(params, "failed_updates", str(error), DecompositionError)
            return
        for slot, groups in cohort.parts():
            _update(_part(cohort, slot, groups), faults)
        return
    if cohort.ctx.refreshed:
        faults.clear(params, "failed_updates")


def _part(cohort: Cohort, slot: Slot, groups: slice) -> Cohort:
    """One slot of a cohort as a cohort of its own, on the same state."""
    state = {name: tensor[groups] for name, tensor in cohort.state.items()}
    rows = BankRows(cohort.rows.bank, [slot], state, None)
    columns = cohort.ctx.columns
    columns = None if columns is None else columns.select(groups)
    return replace(
        cohort,
        slots=[slot],
        rows=rows,
        ctx=replace(cohort.ctx, phases=rows.phases, columns=columns, refreshed=False),
        gradient=cohort.gradient[groups],
        direction=cohort.direction[groups],
    )


def _graft(cohorts: Sequence[Cohort], owners: Mapping[str, int], health: Health) -> None:
    """Gives each direction the norm of its graft partner's step."""
    grafted = [(c, c.graft_sq) for c in cohorts if c.graft_sq is not None]
    if not grafted:
        return
    members = [cohort for cohort, _ in grafted]
    scope = members[0].stages.graft_scope
    wanted = _norms(members, [squares for _, squares in grafted], scope, owners)
    own = _norms(members, [_group_squares(c.direction) for c in members], scope, owners)
    for cohort, target, norm in zip(members, wanted, own, strict=True):
        ratio = target / (norm + NORM_EPS)
        cohort.direction = cohort.direction * ratio
        health.observe("graft_ratio", ratio)


def _clip(
    cohorts: Sequence[Cohort],
    owners: Mapping[str, int],
    rates: Mapping[int, float | Tensor],
    health: Health,
) -> None:
    """Shortens directions that would move the weights, or the model's outputs, too far."""
    clipped = [cohort for cohort in cohorts if cohort.stages.clip_mode != "none"]
    if not clipped:
        return
    limit = clipped[0].stages.clip_limit
    if clipped[0].stages.clip_mode == "update_rms":
        norms = _norms(clipped, [_group_squares(c.direction) for c in clipped], "parameter", owners)
        counts = _sizes(clipped, owners)
        ratios = [
            limit * count.sqrt() / norm.clamp(min=NORM_EPS)
            for count, norm in zip(counts, norms, strict=True)
        ]
    else:
        change = sum(_step_product(cohort, rates) for cohort in clipped)
        ratio = (limit / torch.as_tensor(change).clamp(min=NORM_EPS)).sqrt()
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


def _sizes(cohorts: Sequence[Cohort], owners: Mapping[str, int]) -> list[Tensor]:
    """Entries of the whole parameter that each group is a part of, ``[G, 1, 1]``."""
    counts = [cohort.gradient.new_full(cohort.gradient.shape[:1], 1.0) for cohort in cohorts]
    entries = [
        count * cohort.gradient[0].numel() for count, cohort in zip(counts, cohorts, strict=True)
    ]
    return [norm.square() for norm in _norms(cohorts, entries, "parameter", owners)]


def _graft_input_norms(
    cohorts: Sequence[Cohort], tensors: Sequence[Tensor], owners: Mapping[str, int]
) -> list[Tensor]:
    """Norms over whole parameters for normalized grafts; ones where nobody asks for them."""
    if any(cohort.stages.graft_normalizes for cohort in cohorts):
        squares = [_group_squares(tensor) for tensor in tensors]
        return _norms(cohorts, squares, "parameter", owners)
    return [tensor.new_ones(()) for tensor in tensors]


def _norms(
    cohorts: Sequence[Cohort],
    squares: Sequence[Tensor],
    scope: str,
    owners: Mapping[str, int],
) -> list[Tensor]:
    """Norms over whole parameters, views or groups from squares per group ``[G]``.

    Returns:
        one tensor ``[G, 1, 1]`` per cohort.
    """
    indices = [cohort.rows.owner(scope) for cohort in cohorts]
    total = squares[0].new_zeros(owners[scope])
    for index, square in zip(indices, squares, strict=True):
        total.index_add_(0, index, square)
    return [total[index].sqrt()[:, None, None] for index in indices]


def _group_squares(x_GMB: Tensor) -> Tensor:
    """Sum of squares of each group, ``[G]``."""
    return torch.linalg.vector_norm(x_GMB, dim=(-2, -1)).square()
