"""What a layer has seen in one batch, before and after scaling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Inputs ``[N, S, F_in]`` and output gradients ``[N, S, F_out]`` of one layer and batch.

    Zero at padded positions. Where positions are units of their own, N counts them and S is one.

    Attributes:
        valid: ``[N, S]``: one, zero at padding; the input that belongs to a bias.
        total: T, positions of the whole batch without padding.
        seen: samples (or positions) of the whole batch, of which N were kept.
        by_sample: whether N counts samples.
        alone: whether the backward pass has not formed the gradient of the weight.
        processes: how many processes captured it.
    """

    inputs: Tensor
    outputs: Tensor
    valid: Tensor
    total: Tensor | int
    seen: int
    by_sample: bool
    alone: bool = False
    processes: int = 1

    @property
    def complete(self) -> bool:
        """Whether every position of the whole batch is there."""
        return self.inputs.shape[0] == self.seen

    def gradient_norm(self) -> Tensor:
        """Norm of the weight's gradient, from Gram matrices where that is less work."""
        inputs, outputs = self.inputs.flatten(0, 1), self.outputs.flatten(0, 1)
        if len(inputs) > max(inputs.shape[1], outputs.shape[1]):
            return torch.linalg.matrix_norm(outputs.mT @ inputs)
        square = ((inputs @ inputs.mT) * (outputs @ outputs.mT)).sum()
        return square.clamp(min=0).sqrt()

    def scaled(self, loss_scale: float | Tensor) -> Captured:
        """Returns inputs / sqrt(T) and output gradients * sqrt(T), both * sqrt(N / n) if sampled.

        Their product is the gradient then, or an unbiased estimate of it.

        Args:
            loss_scale: what the loss was multiplied with before the backward pass.
        """
        total = torch.as_tensor(self.total).to(self.valid).clamp(min=1)
        if self.by_sample:
            share = self.valid.new_tensor(self.seen / self.inputs.shape[0])
        else:
            share = (total / self.inputs.shape[0]).clamp(min=1)
        to_inputs = (share / total).sqrt()
        to_outputs = (share * total).sqrt() / loss_scale / self.processes
        return replace(
            self,
            inputs=self.inputs * to_inputs,
            outputs=self.outputs * to_outputs,
            valid=self.valid * to_inputs,
        )


def with_length(x: Tensor, length: int) -> Tensor:
    """Pads dimension 1 with zeros."""
    missing = length - x.shape[1]
    if missing == 0:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
