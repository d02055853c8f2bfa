"""Which reference belongs to which optimizer: one row per registered name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from hf_precond import PreconditionedOptimizer
from hf_precond.linalg.subspace import random_basis
from hf_precond.views.view import ParamView
from tests.reference.pipeline import AdamReference, GroupReference, MatrixReference, SgdReference
from tests.reference.shared_basis import SharedBasisReference

Options = Mapping[str, Any]
ParameterReference = MatrixReference | AdamReference | SgdReference


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """A dense algorithm and the option sets worth comparing.

    Attributes:
        build: (all options, block size) -> the reference of one group.
        paper: options under which it is compared unless a test says otherwise: the paper's, which
            are well conditioned where the registered defaults need not be.
        option_sets: label -> options of the algorithm itself; those of the stages around it are
            tested for every row.
    """

    build: Callable[[Options, int], GroupReference]
    paper: Options = field(default_factory=dict)
    option_sets: Mapping[str, Options] = field(default_factory=dict)


def references(optimizer: PreconditionedOptimizer) -> list[ParameterReference]:
    """Returns a reference for every parameter, in group order, at the parameter's present value."""
    options = optimizer.recipe.hyperparameters()
    return [
        _reference(optimizer.algorithm_name, options, group, param, plain)
        for group in optimizer.param_groups
        for param, plain in zip(group["params"], group["views"], strict=True)
    ]


def _reference(
    name: str, options: Options, group: dict[str, Any], param: Tensor, plain: list[Any]
) -> ParameterReference:
    common = {
        "weight": param.detach().clone(),
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
    }
    beta1, beta2 = options["betas"]
    if not plain:
        if options["fallback"] == "sgd":
            return SgdReference(**common, momentum=options["fallback_momentum"])
        return AdamReference(**common, betas=(beta1, beta2), eps=options["fallback_eps"])
    views = [ParamView.from_plain(view) for view in plain]
    stages = (
        "momentum",
        "momentum_site",
        "start_step",
        "graft",
        "graft_beta2",
        "graft_scope",
    )
    return MatrixReference(
        **common,
        beta1=beta1,
        views=views,
        groups=lambda view, group: REFERENCES[name].build(options, views[view].shape[2]),
        **{stage: options[stage] for stage in stages},
    )


def _shared_basis(options: Options, size: int, *, ema: bool) -> SharedBasisReference:
    cap = isqrt(int(options["max_rank_ratio"] * size))  # m k^2 <= ratio * m b
    rank = max(1, min(options["rank"], size, cap))
    width = min(rank + options["oversample"], size)

    def draw_start(step: int) -> Tensor:
        seed = options["seed"] + 1_000_003 * step
        return random_basis(size, width, seed=seed, dtype=torch.float64, device=torch.device("cpu"))

    same = (
        "num_iters",
        "warm_start",
        "deflate",
        "escaped_norm",
        "tail",
        "update_interval",
        "coef_interval",
        "root_interval",
        "eps",
    )
    return SharedBasisReference(
        rank=rank,
        draw_start=draw_start,
        beta2=options["betas"][1] if ema else None,
        **{key: options[key] for key in same},
    )


_SHARED_BASIS_PAPER: Options = {
    "escaped_norm": "block",
    "deflate": True,
    "tail": "isotropic",
    "root_interval": None,
    "eps": 1e-8,
    "graft": "rmsprop_normalized",
    "momentum_site": "direction",
    "start_step": 1,
}
_SHARED_BASIS_SETS: dict[str, Options] = {
    "paper": {},
    "registered_defaults": {
        "escaped_norm": "mean",
        "deflate": False,
        "tail": "diagonal",
        "root_interval": 10,
        "graft": "adam",
        "momentum_site": "gradient",
        "start_step": 11,
    },
    "three_iterations": {"num_iters": 3},
    "oversampled": {"oversample": 2},
    "cold_start": {"warm_start": False},
    "no_deflation": {"deflate": False},
    "exact_norm": {"escaped_norm": "exact"},
    "mean_outside": {"escaped_norm": "mean", "deflate": False},
    "diagonal_tail": {"tail": "diagonal"},
    "diagonal_tail_intervals": {
        "tail": "diagonal",
        "escaped_norm": "mean",
        "deflate": False,
        "update_interval": 4,
        "coef_interval": 1,
        "root_interval": 2,
    },
    "mean_outside_intervals": {"escaped_norm": "mean", "update_interval": 3, "coef_interval": 1},
    "packed": {"packed": True},
    "rank_one": {"rank": 1},
    "full_rank": {"rank": 64, "max_rank_ratio": 64.0},
    "capped_rank": {"rank": 64, "max_rank_ratio": 0.5},
    "large_eps": {"eps": 0.1},
    "another_seed": {"seed": 5},
    "every_third": {"update_interval": 3},
    "coefficients_every_step": {"update_interval": 4, "coef_interval": 1},
    "coefficients_every_second": {"update_interval": 6, "coef_interval": 2, "deflate": False},
    "late_roots": {"root_interval": 4},
    "late_roots_packed": {"root_interval": 3, "update_interval": 2, "packed": True},
    "all_intervals": {"update_interval": 5, "coef_interval": 2, "root_interval": 3},
}

REFERENCES: dict[str, ReferenceRow] = {
    "shared_basis_adagrad": ReferenceRow(
        build=lambda options, size: _shared_basis(options, size, ema=False),
        paper=_SHARED_BASIS_PAPER,
        option_sets=_SHARED_BASIS_SETS,
    ),
    "shared_basis_adam": ReferenceRow(
        build=lambda options, size: _shared_basis(options, size, ema=True),
        paper=_SHARED_BASIS_PAPER,
        option_sets=_SHARED_BASIS_SETS,
    ),
}
