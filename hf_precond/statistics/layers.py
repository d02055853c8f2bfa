"""What a layer's input and output gradient are, as samples x positions x features.

The weight-sharing format ``[N, S, F]`` (Eschenhagen et al. 2023): a weight is used at S positions
of each of N samples, the tokens of a sequence or the places of an image, and its gradient is the
sum over all of output gradient times input. One entry per kind of layer; a layer without an entry
(norms, embeddings, depthwise and transposed convolutions, experts, attention by ``F.linear`` on a
module's weights) is left to the fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hf_precond.views.positions import WeightLayout, positions
from hf_precond.views.rules import Assignment, ParamInfo, fallback, is_conv1d

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A subclass of Linear whose forward is never called: attention takes its weight.
_NEVER_CALLED = "NonDynamicallyQuantizableLinear"
# PEFT's LoRA of a bare parameter: of the layers that hold its factors only the weights are taken.
_TAKES_WEIGHTS = "ParamWrapper"


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How one kind of layer is read.

    Attributes:
        inputs: (layer, its input) -> ``[N, S, F_in]``.
        outputs: (layer, gradient of its output) -> ``[N, S, F_out]``.
        transposed: whether the weight is ``[F_in, F_out]``.
    """

    inputs: Callable[[Any, Tensor], Tensor]
    outputs: Callable[[Any, Tensor], Tensor]
    transposed: bool = False


def sequences(layer: nn.Module, x: Tensor) -> Tensor:
    """``[F]``, ``[N, F]`` or ``[N, ..., F]`` as ``[N, S, F]``."""
    if x.ndim < 3:
        return x.reshape(-1, 1, x.shape[-1])
    return x.flatten(1, -2)


def patches(layer: Any, x: Tensor) -> Tensor:
    """The patch ``[C * kernel]`` of an image ``[N, C, ...]`` at each place of the output."""
    dims = len(layer.kernel_size)
    if x.ndim == dims + 1:
        x = x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, _padding(layer), mode=mode)
    settings = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for dim, (size, stride, dilation) in enumerate(settings, start=2):
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    places = range(2, 2 + dims)
    kernel = range(2 + dims, 2 + 2 * dims)
    return x.permute(0, *places, 1, *kernel).flatten(1 + dims).flatten(1, dims)


def places(layer: Any, x: Tensor) -> Tensor:
    """Channels at each place of an image: ``[N, C, ...]`` as ``[N, S, C]``."""
    if x.ndim == len(layer.kernel_size) + 1:
        x = x.unsqueeze(0)
    return x.flatten(2).mT


def _padding(layer: Any) -> list[int]:
    """Padding as F.pad takes it: last dimension first, before and after."""
    pads: list[int] = []
    for index in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[index] * (layer.kernel_size[index] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0, 0] if layer.padding == "valid" else [layer.padding[index]] * 2
    return pads


_LINEAR = LayerKind(sequences, sequences)
_CONV1D = LayerKind(sequences, sequences, transposed=True)
_CONVOLUTION = LayerKind(patches, places)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Returns how a layer is read, or None for a kind that is not known."""
    if _is_a(module, _NEVER_CALLED):
        return None
    if isinstance(module, nn.Linear):
        return _LINEAR
    if is_conv1d(module):
        return _CONV1D
    return _CONVOLUTION if isinstance(module, _CONVOLUTIONS) else None


def _is_a(module: nn.Module, name: str) -> bool:
    """By the name of the class, so that torch is all we need; FSDP2 puts its own class on top."""
    return any(cls.__name__ == name for cls in type(module).__mro__)


def _only_gives_its_weight(info: ParamInfo) -> bool:
    """Whether a layer is one of a dictionary of factors, right below PEFT's wrapper."""
    if len(info.parents) < 2:
        return False
    wrapper, holder = info.parents[-2:]
    return isinstance(holder, nn.ModuleDict) and _is_a(wrapper, _TAKES_WEIGHTS)


def without_layer(info: ParamInfo) -> str:
    """Why no single layer's input is known for a parameter; empty where it is."""
    if info.tied_names:
        return "tied: no single layer's input"
    if _only_gives_its_weight(info):
        return f"{type(info.module).__name__} is never called: its weight is taken"
    if layer_kind(info.module) is None or info.local_name != "weight":
        return f"no layer input known for {type(info.module).__name__}"
    return ""


def with_known_layers(
    assigned: Iterable[tuple[ParamInfo, Assignment]],
) -> list[tuple[ParamInfo, Assignment]]:
    """Leaves what no layer's input is known for to the fallback."""
    return [
        (info, fallback(why) if assignment.views and (why := without_layer(info)) else assignment)
        for info, assignment in assigned
    ]


def layer_layouts(
    assigned: Sequence[tuple[ParamInfo, Assignment]], trained: Iterable[str] | None = None
) -> list[list[Any]]:
    """Returns for each parameter how its layer reads it, as plain lists; empty without a layer.

    A bias is named where it is trained and belongs to this layer alone.

    Args:
        trained: names of all parameters that are trained; default those assigned.

    Raises:
        ValueError: if a view does not keep the layer's outputs and inputs apart.
    """
    if trained is None:
        trained = untied_names(info for info, _ in assigned)
    names = set(trained)
    return [_layout(info, assignment.views, names) for info, assignment in assigned]


def untied_names(infos: Iterable[ParamInfo]) -> set[str]:
    """Names of parameters that belong to one layer alone."""
    return {info.name for info in infos if not info.tied_names}


def _layout(info: ParamInfo, views: Sequence[Any], trained: set[str]) -> list[Any]:
    kind = layer_kind(info.module)
    if not views or kind is None:
        return []
    bias = f"{info.module_name}.bias" if info.module_name else "bias"
    own = getattr(info.module, "bias", None)
    layout = WeightLayout(
        transposed=kind.transposed,
        groups=int(getattr(info.module, "groups", 1)),
        bias=bias if bias in trained and own is not None and own.requires_grad else "",
    )
    for view in views:
        if positions(view, layout, info.param.shape) is None:
            raise ValueError(
                f"parameter {info.name!r}: view {view} mixes outputs and inputs of its layer"
            )
    return layout.to_plain()
