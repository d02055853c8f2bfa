"""Weights with one row per vocabulary entry, by the model's own getters, and low-rank adapters."""

from __future__ import annotations

from torch import nn

from hf_precond.views.rules import Assignment, ParamInfo, canonical_name, fallback
from hf_precond.views.view import rows
from trainer_ext.layers.walk import matrices

_LORA_LABELS = {
    "lora_A": "LoRA A",
    "lora_B": "LoRA B",
    "lora_embedding_B": "LoRA B of an embedding",
}
_NO_MATRICES = {
    "lora_embedding_A": "LoRA A of an embedding",
    "lora_E": "singular values of AdaLoRA",
    "ia3_l": "scales of IA3",
    "trainable_tokens_delta": "rows of an embedding",
}


def vocabulary_assignments(model: nn.Module) -> dict[str, Assignment]:
    """Returns the fallback for what the model calls its output and input embeddings, by name.

    An input embedding may be a projection of patches or frames (ViT, Whisper); such linear layers
    and convolutions stay matrices.
    """
    names = {module: name for name, module in model.named_modules()}
    return {
        canonical_name(f"{names[head]}.{local}"): fallback(reason)
        for getter, reason in (
            ("get_input_embeddings", "input embedding"),
            ("get_output_embeddings", "output embedding"),
        )
        for head in _answers(model, getter)
        if head in names
        for local, owner in matrices(head)
        if reason == "output embedding" or not isinstance(owner, nn.Linear)
    }


def _answers(model: nn.Module, getter: str) -> list[nn.Module]:
    """What every module that has ``getter`` returns; some backbones refuse to answer."""
    found = []
    for module in model.modules():
        try:
            answer = getattr(module, getter, lambda: None)()
        except NotImplementedError:
            continue
        if isinstance(answer, nn.Module):
            found.append(answer)
    return found


def adapter_rule(info: ParamInfo) -> Assignment | None:
    """The factors of a LoRA update are matrices; what scales, or is looked up by token, is none.

    PEFT keeps vectors of scales as columns ``[O, 1]``.
    """
    parts = info.name.split(".")
    why = next((_NO_MATRICES[part] for part in parts if part in _NO_MATRICES), None)
    if why is not None:
        return fallback(why)
    label = next((_LORA_LABELS[part] for part in parts if part in _LORA_LABELS), None)
    if label is None or info.param.ndim != 2:
        return None
    return Assignment(views=(rows(info.param.shape),), reason=label)
