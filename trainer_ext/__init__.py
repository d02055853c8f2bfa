"""Preconditioned optimizers for ``transformers.Trainer``: ``--optim shared_basis_adagrad``.

Importing the package registers every optimizer of :mod:`hf_precond` with transformers.
"""

from __future__ import annotations

from trainer_ext.build import OptimizerFactory, build_optimizer, explain_groups
from trainer_ext.layers import view_rules
from trainer_ext.optim_names import register, unregister
from trainer_ext.trainer import PrecondTrainer, PrecondTrainingArguments

__all__ = [
    "OptimizerFactory",
    "PrecondTrainer",
    "PrecondTrainingArguments",
    "build_optimizer",
    "explain_groups",
    "register",
    "unregister",
    "view_rules",
]

register()
