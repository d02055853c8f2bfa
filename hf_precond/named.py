"""Optimizers as classes: ``SharedBasisAdagrad(model.named_parameters(), lr=1e-3, rank=32)``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.registry import resolve


class NamedOptimizer(PreconditionedOptimizer):
    """Base of the classes that stand for one registry name.

    Args:
        params: parameters, ``(name, parameter)`` pairs or param groups. Views follow from shapes:
            give a module to :func:`hf_precond.create_optimizer` to have embeddings left to the
            fallback.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        **options: the options of the optimizer, see :func:`hf_precond.option_specs`.

    Raises:
        ValueError: for an unknown option or a value that is not allowed.
    """

    registry_name: ClassVar[str]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        recipe = resolve(self.registry_name, options)
        super().__init__(params, recipe, lr=lr, weight_decay=weight_decay)


class SharedBasisAdagrad(NamedOptimizer):
    """Shared-basis block low-rank Adagrad (Yen et al. 2023, Algorithm 1)."""

    registry_name = "shared_basis_adagrad"


class SharedBasisAdam(NamedOptimizer):
    """Shared-basis block low-rank Adam (Yen et al. 2023, appendix 6.9)."""

    registry_name = "shared_basis_adam"
