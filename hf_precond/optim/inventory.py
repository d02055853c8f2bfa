"""What an optimizer has or will have of parameters and state, without allocating any."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.optim.banks import Bank
from hf_precond.optim.options import Recipe
from hf_precond.optim.roles import init_stack
from hf_precond.preconditioners.base import FALLBACK, GRAFT, MAIN
from hf_precond.views.plan import Bucket

_META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """How many parameters and state bytes one algorithm has."""

    algorithm: str
    num_tensors: int
    num_params: int
    state_bytes: int


def plan_rows(recipe: Recipe, buckets: Sequence[Bucket]) -> list[PlanRow]:
    """Returns parameters and state bytes per algorithm."""
    names = {
        MAIN: recipe.name,
        GRAFT: f"graft step ({recipe.stages.graft})",
        FALLBACK: recipe.fallback.fallback,
    }
    tensors: dict[str, set[int]] = defaultdict(set)
    params: Counter[str] = Counter()
    state_bytes: Counter[str] = Counter()
    for bucket in buckets:
        name = names[bucket.key.role]
        tensors[name].update(bucket.params)
        params[name] += sum(slot.view.numel for slot in bucket.slots)
        for meta in init_stack(recipe, bucket.key, bucket.shape, _META).values():
            state_bytes[name] += meta.numel() * meta.element_size()
    return [
        PlanRow(
            algorithm=name,
            num_tensors=len(indices),
            num_params=params[name],
            state_bytes=state_bytes[name],
        )
        for name, indices in tensors.items()
    ]


def state_layout(
    recipe: Recipe, num_params: int, buckets: Sequence[Bucket]
) -> Iterator[tuple[int, str, Tensor]]:
    """Yields (parameter index, state key, meta tensor) of all state of a single process."""
    for index in range(num_params):
        yield index, "step", torch.empty((), device="meta")
    for bucket in buckets:
        bank = Bank(bucket, init_stack(recipe, bucket.key, bucket.shape, _META))
        for slot, key, piece in bank.slices():
            yield slot.param, key, piece
