"""What a layer did in one batch, as the references of the layer methods take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The columns that stand for a gradient are a_j = c_j e_j with c_j = 1 + SPREAD * j / B. At 0 the
# input factor would be a multiple of the identity, and which of its equal eigenvalues a truncated
# form keeps would be left to rounding.
SPREAD = 1.0


@dataclass(frozen=True, kw_only=True)
class ReferenceColumns:
    """N samples of S positions of one group, scaled: the sum of g a^T is the weight gradient.

    Attributes:
        inputs: a / sqrt(T) [N, S, B], T the number of valid positions; zero rows where padded.
        outputs: g sqrt(T) [N, S, M].
        complete: whether they are all columns of this step's gradient.
    """

    inputs: Tensor
    outputs: Tensor
    complete: bool = True

    @property
    def count(self) -> int:
        """The number of positions of all samples; 0 for a step without columns."""
        return self.inputs.shape[0] * self.inputs.shape[1]

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """A [B, n] and G [M, n], positions of all samples side by side."""
        n = self.count
        return (
            self.inputs.reshape(n, self.inputs.shape[-1]).T,
            self.outputs.reshape(n, self.outputs.shape[-1]).T,
        )

    def sample_gradients(self) -> list[Tensor]:
        """G_i [M, B]: N times the share of sample i in the gradient, so that they average to it."""
        n = len(self.inputs)
        return [n * g.T @ a for a, g in zip(self.inputs, self.outputs, strict=True)]

    def positions_as_samples(self) -> ReferenceColumns:
        """All positions that are not padded, as samples of one position each."""
        inputs, outputs = (x.T.unsqueeze(1) for x in self.flat)
        seen = inputs.flatten(1).any(1) | outputs.flatten(1).any(1)
        inputs, outputs = inputs[seen], outputs[seen]
        return ReferenceColumns(inputs=inputs, outputs=outputs, complete=self.complete)


def gradient_columns(grads: Tensor, spread: float | None = None) -> ReferenceColumns:
    """Columns that have this gradient [M, B]: B samples of one position, T = B.

    a_j = c_j e_j and g_j = column j of the gradient over c_j; see ``SPREAD``.
    """
    size = grads.shape[1]
    places = torch.arange(size, dtype=grads.dtype) / size
    scales = 1.0 + (SPREAD if spread is None else spread) * places
    return ReferenceColumns(
        inputs=(torch.diag(scales) / size**0.5).unsqueeze(1),
        outputs=(grads.T / scales[:, None] * size**0.5).unsqueeze(1),
    )
