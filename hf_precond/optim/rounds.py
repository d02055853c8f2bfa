"""Updates whose blocks lie on several ranks, all layers at once.

An update is a generator that asks for sums over blocks (:class:`SumOverBlocks`) or for one rank's
result (:class:`FromOneRank`). All updates of a step run side by side: what they ask in one round
goes over the wire in one flat all-reduce. A small control vector goes first: a factorisation that
fails on one rank ends the round on all of them, what failed is left out, the others start again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError
from hf_precond.optim.comm import Comm
from hf_precond.preconditioners.base import (
    FromOneRank,
    NewState,
    Preconditioner,
    Rounds,
    State,
    StepContext,
    SumOverBlocks,
    commit,
)

Request = SumOverBlocks | FromOneRank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stack:
    """A stack of groups to be updated.

    Attributes:
        params: the parameters it belongs to; of a stack of no groups all of its kind.
        kind: stacks of one kind, on all ranks, have equal requests.
        places: groups of this kind on all ranks together.
        index: place of each group of this stack among them, ``[G]``.
        leads: whether this rank's result is everybody's, ``[G]``.
        split: the same stack as one of each slot.
    """

    algorithm: Preconditioner
    state: State
    gradient: Tensor
    ctx: StepContext
    params: frozenset[int]
    kind: tuple[int, ...]
    places: int
    index: Tensor
    leads: Tensor
    split: Callable[[], Iterable[Stack]] = tuple

    def start(self) -> Rounds:
        """The update, not yet begun."""
        rounds: Rounds = self.algorithm.update_in_rounds(  # type: ignore[attr-defined]
            self.state, self.gradient, self.ctx
        )
        return rounds


def update_in_lockstep(
    stacks: Sequence[Stack],
    kinds: Mapping[tuple[int, ...], frozenset[int]],
    probe: Callable[[tuple[int, ...], frozenset[int]], Stack],
    comm: Comm,
    *,
    shared_blocks: bool,
    num_params: int,
    device: torch.device,
) -> dict[int, str]:
    """Updates all stacks and returns what failed on some rank: parameter -> message.

    Args:
        stacks: of this rank.
        kinds: what some rank has, and of which parameters.
        probe: makes a stack of no groups of a kind, for a rank that has none: it asks the same.
        shared_blocks: whether blocks are spread over the ranks; else each rank has all of them.
    """
    attempt = _Attempt(comm, shared_blocks, num_params, device)
    waiting, failed = list(stacks), dict[int, str]()
    while True:
        present = {stack.kind for stack in waiting}
        probes = [
            probe(kind, params)
            for kind, params in kinds.items()
            if kind not in present and not params <= failed.keys()
        ]
        attempt.begin([*waiting, *probes])
        while attempt.goes_on():
            attempt.answer()
        if not attempt.bad and not attempt.suspect:
            break
        waiting = [stack for stack in waiting if stack not in attempt.done]
        failed |= attempt.bad
        waiting = [part for stack in waiting for part in _without(stack, failed, attempt.suspect)]
    for stack, new in (attempt.done | attempt.finished).items():
        commit(stack.state, new)
    return failed


def _without(stack: Stack, failed: dict[int, str], suspect: set[int]) -> Iterable[Stack]:
    """What is left of a stack; one in which something failed falls apart into its slots."""
    if not stack.params & (failed.keys() | suspect):
        return [stack]
    return [part for part in stack.split() if not part.params & failed.keys()]


class _Attempt:
    """Runs of all updates, each to its end or to the first failure on any rank.

    Attributes:
        done: stacks that are done for good, having asked nobody, and their new state.
        finished: stacks that came to their end in this run.
        bad: what failed in this run: parameter -> message.
        suspect: parameters of stacks in which something failed, nobody knows yet where.
    """

    def __init__(
        self, comm: Comm, shared_blocks: bool, num_params: int, device: torch.device
    ) -> None:
        self.done: dict[Stack, NewState] = {}
        self._comm, self._shared, self._num_params = comm, shared_blocks, num_params
        self._device = device

    def begin(self, stacks: Sequence[Stack]) -> None:
        """Starts all updates."""
        self.finished: dict[Stack, NewState] = {}
        self.bad: dict[int, str] = {}
        self.suspect: set[int] = set()
        self._live: dict[Stack, tuple[Rounds, Request]] = {}
        self._broken: dict[Stack, str] = {}
        self._all = list(stacks)
        for stack in self._all:
            self._advance(stack, stack.start(), None)
        self.done |= self.finished
        self.finished = {}

    def goes_on(self) -> bool:
        """Tells the other ranks how it goes; false where all is done, or something failed."""
        control = torch.zeros(2 * self._num_params + 1)
        for stack in self._broken:
            alone = len(list(stack.split())) <= 1
            control[[index + (0 if alone else self._num_params) for index in stack.params]] = 1
        control[-1] = len(self._live)
        control = self._comm.sum_everywhere(control.to(self._device))
        bad, suspect, live = control.split([self._num_params, self._num_params, 1])
        messages = {i: text for stack, text in self._broken.items() for i in stack.params}
        elsewhere = "a factorisation failed on another rank"
        self.bad = {i: messages.get(i, elsewhere) for i in bad.nonzero().flatten().tolist()}
        self.suspect = set(suspect.nonzero().flatten().tolist())
        return not self.bad and not self.suspect and bool(live)

    def answer(self) -> None:
        """Answers what all live updates ask, in one sum."""
        by_kind: dict[tuple[int, ...], list[Stack]] = defaultdict(list)
        for stack in self._all:
            if stack in self._live:
                by_kind[stack.kind].append(stack)
        asked = [by_kind[kind] for kind in sorted(by_kind) if self._crosses(by_kind[kind][0])]
        sent = [buffer for members in asked for buffer in self._buffers(members)]
        totals = iter(self._comm.sum(sent) if sent else ())
        answers: dict[Stack, tuple[Tensor, ...]] = {}
        for members in asked:
            found = [next(totals) for _ in self._live[members[0]][1].tensors]
            answers |= {s: tuple(total[s.index] for total in found) for s in members}
        live = {
            stack: (rounds, answers.get(stack, request.tensors), request)
            for stack, (rounds, request) in self._live.items()
        }
        if self._comm.replicas is not None:
            same = [a for _, a, request in live.values() if isinstance(request, FromOneRank)]
            self._comm.replicas.broadcast_([tensor for answer in same for tensor in answer])
        self._live = {}
        for stack, (rounds, answer, _) in live.items():
            self._advance(stack, rounds, answer)

    def _crosses(self, stack: Stack) -> bool:
        """Whether what a stack asks is not already there."""
        request = self._live[stack][1]
        if isinstance(request, SumOverBlocks):
            return self._shared
        return not (self._shared and request.per_block)

    def _buffers(self, members: Sequence[Stack]) -> list[Tensor]:
        """What this rank adds to the sums of one kind: ``[places, ...]`` for each tensor asked."""
        first = self._live[members[0]][1].tensors
        buffers = [x.new_zeros(members[0].places, *x.shape[1:]) for x in first]
        for stack in members:
            request = self._live[stack][1]
            for buffer, x in zip(buffers, request.tensors, strict=True):
                if isinstance(request, FromOneRank):
                    leads = stack.leads.view(-1, *[1] * (x.ndim - 1))
                    x = torch.where(leads, x, torch.zeros_like(x))
                buffer.index_add_(0, stack.index, x)
        return buffers

    def _advance(self, stack: Stack, rounds: Rounds, answer: tuple[Tensor, ...] | None) -> None:
        try:
            request = next(rounds) if answer is None else rounds.send(answer)
        except StopIteration as end:
            self.finished[stack] = end.value
        except DecompositionError as error:
            self._broken[stack] = str(error)
        else:
            self._live[stack] = rounds, request
