"""Parameters and state as steps work on them: laid out once, from what is there by then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_precond.optim.banks import Bank
from hf_precond.optim.layout import PlacedView, owner_counts, phases_by_piece, pieces_of
from hf_precond.optim.options import Recipe
from hf_precond.optim.ranks import Ranks
from hf_precond.optim.roles import init_stack
from hf_precond.optim.weights import Weights
from hf_precond.preconditioners.base import MAIN
from hf_precond.views.plan import Bucket, PlannedView, clusters, plan_buckets

ShareWork = Callable[[Sequence[Tensor], Sequence[PlannedView]], Ranks]
"""(parameters, all their views) -> how ranks share the work on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidOut:
    """All parameters and what this rank has of their state; by default nothing of it.

    Attributes:
        params: all parameters, in the order of the param groups.
        names: of all parameters.
        group_of: number of the param group of each.
        steps: done so far, per parameter; the optimizer counts on.
        owners: number of parameters, views and groups, by the names of the graft scopes.
        main: parameters that the algorithm works on, on this or another rank.
        joint: weights with the biases that are trained together with them.
        weights: hands out this rank's parts of the parameters.
        ranks: what talks to other ranks.
        banks: the state.
        clusters: banks that share parameters, or that must be worked on together.
        is_complete: whether there is state for all of it.
    """

    params: Sequence[Tensor] = ()
    names: Sequence[str] = ()
    group_of: Sequence[int] = ()
    steps: list[int] = field(default_factory=list)
    owners: Mapping[str, int] = field(default_factory=dict)
    main: frozenset[int] = frozenset()
    joint: frozenset[tuple[int, int]] = frozenset()
    weights: Weights = field(default_factory=Weights)
    ranks: Ranks = field(default_factory=Ranks)
    banks: Sequence[Bank] = ()
    clusters: Sequence[Sequence[Bank]] = ()
    is_complete: bool = False

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return self.params[0].device if self.params else torch.device("cpu")

    def forgotten(self) -> LaidOut:
        """Returns what stays known when the state is to be laid out anew."""
        return LaidOut(params=self.params, steps=self.steps)


def lay_out(
    param_groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    state: MutableMapping[Tensor, dict[str, Any]],
    placed: Sequence[PlacedView],
    recipe: Recipe,
    share_work: ShareWork,
) -> LaidOut:
    """Allocates the state of all parameters, taking over what there is after a load or a copy.

    Args:
        names: of all parameters.
        state: of the optimizer; gets slices of the state instead of what it has.
        placed: all views of all parameters.
    """
    params = [param for group in param_groups for param in group["params"]]
    saved: list[dict[str, Any]] = [state.get(param, {}) for param in params]
    max_elements = recipe.numerics.stack_limit(params)
    pieces = pieces_of(placed, params, max_elements=max_elements)
    buckets = plan_buckets(pieces, max_elements=max_elements)
    phases = phases_by_piece(buckets)
    ranks = share_work(params, pieces)
    if ranks.sharding is not None and ranks.global_state is not None:
        own = [share.view for share in ranks.sharding.shares]
        buckets = plan_buckets(own, max_elements=max_elements)
        saved = ranks.global_state.localized(saved)
    banks = [_bank(bucket, phases, saved, recipe) for bucket in buckets]
    return LaidOut(
        params=params,
        names=names,
        group_of=[number for number, group in enumerate(param_groups) for _ in group["params"]],
        steps=_publish(banks, params, saved, state),
        owners=owner_counts(placed, params),
        main=frozenset(item.param for item in placed if item.place.role == MAIN),
        joint=frozenset((item.param, item.bias) for item in placed if item.bias is not None),
        weights=Weights(params, stochastic_rounding=recipe.numerics.stochastic_rounding),
        ranks=ranks,
        banks=banks,
        clusters=_clusters(banks, recipe, ranks),
        is_complete=True,
    )


def _bank(
    bucket: Bucket,
    phases: Mapping[int, Sequence[float]],
    saved: Sequence[Mapping[str, Tensor]],
    recipe: Recipe,
) -> Bank:
    """State of a bucket, with what was saved of it."""
    state = init_stack(recipe, bucket.key, bucket.shape, bucket.key.device)
    turns = [phase for slot in bucket.slots for phase in slot.part_of(phases[slot.piece])]
    bank = Bank(bucket, state, turns, dtype=recipe.numerics.dtype)
    bank.adopt(saved)
    return bank


def _publish(
    banks: Sequence[Bank],
    params: Sequence[Tensor],
    saved: Sequence[Mapping[str, Any]],
    state: MutableMapping[Tensor, dict[str, Any]],
) -> list[int]:
    """Shows the banks as state of their parameters. Returns the steps done, per parameter."""
    steps = []
    for param, old in zip(params, saved, strict=True):
        step = torch.as_tensor(old.get("step", 0.0), dtype=torch.float32).cpu().clone()
        # A bf16 counter would stop at 256: the counter is float32 whatever the weights are.
        state[param] = {"step": step}
        steps.append(int(step))
    for bank in banks:
        for slot, key, piece in bank.slices():
            state[params[slot.param]][key] = piece
    return steps


def _clusters(banks: Sequence[Bank], recipe: Recipe, ranks: Ranks) -> list[Sequence[Bank]]:
    """Which banks are worked on together."""
    if recipe.stages.clip_mode == "kl" or ranks.sharding is not None:
        # One factor for all layers; or ranks that must ask each other the same, all at once.
        return [banks]
    by_bucket = {id(bank.bucket): bank for bank in banks}
    return [
        [by_bucket[id(bucket)] for bucket in members]
        for members in clusters([bank.bucket for bank in banks])
    ]
