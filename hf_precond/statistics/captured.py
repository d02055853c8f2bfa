"""What a layer has seen in one batch, before and after scaling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Inputs ``[N, S, F_in]`` and output gradients ``[N, S, F_out]`` of one layer and batch.

    Zero at padded positions. Where positions are units of their own, N counts them and S is one.
    Where only some of the units were kept, all are scaled by sqrt(all / kept).

    Attributes:
        valid: ``[N, S]``: one, zero at padding; the input that belongs to a bias.
        total: T, positions of the whole batch without padding.
        seen: samples (or positions) of the whole batch, of which N were kept.
        by_sample: whether N counts samples.
        reduced: whether several positions of a sample have become one.
        alone: whether the backward pass has not formed the gradient of the weight.
        processes: how many processes captured it.
    """

    inputs: Tensor
    outputs: Tensor
    valid: Tensor
    total: Tensor | int
    seen: int
    by_sample: bool
    reduced: bool = False
    alone: bool = False
    processes: int = 1

    @property
    def complete(self) -> bool:
        """Whether every position of the whole batch is there."""
        return self.inputs.shape[0] == self.seen and not self.reduced

    def is_finite(self) -> Tensor:
        """Whether all numbers are finite; a tensor, so that nobody waits for it."""
        norms = torch.linalg.vector_norm(self.inputs) + torch.linalg.vector_norm(self.outputs)
        return torch.isfinite(norms)

    def gradient_norm(self) -> Tensor:
        """Norm of the weight's gradient, from Gram matrices where that is less work."""
        inputs, outputs = self.inputs.flatten(0, 1), self.outputs.flatten(0, 1)
        if len(inputs) > max(inputs.shape[1], outputs.shape[1]):
            return torch.linalg.matrix_norm(outputs.mT @ inputs)
        square = ((inputs @ inputs.mT) * (outputs @ outputs.mT)).sum()
        return square.clamp(min=0).sqrt()

    def scaled(self, loss_scale: float | Tensor) -> Captured:
        """Returns inputs / sqrt(T) and output gradients * sqrt(T).

        Their product is the gradient then, or an unbiased estimate of it.

        Args:
            loss_scale: what the loss was multiplied with before the backward pass.
        """
        total = torch.as_tensor(self.total).to(self.valid).clamp(min=1)
        to_inputs = 1 / total.sqrt()
        to_outputs = total.sqrt() / loss_scale / self.processes
        return replace(
            self,
            inputs=self.inputs * to_inputs,
            outputs=self.outputs * to_outputs,
            valid=self.valid * to_inputs,
        )

    def trimmed(self, limit: int | None, seed: int) -> Captured:
        """Keeps at most ``limit`` samples (or positions), scaled to stand for all of these."""
        count = self.inputs.shape[0]
        if limit is None or count <= limit:
            return self
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(count, generator=generator)[:limit].sort().values
        drawn, root = drawn.to(self.valid.device), (count / limit) ** 0.5
        return replace(
            self,
            inputs=self.inputs[drawn] * root,
            outputs=self.outputs[drawn] * root,
            valid=self.valid[drawn] * root,
        )


def with_length(x: Tensor, length: int) -> Tensor:
    """Pads dimension 1 with zeros."""
    missing = length - x.shape[1]
    if missing == 0:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
