"""Which names of the registry are ours in the installed transformers release.

A later release may bring an optimizer of its own under one of our names (Muon, SOAP and Shampoo are
others' inventions). The name is then transformers': a script that says ``--optim muon`` must not
change its meaning because this package is imported. Ours stays within reach as
``OptimizerFactory(name)`` and ``create_optimizer``.
"""

from __future__ import annotations

from transformers.training_args import OptimizerNames

from hf_precond.registry import list_optimizers
from trainer_ext.log import get_logger

logger = get_logger(__name__)

# Set on the members that registration adds, so that a reload of this module does not count them.
MARK = "_added_by_trainer_ext"
STOCK_NAMES = frozenset(
    member.value for member in OptimizerNames if not getattr(member, MARK, False)
)


def served_names() -> tuple[str, ...]:
    """Returns the registered names that transformers has not taken."""
    return tuple(name for name in list_optimizers() if name not in STOCK_NAMES)


def warn_of_taken_names() -> None:
    """Logs which names mean transformers' own optimizer, and how to have ours."""
    taken = [name for name in list_optimizers() if name in STOCK_NAMES]
    if taken:
        logger.warning(
            "transformers has optimizers of its own called %s: --optim means those. Ours: "
            "Trainer(optimizer_cls_and_kwargs=(OptimizerFactory(%r), {'lr': ...}))",
            ", ".join(taken),
            taken[0],
        )
