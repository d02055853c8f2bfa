"""Which gradients take part in a step: those that are there, finite, and clipped together."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from hf_precond.linalg.norms import norms
from hf_precond.optim.capture import Capture, LayerInputError
from hf_precond.optim.faults import Faults
from hf_precond.optim.laid_out import LaidOut
from hf_precond.optim.options import Recipe
from hf_precond.optim.sharding import local


def ready_gradients(
    laid: LaidOut, recipe: Recipe, capture: Capture, faults: Faults
) -> dict[int, Tensor]:
    """Gradients of the parameters that take part, clipped in place where that was asked for.

    Args:
        faults: counts those that are left out.

    Raises:
        ValueError: for a sparse gradient.
        FloatingPointError: if a parameter's gradient was not finite too often in a row.
    """
    gradients = _present(laid)
    uneven: set[int] = set()
    alone = capture.alone()
    if laid.ranks.sharding is None:
        lengths = gradient_norms(gradients, alone, recipe, laid.device)
    else:
        lengths, uneven = laid.ranks.sharding.norms(gradients)
    for index in alone:
        param = laid.params[index]
        gradients[index] = param.new_zeros(()).expand(param.shape)
    if uneven:
        gradients = {i: grad for i, grad in gradients.items() if i not in uneven}
        what = "has a gradient on some ranks only, step left out"
        faults.count(sorted(uneven), "skipped_nonfinite", what, FloatingPointError)
    if recipe.numerics.skip_nonfinite and gradients:
        _drop_nonfinite(gradients, lengths, recipe.numerics.dtype, faults)
        faults.clear(gradients, "skipped_nonfinite")
    _drop_parted(gradients, laid, faults)
    clip_gradients(gradients, lengths, alone, recipe, capture)
    return gradients


def gradient_norms(
    gradients: Mapping[int, Tensor],
    alone: Mapping[int, Tensor],
    recipe: Recipe,
    device: torch.device,
) -> dict[int, Tensor]:
    """Norm of each gradient in the state dtype, by index; nothing where nobody asks for it.

    Args:
        alone: norms of gradients that only columns stand for.
    """
    if not (recipe.numerics.skip_nonfinite or recipe.stages.max_grad_norm is not None):
        return {}
    found = dict(zip(gradients, norms(list(gradients.values())), strict=True)) | dict(alone)
    return {index: norm.to(device, recipe.numerics.dtype) for index, norm in found.items()}


def clip_gradients(
    gradients: Mapping[int, Tensor],
    lengths: Mapping[int, Tensor],
    alone: Mapping[int, Tensor],
    recipe: Recipe,
    capture: Capture,
) -> None:
    """Scales the gradients that take part to ``max_grad_norm`` at most, in place."""
    limit = recipe.stages.max_grad_norm
    if limit is None or not gradients:
        return
    total = torch.linalg.vector_norm(torch.stack([lengths[index] for index in gradients]))
    # The small number is torch's.
    factor = (limit / (total + 1e-6)).clamp(max=1)
    formed = [local(grad) for index, grad in gradients.items() if index not in alone]
    torch._foreach_mul_(formed, factor)
    capture.clip(factor)


def _present(laid: LaidOut) -> dict[int, Tensor]:
    """Gradients that are there, by index.

    Raises:
        ValueError: for a sparse gradient.
    """
    gradients = {
        index: param.grad for index, param in enumerate(laid.params) if param.grad is not None
    }
    for index, grad in gradients.items():
        if grad.is_sparse:
            raise ValueError(
                f"{laid.names[index]!r} has a sparse gradient: use nn.Embedding without sparse=True"
            )
    return gradients


def _drop_nonfinite(
    gradients: dict[int, Tensor], lengths: Mapping[int, Tensor], dtype: torch.dtype, faults: Faults
) -> None:
    """Leaves out gradients that are not finite, at the cost of one host sync."""
    found = torch.stack([lengths[index] for index in gradients])
    good = found <= _largest_norm(dtype)  # not a NaN
    if bool(good.all()):
        return
    flags = zip(list(gradients), good.tolist(), strict=True)
    for index in [index for index, fits in flags if not fits]:
        del gradients[index]
        what = "too large to be squared" if isfinite(float(lengths[index])) else "not finite"
        what = f"gradient is {what}, step left out"
        faults.count([index], "skipped_nonfinite", what, FloatingPointError)


def _largest_norm(dtype: torch.dtype) -> float:
    """Squares of gradients are summed over steps: a margin of 2^20 for that."""
    return float(torch.finfo(dtype).max ** 0.5 / 2**10)


def _drop_parted(gradients: dict[int, Tensor], laid: LaidOut, faults: Faults) -> None:
    """Leaves out weights without their bias and the other way round: together or not at all."""
    for weight, bias in laid.joint:
        if (weight in gradients) != (bias in gradients):
            gradients.pop(weight, None)
            gradients.pop(bias, None)
            if laid.params[weight].grad is None or laid.params[bias].grad is None:
                what = "of the layer's weight and bias one has no gradient, step left out"
                faults.count([weight], "missing_columns", what, LayerInputError)
