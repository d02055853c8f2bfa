"""Mixture-of-experts weights ``[E, ., .]``: experts are groups, gate and up are pieces.

transformers marks a module of stacked experts with flags that its own batched kernels obey:
``is_transposed`` (``[E, I, O]`` instead of ``[E, O, I]``) and ``is_concatenated`` (gate before up,
else they alternate). ``UNMARKED`` holds classes without flags.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_precond.views.rules import Assignment, ParamInfo
from hf_precond.views.view import ParamView, alternating_experts, experts
from trainer_ext.layers.walk import class_names


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """How a module stores its experts; ``concatenated`` is ``None`` where nobody says it."""

    transposed: bool
    concatenated: bool | None


UNMARKED: dict[str, ExpertLayout] = {
    "Llama4TextExperts": ExpertLayout(transposed=True, concatenated=True),
}

_GATED = ("gate", "up")


def expert_layout(module: nn.Module) -> ExpertLayout | None:
    """Returns how ``module`` stores experts, or ``None`` if it is no module of stacked experts."""
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool) and hasattr(module, "num_experts"):
        concatenated = getattr(module, "is_concatenated", None)
        return ExpertLayout(transposed=transposed, concatenated=concatenated)
    return next((UNMARKED[name] for name in class_names(module) if name in UNMARKED), None)


def expert_rule(info: ParamInfo) -> Assignment | None:
    """Weights of stacked experts; their biases, ``[E, O]``, are left to the general rules."""
    layout = expert_layout(info.module)
    if layout is None or info.param.ndim != 3:
        return None
    fused = info.local_name == "gate_up_proj" and layout.concatenated is not None
    views = _gated(info.param.shape, layout) if fused else _single(info.param.shape, layout)
    label = "fused gate, up" if fused else info.local_name
    return Assignment(views=views, reason=f"{label}, {info.param.shape[0]} experts")


def _single(shape: tuple[int, ...], layout: ExpertLayout) -> tuple[ParamView, ...]:
    return experts(shape, transposed=layout.transposed)


def _gated(shape: tuple[int, ...], layout: ExpertLayout) -> tuple[ParamView, ...]:
    if not layout.concatenated:
        return alternating_experts(shape, names=_GATED, transposed=layout.transposed)
    half = shape[2 if layout.transposed else 1] // 2
    pieces = [(name, half) for name in _GATED]
    return experts(shape, transposed=layout.transposed, pieces=pieces)
