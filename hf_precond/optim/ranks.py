"""How several ranks that train the same weights share the work: the parts that carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_precond.optim.comm import Comm
from hf_precond.optim.global_state import GlobalState
from hf_precond.optim.options import Recipe
from hf_precond.optim.roles import init_stack
from hf_precond.optim.sharding import Sharding, comm_of, home_of
from hf_precond.optim.together import Together
from hf_precond.optim.work import plan_work
from hf_precond.views.plan import PlannedView


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What talks to other ranks; nothing of it where there is but one.

    Attributes:
        comm: the ranks that train the same weights.
        together: updates statistics in step with them.
        sharding: moves gradients and directions, where ranks do not all do everything.
        global_state: the state of all ranks, where each has a part.
    """

    comm: Comm | None = None
    together: Together | None = None
    sharding: Sharding | None = None
    global_state: GlobalState | None = None


def share_work(
    params: Sequence[Tensor],
    names: Sequence[str],
    pieces: Sequence[PlannedView],
    recipe: Recipe,
    process_group: Any = None,
) -> Ranks:
    """Plans what this rank works on, where there are several.

    Raises:
        RuntimeError: if the ranks have other parameters or options than each other.
    """
    comm = comm_of(params, process_group)
    if comm is None:
        return Ranks()
    shapes = [tuple(param.shape) for param in params]
    alike = (list(names), shapes, recipe.hyperparameters(), recipe.name)
    if any(other != alike for other in comm.gather_objects(alike)):
        raise RuntimeError(
            f"{recipe.name}: the ranks have other parameters or options than each other; "
            "models that are trained apart need process_group= of their own"
        )
    options = recipe.sharding
    homes = [home_of(param, comm) for param in params]
    work = plan_work(
        *(pieces, params, homes, recipe.algorithm), mode=options.sharding, size=comm.size
    )
    dtype = recipe.numerics.dtype
    together = Together(
        comm,
        recipe.algorithm,
        num_params=len(params),
        work=work if work.is_shared else None,
        dtype=dtype,
        device=params[0].device if params else torch.device("cpu"),
    )
    if not work.is_shared and all(home.whole for home in homes):
        return Ranks(comm=comm, together=together)
    exchange_dtype = getattr(torch, options.exchange_dtype) if options.exchange_dtype else dtype
    sharding = Sharding(params, work, comm, dtype=dtype, exchange_dtype=exchange_dtype)
    global_state = GlobalState(params, pieces, sharding, partial(init_stack, recipe))
    return Ranks(comm=comm, together=together, sharding=sharding, global_state=global_state)
