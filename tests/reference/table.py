"""Which reference belongs to which optimizer: one row per registered name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_precond import PreconditionedOptimizer
from hf_precond.views.view import ParamView
from tests.reference import (
    adadiag,
    adafacdiag,
    block_adam,
    frequent_directions,
    full_matrix,
    kfac,
    muon,
    ng_plus,
    seng,
    shampoo,
    shared_basis,
    sketchy,
    soap,
    two_sided_basis,
)
from tests.reference.pipeline import AdamReference, MatrixReference, SgdReference
from tests.reference.row import Options, ReferenceRow

_FAMILIES = (
    shared_basis,
    two_sided_basis,
    shampoo,
    sketchy,
    block_adam,
    full_matrix,
    frequent_directions,
    adadiag,
    adafacdiag,
    ng_plus,
    soap,
    muon,
    kfac,
    seng,
)
REFERENCES: dict[str, ReferenceRow] = {
    name: row for family in _FAMILIES for name, row in family.ROWS.items()
}

ParameterReference = MatrixReference | AdamReference | SgdReference


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
        own = options["fallback_beta1"]
        betas = (beta1 if own is None else own, beta2)
        return AdamReference(**common, betas=betas, eps=options["fallback_eps"])
    views = [ParamView.from_plain(view) for view in plain]
    stages = (
        "momentum",
        "momentum_site",
        "nesterov",
        "start_step",
        "graft",
        "graft_beta2",
        "graft_scope",
    )
    return MatrixReference(
        **common,
        beta1=beta1,
        views=views,
        groups=lambda view, group: REFERENCES[name].build(options, views[view].shape[1:]),
        **{stage: options[stage] for stage in stages},
    )
