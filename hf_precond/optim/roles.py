"""What a role stands for: which algorithm works on its stacks, and the state it has for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_precond.optim.options import Recipe
from hf_precond.optim.stages import NO_STAGES, StageOptions
from hf_precond.preconditioners.base import GRAFT, MAIN, Preconditioner, Shape, State, exact_state
from hf_precond.preconditioners.diagonal import Identity

# A start step for what is left to the graft partner.
_NEVER = 2**62


def algorithm_of(recipe: Recipe, role: str) -> tuple[Preconditioner, StageOptions]:
    """Returns the algorithm of a role and the stages around it."""
    if role == MAIN:
        return recipe.algorithm, recipe.stages
    stages = recipe.stages
    if role == GRAFT:
        # Without a partner what is left is the gradient, or its momentum.
        never = stages if stages.graft == "none" else replace(stages, start_step=_NEVER)
        return Identity(), never
    return recipe.fallback_algorithm, NO_STAGES


def init_stack(recipe: Recipe, role: str, shape: Shape, device: torch.device) -> State:
    """Allocates the state of a stack: the algorithm's and its stages'."""
    algorithm, stages = algorithm_of(recipe, role)
    dtype, stored = recipe.numerics.dtype, recipe.numerics.storage_dtype
    state = {
        **algorithm.init(shape, dtype=dtype, device=device),
        **stages.init(shape, dtype=dtype, device=device),
    }
    exact = exact_state(algorithm)
    return {name: x if name in exact else x.to(stored) for name, x in state.items()}
