"""A rank for each view under one budget of state: ``rank="auto"``.

The second moments of one layer fall fast over the columns of a basis, those of another are nearly
even; what a column costs in bytes differs, too. Ranks go where a byte makes the description of the
second moments most likely (:func:`fit`), each view counted by its weights. They are chosen anew
every ``rank_interval`` steps, after a step, when all state fits together, and the state is carried
over.

A view moves by one rung at a time: what no column has seen is filled in, falling as a geometric
series from the last column on with the sum that is known, and that is good for a few columns only.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import log
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from hf_precond.optim.banks import Bank, state_key
from hf_precond.optim.laid_out import LaidOut
from hf_precond.optim.layout import PlacedView, placed_views
from hf_precond.optim.options import Recipe
from hf_precond.optim.roles import init_stack, with_rank
from hf_precond.preconditioners.base import MAIN, RankAdaptive, Spectrum
from hf_precond.views.plan import Key, Slot

logger = logging.getLogger(__name__)

# 1, 2, 3, 4, 6, 8, 12, ... 768, 1024: few enough that layers of one shape still stack.
RUNGS = (1, *(columns << doublings for doublings in range(9) for columns in (2, 3)), 1024)
# What is less than this part of the mean is rounding.
_LEAST_SHARE = 1e-8
# So many times as much must columns be worth elsewhere.
_RELUCTANCE = 1.25
_META = torch.device("meta")
_STEP_BYTES = 4

ViewRanks = list[list[int]]
"""For each parameter the rank of each of its views; 0 for one that the algorithm does not take."""


# --- the choice -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What a view can have: ranks in increasing order, their bytes, and what they are worth."""

    ranks: Sequence[int]
    num_bytes: Sequence[int]
    values: Sequence[float]


def fit(spectrum: Spectrum, ranks: Sequence[int]) -> list[float]:
    """Returns how well a basis of so many columns describes the second moments, for each rank.

    That is minus the logarithm of the determinant of the description per dimension: of the shares
    of the columns and, for all other directions, of their mean. It is the likelihood of Tipping and
    Bishop, Probabilistic Principal Component Analysis (1999), eq. 4, at its maximum. A direction
    counts by how far its share is from the mean of those that stay outside; the size of the
    gradients does not.
    """
    inside, outside, count = spectrum.inside, spectrum.outside, spectrum.num_outside
    size = len(inside) + count
    shares = [*inside, *_filled_in(inside[-1], outside, count, max(ranks) - len(inside))]
    least = _LEAST_SHARE / size
    found, held, done = [], 0.0, 0
    rest = sum(inside) + outside
    for rank in ranks:
        for share in shares[done:rank]:
            held, rest = held + log(max(share, least)), rest - share
        done = rank
        other = size - rank
        found.append(-(held + other * log(max(rest / max(1, other), least))) / size)
    return found


def _filled_in(last: float, outside: float, count: int, wanted: int) -> list[float]:
    """The first shares of directions that no column has seen."""
    ratio = _ratio(last, outside, count)
    if ratio is None:
        return [outside / count] * min(wanted, count) if count else []
    return [last * ratio**index for index in range(1, min(wanted, count) + 1)]


def _ratio(last: float, total: float, count: int) -> float | None:
    """Ratio of a geometric series of ``count`` terms that goes on after ``last`` and sums up to
    ``total``; None where equal terms would be no smaller than ``last``."""
    if total >= last * count:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        ratio = (low + high) / 2
        low, high = (ratio, high) if _geometric(last, ratio, count) < total else (low, ratio)
    return low


def _geometric(last: float, ratio: float, count: int) -> float:
    return last * ratio * (1 - ratio**count) / (1 - ratio)


def choose(candidates: Sequence[Candidate], budget: float) -> list[int]:
    """Returns one rank for each candidate, together within a budget of bytes.

    From the smallest on, always the step up that is worth most per byte; on the upper hull of each
    candidate, where later steps are worth less. What no longer fits is passed over.
    """
    at = [0] * len(candidates)
    spent = sum(candidate.num_bytes[0] for candidate in candidates)
    steps = [
        (-slope, index, target)
        for index, candidate in enumerate(candidates)
        for slope, target in _hull(candidate)
    ]
    blocked: set[int] = set()
    for _, index, target in sorted(steps):
        cost = candidates[index].num_bytes[target] - candidates[index].num_bytes[at[index]]
        if index in blocked or spent + cost > budget:
            blocked.add(index)
            continue
        spent, at[index] = spent + cost, target
    return [candidate.ranks[place] for candidate, place in zip(candidates, at, strict=True)]


def near(candidate: Candidate, rank: int) -> Candidate:
    """The candidate with the ranks next to one only: what is far from it is not known yet.

    Fewer columns count as worse than they are, or views of equal worth would go on exchanging them.
    """
    above = bisect_right(candidate.ranks, rank)
    below = bisect_left(candidate.ranks, rank)
    own = slice(max(0, below - 1), above + 1)
    kept = candidate.values[max(0, above - 1)]
    values = [
        kept + (value - kept) * (_RELUCTANCE if value < kept else 1)
        for value in candidate.values[own]
    ]
    return Candidate(ranks=candidate.ranks[own], num_bytes=candidate.num_bytes[own], values=values)


def _hull(candidate: Candidate) -> list[tuple[float, int]]:
    """(worth per byte, place) of the steps along the upper hull, the best first."""
    found: list[tuple[float, int]] = []
    at, last = 0, len(candidate.ranks) - 1
    while at < last:
        slopes = [
            (candidate.values[to] - candidate.values[at])
            / max(1, candidate.num_bytes[to] - candidate.num_bytes[at])
            for to in range(at + 1, last + 1)
        ]
        best = max(slopes)
        at += 1 + max(index for index, slope in enumerate(slopes) if slope == best)
        found.append((best, at))
    return [(slope, place) for slope, place in found if slope > 0]


# --- what views can have --------------------------------------------------------------------------


def rungs(algorithm: RankAdaptive, shape: tuple[int, int, int]) -> list[int]:
    """Returns the ranks that a view can have."""
    most = min(algorithm.max_rank(shape), RUNGS[-1])
    return [*(rank for rank in RUNGS if rank < most), most]


class Sizes:
    """Bytes of state, each kind of view asked once."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._known: dict[tuple[str, int, int, int], int] = {}

    def of(self, item: PlacedView, rank: int) -> int:
        """Bytes of a view's state under a rank."""
        groups, rows, columns = item.view.shape
        kind = (item.place.role, rank, rows, columns)
        if kind not in self._known:
            key = Key(item.place.role, _META, 0, rank)
            state = init_stack(self._recipe, key, (1, rows, columns), _META)
            self._known[kind] = sum(x.numel() * x.element_size() for x in state.values())
        return groups * self._known[kind]


def budget_bytes(recipe: Recipe, params: Sequence[Tensor], placed: Sequence[PlacedView]) -> int:
    """Returns the bytes that the state may have: a multiple of AdamW's, whose state has the dtype
    of the weights, or what the rank to begin with takes."""
    share = recipe.ranks.state_budget
    if share is not None:
        adamw = sum(2 * param.numel() * param.element_size() + _STEP_BYTES for param in params)
        return round(share * adamw)
    sizes = Sizes(recipe)
    return _STEP_BYTES * len(params) + sum(sizes.of(item, 0) for item in placed)


def fill_in(param_groups: Sequence[MutableMapping[str, Any]], recipe: Recipe) -> None:
    """Gives views without a rank one to begin with: the same for all, within the budget.

    Raises:
        ValueError: not even rank 1 is within the budget.
    """
    if all("view_ranks" in group for group in param_groups):
        return
    params = [param for group in param_groups for param in group["params"]]
    placed = placed_views(param_groups, recipe.algorithm)
    algorithm, sizes = adaptive(recipe), Sizes(recipe)
    limit = budget_bytes(recipe, params, placed)
    new = {index for index, has in enumerate(_have_ranks(param_groups)) if not has}

    def rank_of(item: PlacedView, rank: int) -> int:
        if item.place.role != MAIN or item.param not in new:
            return item.rank
        return max(r for r in rungs(algorithm, item.view.shape) if r <= max(1, rank))

    def total(rank: int) -> int:
        of_views = sum(sizes.of(item, rank_of(item, rank)) for item in placed)
        return _STEP_BYTES * len(params) + of_views

    least = _STEP_BYTES * len(params)
    least += sum(sizes.of(item, int(item.place.role == MAIN)) for item in placed)
    if least > limit:
        adamw = limit / (recipe.ranks.state_budget or 1.0)
        raise ValueError(
            f"state_budget = {recipe.ranks.state_budget!r} is not allowed for this model: the "
            f"state of {recipe.name} with rank 1 is {least / adamw:.3f} of AdamW's"
        )
    # Parameters that come later begin with rank 1 where the others have taken all.
    largest = max((rank for rank in RUNGS if total(rank) <= limit), default=1)
    found: ViewRanks = [[] for _ in params]
    for item in placed:
        found[item.param].append(rank_of(item, largest))
    write(param_groups, found)


def _have_ranks(param_groups: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [("view_ranks" in group) for group in param_groups for _ in group["params"]]


def write(param_groups: Sequence[MutableMapping[str, Any]], ranks: Sequence[Sequence[int]]) -> None:
    """Writes the ranks of all parameters' views into the groups, beside the views."""
    start = 0
    for group in param_groups:
        count = len(group["params"])
        group["view_ranks"] = [list(of_param) for of_param in ranks[start : start + count]]
        start += count


def read(param_groups: Sequence[Mapping[str, Any]]) -> ViewRanks:
    """Returns what :func:`write` has written."""
    return [list(of_param) for group in param_groups for of_param in group["view_ranks"]]


def mean_rank(ranks: ViewRanks) -> float:
    """Mean over the views that have a rank.

    >>> mean_rank([[8, 4], [0], [6]])
    6.0
    """
    return fmean([rank for of_param in ranks for rank in of_param if rank] or [0])


def check(
    ranks: Any, param_groups: Sequence[Mapping[str, Any]], names: Sequence[str], recipe: Recipe
) -> None:
    """Raises ValueError for saved ranks that the views of these groups cannot have.

    Args:
        ranks: as :func:`read` returns them; None where the state has no chosen ranks.
        names: of all parameters.
    """
    if (ranks is not None) != recipe.adapts_rank:
        written = "rank = 'auto'" if ranks is not None else "a fixed rank"
        own = "rank = 'auto'" if recipe.adapts_rank else "a fixed rank"
        raise ValueError(f"the state was written with {written}, this optimizer has {own}")
    if ranks is None:
        return
    expected: list[list[int]] = [[] for _ in names]
    algorithm = adaptive(recipe)
    for item in placed_views(param_groups, recipe.algorithm):
        most = algorithm.max_rank(item.view.shape) if item.place.role == MAIN else 0
        expected[item.param].append(most)
    if not isinstance(ranks, list) or len(ranks) != len(expected):
        raise ValueError(f"the state has no list of ranks for {len(expected)} parameters")
    for name, found, limits in zip(names, ranks, expected, strict=True):
        fits = isinstance(found, list) and len(found) == len(limits)
        if not fits or not all(
            type(rank) is int and min(1, limit) <= rank <= limit
            for rank, limit in zip(found, limits, strict=True)
        ):
            raise ValueError(f"ranks of {name!r}: expected at most {limits!r}, found {found!r}")


def adaptive(recipe: Recipe) -> RankAdaptive:
    """The algorithm as one whose rank may change."""
    assert isinstance(recipe.algorithm, RankAdaptive), "the registry lets no other have auto"
    return recipe.algorithm


# --- at a safe point ------------------------------------------------------------------------------


def rechoose(
    laid: LaidOut,
    param_groups: Sequence[MutableMapping[str, Any]],
    placed: Sequence[PlacedView],
    recipe: Recipe,
    state: MutableMapping[Tensor, dict[str, Any]],
) -> bool:
    """Chooses all ranks from what the state knows, and carries the state over to them.

    Where there are several ranks (processes), all of them call this and choose the same.

    Returns:
        whether any rank has changed; the state must be laid out anew then.
    """
    turns = _turns(laid, placed, recipe)
    found = _chosen(turns, laid.params, placed, recipe)
    old, new = [item.rank for item in placed], list(chain.from_iterable(found))
    if new == old:
        return False
    for bank in laid.banks:
        if bank.bucket.key.role == MAIN:
            _resize(bank, turns, new, recipe, state, laid.params)
    write(param_groups, found)
    _log(old, new, recipe.name)
    return True


def _turns(laid: LaidOut, placed: Sequence[PlacedView], recipe: Recipe) -> dict[int, list[Tensor]]:
    """What is known of the spectra, the same on all ranks: number of a view -> ``[G, ...]``."""
    comm, sharding = laid.ranks.comm, laid.ranks.sharding
    numbers = [number for number, item in enumerate(placed) if item.place.role == MAIN]
    if sharding is None:
        sums = {slot.number: parts for slot, parts in _own_sums(laid, recipe)}
    else:
        sums = {number: _no_sums(placed[number], recipe, laid.device) for number in numbers}
        everyones = {share.view.number for share in sharding.shares if share.rank is None}
        for slot, parts in _own_sums(laid, recipe):
            # What every rank has the first one adds.
            if slot.number not in everyones or sharding.comm.rank == 0:
                for total, part in zip(sums[slot.number], parts, strict=True):
                    total[_groups(slot)] += part
        flat = sharding.comm.sum([part for number in numbers for part in sums[number]])
        totals = iter(flat)
        sums = {number: [next(totals) for _ in sums[number]] for number in numbers}
    turns = {}
    for number in numbers:
        algorithm = adaptive_with(recipe, placed[number].rank)
        turns[number] = [x.contiguous() for x in algorithm.turns_for_ranks(sums[number])]
    for ranks in (comm, comm.replicas if comm is not None else None):
        if ranks is not None:
            # A factorisation elsewhere may round otherwise; bases must be the same everywhere.
            ranks.broadcast_([part for number in numbers for part in turns[number]])
    return turns


def _own_sums(laid: LaidOut, recipe: Recipe) -> Iterator[tuple[Slot, list[Tensor]]]:
    """What this rank's blocks add up to, for each view it has blocks of."""
    for bank in laid.banks:
        if bank.bucket.key.role == MAIN:
            algorithm = adaptive_with(recipe, bank.bucket.key.rank)
            state = bank.rows(bank.bucket.slots).state
            sums = algorithm.sums_for_ranks(state, recipe.stages.averaged_gradient(state))
            for slot in bank.bucket.slots:
                yield slot, [part[slot.start : slot.stop] for part in sums]


def _no_sums(item: PlacedView, recipe: Recipe, device: torch.device) -> list[Tensor]:
    """Zeros in the shapes of a view's sums."""
    shape, dtype = item.view.shape, recipe.numerics.dtype
    state = init_stack(recipe, Key(MAIN, _META, 0, item.rank), shape, _META)
    moment = recipe.stages.averaged_gradient(state)
    sums = adaptive_with(recipe, item.rank).sums_for_ranks(state, moment)
    return [torch.zeros(x.shape, dtype=dtype, device=device) for x in sums]


def adaptive_with(recipe: Recipe, rank: int) -> RankAdaptive:
    """The algorithm with the rank of a view."""
    return cast(RankAdaptive, with_rank(recipe.algorithm, rank))


def _groups(slot: Slot) -> slice:
    """The groups of its view that a slot has blocks of."""
    return slice(None) if slot.extent is None else slice(*slot.extent.groups)


def _chosen(
    turns: Mapping[int, Sequence[Tensor]],
    params: Sequence[Tensor],
    placed: Sequence[PlacedView],
    recipe: Recipe,
) -> ViewRanks:
    sizes, limit = Sizes(recipe), budget_bytes(recipe, params, placed)
    limit -= _STEP_BYTES * len(params)
    limit -= sum(sizes.of(item, 0) for item in placed if item.place.role != MAIN)
    candidates = [
        _candidate(placed[number], of_view, recipe, sizes) for number, of_view in turns.items()
    ]
    steps = [
        near(candidate, placed[number].rank)
        for number, candidate in zip(turns, candidates, strict=True)
    ]
    # Unless a smaller budget than before asks for more.
    in_steps = sum(candidate.num_bytes[0] for candidate in steps) <= limit
    chosen = dict(zip(turns, choose(steps if in_steps else candidates, limit), strict=True))
    found: ViewRanks = [[] for _ in params]
    for number, item in enumerate(placed):
        found[item.param].append(chosen.get(number, 0))
    return found


def _candidate(
    item: PlacedView, of_view: Sequence[Tensor], recipe: Recipe, sizes: Sizes
) -> Candidate:
    algorithm = adaptive_with(recipe, item.rank)
    ranks = rungs(algorithm, item.view.shape)
    curves = [
        fit(spectrum, ranks)
        for of_group in algorithm.spectra(of_view, item.view.shape)
        for spectrum in of_group
    ]
    return Candidate(
        ranks=ranks,
        num_bytes=[sizes.of(item, rank) for rank in ranks],
        values=[item.view.numel * fmean(of_rank) for of_rank in zip(*curves, strict=True)],
    )


def _resize(
    bank: Bank,
    turns: Mapping[int, Sequence[Tensor]],
    rank_of: Sequence[int],
    recipe: Recipe,
    state: MutableMapping[Tensor, dict[str, Any]],
    params: Sequence[Tensor],
) -> None:
    """Puts what a bank has under other ranks into ``state``.

    Args:
        rank_of: the new rank of every view, by its number.
    """
    algorithm, worked_on = adaptive_with(recipe, bank.bucket.key.rank), None
    for slot in bank.bucket.slots:
        if rank_of[slot.number] == bank.bucket.key.rank:
            continue
        worked_on = worked_on or bank.rows(bank.bucket.slots).state
        own = {name: value[slot.start : slot.stop] for name, value in worked_on.items()}
        parts = [part[_groups(slot)] for part in turns[slot.number]]
        for name, value in algorithm.resized(own, parts, rank_of[slot.number]).items():
            if value is not own[name]:
                state[params[slot.param]][state_key(slot, name)] = value


def _log(old: Sequence[int], new: Sequence[int], name: str) -> None:
    changes = Counter(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    logger.info(
        "%s: ranks chosen anew: %s",
        name,
        ", ".join(f"{count} of {a} now {b}" for (a, b), count in sorted(changes.items())),
    )
