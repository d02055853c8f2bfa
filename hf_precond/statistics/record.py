"""What one layer has seen since its step began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.statistics import exchange
from hf_precond.statistics.captured import Captured, with_length
from hf_precond.statistics.layers import LayerKind
from hf_precond.statistics.sampling import Reservoir
from hf_precond.views.positions import WeightLayout

# Sums below this many units in the last place of their terms are rounding.
_ROUNDING = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """What of a layer is kept, see :class:`hf_precond.statistics.layer_io.LayerIO`."""

    dtype: torch.dtype
    max_columns: int | None = None
    by_sample: bool = False
    reduce: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the whole model.

    Attributes:
        number: counts calls: uses of a layer in one call belong to the same samples.
        paddings: ``[N, S]`` each, which positions its arguments call padding.
    """

    number: int
    paddings: Sequence[Tensor]


class Record:
    """Takes the uses of a layer in, from its step's first micro-batch to its last.

    Attributes:
        alone: whether the gradient of the weight was left out in a backward pass.
        is_off: whether the weight is a constant just now, see :mod:`.layer_io`.
    """

    def __init__(self, layer: Any, kind: LayerKind, options: RecordOptions) -> None:
        self.layer = layer
        self._kind = kind
        self._options = options
        self._seed: int | None = None
        self.is_off = False
        self.clear()

    @property
    def armed(self) -> bool:
        """Whether the layer is captured in this step."""
        return self._seed is not None

    @property
    def pending(self) -> bool:
        """Whether something has been captured."""
        return self._kept is not None or bool(self._open)

    @property
    def features(self) -> tuple[int, int]:
        """Number of input and output features, as the layer kind counts them."""
        weight = self.layer.weight
        outputs = WeightLayout(transposed=self._kind.transposed).num_outputs(weight.shape)
        return weight.numel() // outputs * getattr(self.layer, "groups", 1), outputs

    def arm(self, seed: int | None) -> None:
        """Begins a step, with the seed of its draw; None captures nothing."""
        self._seed = seed
        self.clear()

    def clear(self) -> None:
        """Drops what was captured."""
        self._kept: Reservoir | None = None
        self._open: list[list[Tensor]] = []
        self._open_call: Call | None = None
        self._total: Tensor | int = 0
        self._units: Tensor | int = 0
        self._reduced = False
        self._spoiled = False
        self.alone = False

    @torch.no_grad()
    def take_in(self, x: Tensor, version: int, call: Call, gradient: Tensor) -> None:
        """Takes one use of the layer in: its input and the gradient of its output.

        An input that was changed in place since (autograd complains only where it needs the input
        itself, not a copy in another dtype) spoils the step for this layer.

        Args:
            version: of ``x`` when the layer saw it.
        """
        if self._seed is None:
            return
        if x._version != version:
            self._spoiled = True
            return
        dtype = self._options.dtype
        inputs = self._kind.inputs(self.layer, x).to(dtype)
        outputs = self._kind.outputs(self.layer, gradient).to(dtype)
        valid = _valid(outputs, call.paddings)
        if valid is None:
            ones = inputs.new_ones(inputs.shape[:2])
        else:
            ones = valid.to(dtype)
            inputs, outputs = inputs * ones.unsqueeze(-1), outputs * ones.unsqueeze(-1)
        if not (self._options.by_sample or self._options.reduce):
            flat = (part.flatten(0, 1).unsqueeze(1) for part in (inputs, outputs, ones))
            self._add([*flat], valid is not None)
            return
        # A second use in the same call gives its samples further positions.
        if self._open and (
            self._open_call is not call or self._open[0][0].shape[0] != inputs.shape[0]
        ):
            self._close()
        self._open.append([inputs, outputs, ones])
        self._open_call = call

    def captured(self) -> Captured | None:
        """Returns what was captured, before the scaling by T; None for nothing.

        Raises:
            RuntimeError: a changed input was all that stood for the weight's gradient.
        """
        self._close()
        if self._spoiled and self.alone:
            raise RuntimeError(
                f"the input of a {type(self.layer).__name__} was changed in place before its "
                "backward pass, and the gradient of its weight was not formed: use "
                "form_gradient = True"
            )
        if self._kept is None or self._spoiled:
            return None
        inputs, outputs, valid = self._kept.rows
        kept = (valid != 0).any(1).sum().clamp(min=1)
        root = (torch.as_tensor(self._units).to(valid) / kept).clamp(min=1).sqrt()
        return Captured(
            inputs=inputs * root,
            outputs=outputs * root,
            valid=valid * root,
            total=self._total,
            seen=self._kept.seen,
            by_sample=self._options.by_sample,
            reduced=self._reduced,
            alone=self.alone,
        )

    def _close(self) -> None:
        """Ends the samples of a call."""
        if not self._open:
            return
        parts = [torch.cat(uses, 1) for uses in zip(*self._open, strict=True)]
        self._open = []
        inputs, outputs, ones = parts
        if self._options.reduce:
            self._reduced |= inputs.shape[1] > 1
            count = ones.sum(1, keepdim=True)
            inputs = inputs.sum(1, keepdim=True) / count.clamp(min=1).unsqueeze(-1)
            outputs = _summed(outputs)
            ones = (count > 0).to(ones.dtype)
        self._add([inputs, outputs, ones], may_be_padded=True)

    def _add(self, rows: list[Tensor], may_be_padded: bool) -> None:
        """Adds samples, or positions as samples of their own, to those kept."""
        assert self._seed is not None
        ones = rows[2]
        valid = (ones != 0).any(1) if may_be_padded else None
        self._total += ones.sum() if may_be_padded else ones.numel()
        self._units += len(ones) if valid is None else valid.sum()
        if self._kept is None:
            self._kept = Reservoir(self._seed)
        length = max([ones.shape[1], *(kept.shape[1] for kept in self._kept.rows)])
        self._kept.pad(length)
        limit = unit_limit(self._options.max_columns, length, self._options.by_sample)
        limit = None if limit is None else max(1, limit // exchange.world_size())
        self._kept.add([with_length(part, length) for part in rows], limit, valid)


def _summed(outputs: Tensor) -> Tensor:
    """Sum over positions, ``[N, 1, F]``; what is left of terms that cancel is zero.

    A bias of attention keys, for one, moves nothing: its gradients add up to rounding, which a
    factor of K-FAC would take for a direction, the more so as its damping is relative.
    """
    total = outputs.sum(1, keepdim=True)
    noise = _ROUNDING * torch.finfo(outputs.dtype).eps * outputs.abs().sum(1, keepdim=True)
    return torch.where(total.abs() > noise, total, 0.0)


def unit_limit(max_columns: int | None, length: int, by_sample: bool) -> int | None:
    """How many samples of a length, or positions, may be kept: at least one."""
    if max_columns is None:
        return None
    return max(1, max_columns // length if by_sample else max_columns)


def _valid(outputs: Tensor, paddings: Sequence[Tensor]) -> Tensor | None:
    """Which positions of a layer count, ``[N, S]``; None where nothing may be padding.

    A position that has a gradient counts whatever the arguments say: a label of -100 also marks
    prompts and tokens that are not masked, which other positions' losses reach.
    """
    fitting = [padding for padding in paddings if padding.shape == outputs.shape[:2]]
    if not fitting:
        return None
    padding = torch.stack(fitting).any(0).to(outputs.device)
    return ~padding | (outputs != 0).any(-1)
