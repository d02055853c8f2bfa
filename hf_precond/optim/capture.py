"""When layers are captured, and what happens where they are not or under a loss scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.optim.faults import Faults
from hf_precond.optim.layer_columns import ColumnSource, LayerColumns, take_layers
from hf_precond.optim.options import Recipe
from hf_precond.preconditioners.base import Columns, captures_at, layer_needs
from hf_precond.views.plan import Slot

ColumnsOf = Callable[[Slot, Mapping[int, Tensor]], "Columns | None"]


class LayerInputError(RuntimeError, ArithmeticError):
    """An algorithm that needs the inputs of its layers does not get them."""


class Capture:
    """Stands between an optimizer and where the columns of its layers come from.

    Attributes:
        source: hooks on a model, or another source; None before one is attached.
        grad_scaler: the loss scaler in use, if it is known.
        is_stale: whether parameters came after the hooks.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.source: ColumnSource | None = None
        self.grad_scaler: torch.amp.GradScaler | None = None
        self.is_stale = False
        self._recipe = recipe
        self._algorithm = recipe.algorithm
        self._needs = layer_needs(recipe.algorithm)

    @property
    def is_needed(self) -> bool:
        """Whether the algorithm asks for columns at all."""
        return self._needs is not None

    @property
    def awaits_loss_scale(self) -> bool:
        """Whether columns are captured that may be scaled by nobody knows what."""
        return self.source is not None and self.grad_scaler is None

    def attach(self, model: nn.Module, param_groups: Sequence[MutableMapping[str, Any]]) -> None:
        """Puts hooks on a model. Param groups that came without layers get them.

        Raises:
            ValueError: for a parameter that is none of the model's.
        """
        assert self._needs is not None
        take_layers(param_groups, model)
        self.detach()
        dtype = self._recipe.numerics.dtype
        self.source = LayerColumns(model, param_groups, self._needs, dtype)
        self.is_stale = False

    def detach(self) -> None:
        """Takes the hooks off the model."""
        if isinstance(self.source, LayerColumns):
            self.source.remove()
        self.source = None

    def clear(self) -> None:
        """Drops what was captured."""
        if self.source is not None:
            self.source.clear()

    def arm(self, steps: Iterable[int]) -> None:
        """Says for which parameters the next step wants columns.

        Args:
            steps: done so far, per parameter.
        """
        if self.source is not None:
            coming = enumerate(step + 1 for step in steps)
            self.source.arm({i: step for i, step in coming if captures_at(self._algorithm, step)})

    def collect(
        self, params: Iterable[int], steps: Sequence[int], loss_scale: float | Tensor
    ) -> None:
        """Ends the capture of a step.

        Args:
            params: those that the algorithm works on, on this or another rank.

        Raises:
            LayerInputError: if columns are wanted and there is no source.
        """
        wanted = self._needs is not None and any(
            captures_at(self._algorithm, steps[param] + 1) for param in params
        )
        if not wanted:
            return
        if isinstance(self.source, LayerColumns) and self.is_stale:
            raise LayerInputError(
                "a param group came after the model's layers were hooked: call "
                "optimizer.attach(model) again"
            )
        if self.source is None:
            raise LayerInputError(
                f"{self._recipe.name} needs the inputs of the model's layers: build it with "
                "create_optimizer(model, ...), or call optimizer.attach(model)"
            )
        self.source.collect(loss_scale)

    def alone(self) -> dict[int, Tensor]:
        """Returns the norms of gradients that only columns stand for, by parameter."""
        return self.source.alone() if isinstance(self.source, LayerColumns) else {}

    def clip(self, factor: Tensor) -> None:
        """Takes note of the factor by which gradients are clipped."""
        if isinstance(self.source, LayerColumns):
            self.source.clip = factor

    def columns_of(self, steps: Sequence[int], faults: Faults) -> ColumnsOf | None:
        """Returns the function that finds a slot's columns; None where none are wanted.

        It counts a layer that had a gradient but no columns.
        """
        source, algorithm = self.source, self._algorithm
        if source is None:
            return None

        def columns_of(slot: Slot, gradients: Mapping[int, Tensor]) -> Columns | None:
            if not captures_at(algorithm, steps[slot.param] + 1):
                return None
            columns = source.columns(slot, gradients)
            if columns is None:
                what = "its layer had a gradient, but its input was not captured"
                faults.count([slot.param], "missing_columns", what, LayerInputError)
            else:
                faults.clear([slot.param], "missing_columns")
            return columns

        return columns_of

    def loss_scale(
        self, optimizer: torch.optim.Optimizer, grads: Sequence[Tensor]
    ) -> float | Tensor | None:
        """What the captured columns were scaled with; None after an overflow: no step then.

        Where the scaler is not known, a GradScaler hands its scale over instead of unscaling the
        gradients (torch's protocol for optimizers that do it themselves): that is done here.

        Raises:
            LayerInputError: the gradients were unscaled before, and the scale is not known.
        """
        if self.source is None:
            return 1.0
        if self.grad_scaler is not None:
            return float(self.grad_scaler.get_scale())
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            return 1.0
        if bool(found_inf):
            self.clear()
            return None
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        if scale is None:
            raise LayerInputError(
                "the gradients were unscaled before the step, what the layers have seen was not: "
                "set optimizer.grad_scaler = scaler once"
            )
        torch._foreach_div_(list(grads), scale)
        return scale
