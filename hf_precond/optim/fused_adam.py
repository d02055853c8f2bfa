"""The fallback's Adam in torch's fused kernel: one pass over weight, gradient and moments.

Embeddings are a large part of a small language model, and elementwise work costs what it moves: the
shell's own way (moments, direction, decay, weight, each a pass of its own) moves three times as
much. The kernel computes what :class:`hf_precond.preconditioners.diagonal.Adam` and the shell do,
up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_precond.optim.banks import Bank
from hf_precond.preconditioners.base import FALLBACK
from hf_precond.preconditioners.diagonal import Adam
from hf_precond.views.plan import Slot
from hf_precond.views.view import ParamView

_DEVICES = ("cpu", "cuda")


def can_fuse(bank: Bank, weights: Mapping[int, Tensor], gradients: Mapping[int, Tensor]) -> bool:
    """Whether the kernel can take all slots of a bank whose parameters take part.

    It wants weights, gradients and moments of one dtype, each in one piece of memory, in the same
    order.
    """
    key = bank.bucket.key
    if key.role != FALLBACK or key.device.type not in _DEVICES:
        return False
    dtypes = {tensor.dtype for tensor in bank.tensors.values()}
    for slot in bank.bucket.slots:
        if slot.param not in gradients:
            continue
        weight, gradient = weights[slot.param], gradients[slot.param]
        dtypes |= {weight.dtype, gradient.dtype}
        if not (is_whole(slot, weight) and weight.is_contiguous() and gradient.is_contiguous()):
            return False
    return len(dtypes) == 1


def is_whole(slot: Slot, weight: Tensor) -> bool:
    """Whether a slot is all of its parameter, in the order of its memory."""
    view = slot.view
    return (
        isinstance(view, ParamView)
        and slot.extent is None
        and slot.bias is None
        and view.numel == weight.numel()
        and view.order == tuple(range(len(view.split)))
    )


def step_(
    algorithm: Adam,
    bank: Bank,
    weights: Mapping[int, Tensor],
    gradients: Mapping[int, Tensor],
    steps: Sequence[int],
    rates: Mapping[int, float | Tensor],
    decays: Mapping[int, float],
) -> None:
    """One step of all slots of a bank whose parameters take part, in place.

    Args:
        steps: done so far, per parameter.
        rates: learning rate of each parameter.
        decays: decoupled weight decay of each parameter.
    """
    alike: dict[tuple[int, float | int, float], list[Slot]] = {}
    for slot in bank.bucket.slots:
        index = slot.param
        if index in gradients:
            rate = rates[index]
            # To read a tensor's value would wait for the device.
            alike_by = id(rate) if isinstance(rate, Tensor) else rate
            alike.setdefault((steps[index] + 1, alike_by, decays[index]), []).append(slot)
    for (step, _, decay), slots in alike.items():
        taken = [weights[slot.param] for slot in slots]
        moments = {
            name: [
                tensor[slot.start : slot.stop].view(weight.shape)
                for slot, weight in zip(slots, taken, strict=True)
            ]
            for name, tensor in bank.tensors.items()
        }
        device, rate = taken[0].device, rates[slots[0].param]
        count = torch.full((), float(step), dtype=torch.float32, device=device)
        torch._fused_adamw_(
            taken,
            [gradients[slot.param] for slot in slots],
            moments["exp_avg"],
            moments["exp_avg_sq"],
            [],
            [count] * len(slots),
            lr=rate.to(device) if isinstance(rate, Tensor) else rate,
            beta1=algorithm.beta1,
            beta2=algorithm.beta2,
            weight_decay=decay,
            eps=algorithm.eps,
            amsgrad=False,
            maximize=False,
        )
