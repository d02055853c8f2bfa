"""Statistics of a step where several ranks train the same weights.

Either ranks share the work: they sum over blocks that lie apart, and tell each other what failed.
Or each does all of it: then what a factorisation gives is taken from one rank, because others may
have rounded it differently, and their weights would drift apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_precond.optim.banks import Bank
from hf_precond.optim.comm import Comm
from hf_precond.optim.pipeline import Cohort, Updates, part_of, update_alone
from hf_precond.optim.roles import with_rank
from hf_precond.optim.rounds import Stack, update_in_lockstep
from hf_precond.optim.work import SumKind, Work
from hf_precond.preconditioners.base import MAIN, Preconditioner, State, StepContext

_ELSEWHERE = "a factorisation failed on another rank"


class Together:
    """Updates the statistics of a rank's cohorts in step with other ranks.

    Args:
        algorithm: of the matrices.
        num_params: number of all parameters.
        work: who works on what; None where every rank does everything.
    """

    def __init__(
        self,
        comm: Comm,
        algorithm: Preconditioner,
        *,
        num_params: int,
        work: Work | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._comm, self._algorithm, self._work = comm, algorithm, work
        self._num_params = num_params
        self._dtype, self._device = dtype, device
        self._in_rounds = hasattr(algorithm, "update_in_rounds")
        sums = {} if work is None or not self._in_rounds else work.sums
        shares = () if work is None else work.shares
        self._linked = {
            (sums[share.view.piece][0], share.view.param)
            for share in shares
            if share.view.piece in sums
        }
        self._nothing: dict[SumKind, State] = {}
        self._places: WeakKeyDictionary[Bank, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def update(
        self, cohorts: Sequence[Cohort], active: Collection[int], steps: Sequence[int]
    ) -> Updates:
        """Takes gradients into the statistics.

        Args:
            active: parameters that take part in this step, on any rank.
            steps: done so far, per parameter.
        """
        updates = Updates()
        linked = [cohort for cohort in cohorts if self._is_linked(cohort)]
        single = [cohort for cohort in cohorts if not self._is_linked(cohort)]
        for cohort in single:
            update_alone(cohort, updates)
        kinds = self._kinds(active, steps)
        if linked or kinds:  # alike on all ranks
            updates.failed |= update_in_lockstep(
                [self._stack(cohort) for cohort in linked],
                kinds,
                self._probe,
                self._comm,
                shared_blocks=self._work is not None,
                num_params=self._num_params,
                device=self._device,
            )
            updates.refreshed |= {
                slot.param for cohort in linked if cohort.ctx.refreshed for slot in cohort.slots
            }
        alike = self._comm if self._work is None else self._comm.replicas
        if alike is not None:
            self._take_from_first(single, alike)
        # Where every rank does everything, all know when nothing was due.
        if self._work is not None or any(cohort.ctx.refreshed for cohort in cohorts):
            self._tell(updates)
        return updates

    def _is_linked(self, cohort: Cohort) -> bool:
        """Whether an update asks other ranks on its way."""
        if not self._in_rounds or cohort.slots[0].role != MAIN:
            return False
        return self._work is None or cohort.slots[0].piece in self._work.sums

    def _tell(self, updates: Updates) -> None:
        """Brings together what failed, and what went well, on all ranks."""
        flags = torch.zeros(2, self._num_params, device=self._device)
        flags[0, list(updates.failed)] = 1
        flags[1, list(updates.refreshed)] = 1
        flags = self._comm.sum_everywhere(flags)
        failed, refreshed = (row.nonzero().flatten().tolist() for row in flags)
        updates.failed = {index: updates.failed.get(index, _ELSEWHERE) for index in failed}
        updates.refreshed = set(refreshed)

    def _take_from_first(self, cohorts: Sequence[Cohort], comm: Comm) -> None:
        """Replaces what has just been factorised by the first rank's of those that did the same."""
        tensors = []
        for cohort in cohorts:
            if cohort.ctx.refreshed:
                meta = torch.device("meta")
                stage = cohort.stages.init((1, 1, 1), dtype=self._dtype, device=meta)
                tensors += [value for name, value in cohort.state.items() if name not in stage]
        comm.broadcast_(tensors)

    def _stack(self, cohort: Cohort) -> Stack:
        size = cohort.gradient.shape[0]
        if self._work is None:
            kind: tuple[int, ...] = (cohort.ctx.step, *(slot.piece for slot in cohort.slots))
            places = size
        else:
            of_sums, _ = self._work.sums[cohort.slots[0].piece]
            kind, places = (*of_sums, cohort.ctx.step), self._work.places[of_sums]
        index, leads = self._index_and_leads(cohort)
        return Stack(
            algorithm=cohort.algorithm,
            state=cohort.state,
            gradient=cohort.gradient,
            ctx=cohort.ctx,
            params=frozenset(slot.param for slot in cohort.slots),
            kind=kind,
            places=places,
            index=index,
            leads=leads,
            split=partial(self._split, cohort),
        )

    def _split(self, cohort: Cohort) -> Iterable[Stack]:
        return [self._stack(part_of(cohort, *part)) for part in cohort.parts()]

    def _index_and_leads(self, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """Where the groups of a cohort have their place, remembered for whole banks."""
        bank = cohort.rows.bank
        if len(cohort.slots) < len(bank.bucket.slots):
            return self._places_of(cohort)
        if bank not in self._places:
            self._places[bank] = self._places_of(cohort)
        return self._places[bank]

    def _places_of(self, cohort: Cohort) -> tuple[Tensor, Tensor]:
        if self._work is None:
            size = cohort.gradient.shape[0]
            index = torch.arange(size)
            leads = torch.full((size,), self._comm.rank == 0)
        else:
            places, leading = [], []
            for slot in cohort.slots:
                assert slot.extent is not None
                first = self._work.sums[slot.piece][1]
                for group in range(*slot.extent.groups):
                    places.append(first + group)
                    leading.append(self._work.leaders[slot.piece][group] == self._comm.rank)
            index, leads = torch.tensor(places), torch.tensor(leading)
        return index.to(self._device), leads.to(self._device)

    def _kinds(
        self, active: Collection[int], steps: Sequence[int]
    ) -> dict[tuple[int, ...], frozenset[int]]:
        """Each kind of update, (block size, rank, step), that some rank has in this step."""
        found: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for kind, param in self._linked:
            if param in active:
                found[(*kind, steps[param] + 1)].add(param)
        return {kind: frozenset(params) for kind, params in found.items()}

    def _probe(self, kind: tuple[int, ...], params: frozenset[int]) -> Stack:
        """A stack of no groups, which asks the same as those of its kind."""
        assert self._work is not None
        columns, rank, step = kind
        algorithm, shape = with_rank(self._algorithm, rank), (0, 1, columns)
        if (columns, rank) not in self._nothing:
            self._nothing[columns, rank] = algorithm.init(
                shape, dtype=self._dtype, device=self._device
            )
        nothing = torch.zeros(0, dtype=torch.long, device=self._device)
        return Stack(
            algorithm=algorithm,
            state=self._nothing[columns, rank],
            gradient=torch.zeros(shape, dtype=self._dtype, device=self._device),
            ctx=StepContext(step=step),
            params=params,
            kind=kind,
            places=self._work.places[columns, rank],
            index=nothing,
            leads=nothing.bool(),
        )
