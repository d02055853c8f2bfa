"""View rules for the architectures of transformers, read from the live model.

``view_rules`` looks at module classes, configs and head counts, not at parameter names alone: a
table (:mod:`trainer_ext.layers.table`) says what each weight of an attention or gated layer is, its
role (:mod:`trainer_ext.layers.roles`) gives the views, and whatever no row describes follows the
general rules for plain torch modules. It sees through DDP, ``torch.compile``, activation
checkpointing and PEFT.
"""

from __future__ import annotations

from torch import nn

from hf_precond.views.rules import GENERAL_RULES, Assignment, ParamInfo, Rule, embedding_rule
from trainer_ext.layers.experts import expert_rule
from trainer_ext.layers.kernels import kernel_assignments
from trainer_ext.layers.roles import Grouping
from trainer_ext.layers.vocabulary import adapter_rule, vocabulary_assignments

__all__ = ["ATTENTION_GROUPINGS", "view_rules"]

ATTENTION_GROUPINGS = ("head", "kernel")


def view_rules(
    model: nn.Module, *, attention_grouping: str = "head", min_head_dim: int = 1
) -> tuple[Rule, ...]:
    """Returns the view rules of ``model``: those of its architecture, then the general ones.

    Args:
        model: any module, possibly wrapped; the rules hold for this model only.
        attention_grouping: ``"head"`` for one group per head, q, k, v kernels as ``(H, d, I)`` and
            output kernels as ``(H, O, d)``; ``"kernel"`` for one group per kernel. Fused kernels
            are split into their pieces in both cases.
        min_head_dim: output kernels with smaller heads stay whole.

    Raises:
        ValueError: if an argument is out of range.
    """
    if attention_grouping not in ATTENTION_GROUPINGS:
        choices = ", ".join(map(repr, ATTENTION_GROUPINGS))
        raise ValueError(f"attention_grouping must be one of {choices}, got {attention_grouping!r}")
    if min_head_dim < 1:
        raise ValueError(f"min_head_dim must be at least 1, got {min_head_dim!r}")
    grouping = Grouping(per_head=attention_grouping == "head", min_head_dim=min_head_dim)
    known = kernel_assignments(model, grouping) | vocabulary_assignments(model)

    def architecture_rule(info: ParamInfo) -> Assignment | None:
        """What the model's architecture says about this very parameter."""
        return known.get(info.name)

    return (embedding_rule, architecture_rule, expert_rule, adapter_rule, *GENERAL_RULES)
