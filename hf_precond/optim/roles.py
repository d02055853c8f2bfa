"""What a role stands for: which algorithm works on its stacks, and the state it has for them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch

from hf_precond.optim.options import Recipe
from hf_precond.optim.stages import NO_STAGES, StageOptions
from hf_precond.preconditioners.base import GRAFT, MAIN, Preconditioner, Shape, State, exact_state
from hf_precond.preconditioners.diagonal import Identity
from hf_precond.views.plan import Key

# A start step for what is left to the graft partner.
_NEVER = 2**62


def algorithm_of(recipe: Recipe, key: Key) -> tuple[Preconditioner, StageOptions]:
    """Returns the algorithm of a stack and the stages around it."""
    if key.role == MAIN:
        return with_rank(recipe.algorithm, key.rank), recipe.stages
    stages = recipe.stages
    if key.role == GRAFT:
        # Without a partner what is left is the gradient, or its momentum.
        never = stages if stages.graft == "none" else replace(stages, start_step=_NEVER)
        return Identity(), never
    return recipe.fallback_algorithm, NO_STAGES


def with_rank(algorithm: Preconditioner, rank: int) -> Preconditioner:
    """Returns an algorithm with another rank than that of its options; the same for 0."""
    return _with_rank(cast(Any, algorithm), rank) if rank else algorithm


@lru_cache
def _with_rank(algorithm: Any, rank: int) -> Preconditioner:
    return cast(Preconditioner, replace(algorithm, rank=rank))


def init_stack(recipe: Recipe, key: Key, shape: Shape, device: torch.device) -> State:
    """Allocates the state of a stack: the algorithm's and its stages'."""
    algorithm, stages = algorithm_of(recipe, key)
    dtype, stored = recipe.numerics.dtype, recipe.numerics.storage_dtype
    state = {
        **algorithm.init(shape, dtype=dtype, device=device),
        **stages.init(shape, dtype=dtype, device=device),
    }
    exact = exact_state(algorithm)
    return {name: x if name in exact else x.to(stored) for name, x in state.items()}
