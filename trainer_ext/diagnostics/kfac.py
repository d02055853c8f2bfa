"""How far K-FAC variants are from K-FAC that is always up to date, on the user's own model.

The metrics of Puiu, Brand New K-FACs (2022), section 4.2, of a few layers over a few steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hf_precond.linalg.precision import highest_matmul_precision
from hf_precond.preconditioners.base import StepContext
from trainer_ext.diagnostics.collect import evenly
from trainer_ext.kfac_observers import METRICS, REFERENCE, ObservedLayer, Observer, observed_layers

Curves = dict[str, dict[str, dict[str, list[float]]]]
"""Layer -> variant -> metric -> values, one a step."""


def variants_for(steps: int) -> tuple[str, ...]:
    """K-FAC with inverses that are a quarter of the steps old, and randomized and Brand's forms."""
    interval = max(2, steps // 4)
    return (
        f"kfac:inverse_interval={interval}",
        f"rs_kfac:inverse_interval={interval}",
        f"sre_kfac:inverse_interval={interval}",
        f"b_kfac:brand_interval=1,inverse_interval={interval}",
    )


class KFacErrors:
    """Variants that look on at a few layers of a model in training.

    Args:
        layers: names; those that K-FAC does not take are left out.
        most: so many of them are looked at, evenly from all.
        largest_side: layers with more inputs or outputs are left out, too.
        steps: how many there will be.

    Attributes:
        curves: what was found.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], *, most: int, largest_side: int, steps: int
    ) -> None:
        observer = Observer.of(variants_for(steps), max_columns=1024)
        device = next(model.parameters()).device
        observed, self._columns, self._params = observed_layers(
            model, observer, layers=["all"], device=device
        )
        fitting = [
            layer
            for layer in observed
            if layer.name.partition("[")[0] in layers and max(layer.shape) <= largest_side
        ]
        self._layers = [fitting[index] for index in evenly(len(fitting), most).tolist()]
        self._step = 0
        self.curves: Curves = {
            layer.name: {
                label: {metric: [] for metric in METRICS}
                for label in layer.watchers
                if label != REFERENCE
            }
            for layer in self._layers
        }

    def arm(self) -> None:
        """The step that comes is looked at."""
        self._columns.arm({layer.slot.param: self._step + 1 for layer in self._layers})

    @torch.no_grad()
    def take(self) -> None:
        """Shows a step to all variants, and notes their errors."""
        self._step += 1
        self._columns.collect(1.0)
        with highest_matmul_precision():
            for layer in self._layers:
                self._observe(layer)

    def remove(self) -> None:
        """Takes all hooks off the model."""
        self._columns.remove()

    def _observe(self, layer: ObservedLayer) -> None:
        found = ((index, self._params[index].grad) for index in layer.slot.params)
        gradients = {index: grad for index, grad in found if grad is not None}
        if not gradients or not _finite(gradients.values()):
            return
        g_GMB = layer.slot.to_blocks(gradients).float()
        ctx = StepContext(
            step=self._step,
            phases=[0.0] * len(g_GMB),
            columns=self._columns.columns(layer.slot, gradients),
        )
        measured = layer.measure(g_GMB, ctx, inverses=True, directions=True)
        for label, curves in self.curves[layer.name].items():
            for metric, values in curves.items():
                values.append(measured[label][metric])


def _finite(gradients: Iterable[Tensor]) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in gradients)
