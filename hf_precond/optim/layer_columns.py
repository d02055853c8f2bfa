"""From what layers have seen to the columns of each slot."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_precond.optim.layout import group_names
from hf_precond.preconditioners.base import Columns, LayerNeeds
from hf_precond.statistics.captured import Captured
from hf_precond.statistics.layer_io import LayerIO
from hf_precond.statistics.layers import layer_layouts, untied_names, with_known_layers
from hf_precond.views.joint import Joint
from hf_precond.views.plan import Slot
from hf_precond.views.positions import WeightLayout, positions
from hf_precond.views.rules import (
    GENERAL_RULES,
    Assignment,
    ParamInfo,
    assign,
    canonical_name,
    iter_params,
)
from hf_precond.views.view import ParamView, rows


class ColumnSource(Protocol):
    """Where the columns of a step come from."""

    def arm(self, steps: Mapping[int, int]) -> None:
        """Says for which parameters columns are wanted next, and for which step of theirs."""
        ...

    def collect(self, loss_scale: float | Tensor) -> None:
        """Ends the capture of a step. Called on every process in every step that wants columns."""
        ...

    def columns(self, slot: Slot, gradients: Mapping[int, Tensor]) -> Columns | None:
        """Returns the columns of a slot, None where its layer was not used."""
        ...

    def clear(self) -> None:
        """Drops what was captured."""
        ...


class LayerColumns:
    """The columns that hooks on a model capture.

    Args:
        param_groups: with names and layer layouts, see :func:`take_layers`.

    Attributes:
        clip: what the clipping of the gradient asks of those that were not formed.
    """

    def __init__(
        self,
        model: nn.Module,
        param_groups: Sequence[Mapping[str, Any]],
        needs: LayerNeeds,
        dtype: torch.dtype,
    ) -> None:
        self._names = [name for group in param_groups for name in group_names(group)]
        self._layouts = [layout for group in param_groups for layout in group["layers"]]
        self._shapes = [param.shape for group in param_groups for param in group["params"]]
        modules = {info.name: info.module for info in iter_params(model)}
        self._io = LayerIO(
            model,
            {
                name: modules[name]
                for name, layout in zip(self._names, self._layouts, strict=True)
                if layout
            },
            dtype=dtype,
            max_columns=needs.max_columns,
            by_sample=needs.by_sample,
            reduce=needs.reduce,
            form_gradient=needs.form_gradient,
            seed=needs.seed,
        )
        self.clip: float | Tensor = 1.0
        self._captured: dict[str, Captured] = {}
        self._dropped: dict[str, Captured] = {}
        self._places: dict[Slot, tuple[Tensor | None, Tensor | None]] = {}

    def arm(self, steps: Mapping[int, int]) -> None:
        """See :class:`ColumnSource`."""
        self._captured = self._dropped = {}
        # Parameters that came after the hooks are not among them.
        known = dict(enumerate(self._names))
        self._io.arm({known[index]: step for index, step in steps.items() if index in known})

    def collect(self, loss_scale: float | Tensor) -> None:
        """See :class:`ColumnSource`. Columns that are not finite count as not captured."""
        found = self._io.take(loss_scale)
        finite = [item.is_finite() for item in found.values()]
        good = torch.stack(finite).tolist() if finite else []
        named = list(zip(found, good, strict=True))
        self._captured = {name: found[name] for name, fine in named if fine}
        self._dropped = {name: found[name] for name, fine in named if not fine}

    def clear(self) -> None:
        """See :class:`ColumnSource`."""
        self._io.clear()

    def alone(self) -> dict[int, Tensor]:
        """Returns the norms of gradients that were not formed, by the parameter's index."""
        seen = {**self._captured, **self._dropped}
        return {
            index: seen[name].gradient_norm()
            for index, name in enumerate(self._names)
            if name in seen and seen[name].alone
        }

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self._io.remove()

    def columns(self, slot: Slot, gradients: Mapping[int, Tensor]) -> Columns | None:
        """See :class:`ColumnSource`."""
        name = self._names[slot.param] if slot.param < len(self._names) else ""
        captured = self._captured.get(name)
        if captured is None:
            return None
        outputs, inputs = self._place(slot, captured)
        columns = _picked(captured.inputs, inputs)
        if isinstance(slot.view, Joint):
            ones = captured.valid.unsqueeze(-1).expand(len(columns), -1, -1, 1)
            columns = torch.cat([columns, ones], -1)
        return Columns(
            inputs=columns,
            outputs=_picked(captured.outputs, outputs),
            complete=captured.complete,
            alone=captured.alone,
            clip=self.clip,
        )

    def _place(self, slot: Slot, captured: Captured) -> tuple[Tensor | None, Tensor | None]:
        """Where a slot's rows and columns lie in its layer; None for all in their order."""
        if slot not in self._places:
            view = slot.view.base if isinstance(slot.view, Joint) else slot.view
            layout = WeightLayout.from_plain(self._layouts[slot.param])
            found = positions(view, layout, self._shapes[slot.param])
            assert found is not None, "checked where the layouts were made"
            self._places[slot] = (
                _unless_all(found.outputs, captured.outputs),
                _unless_all(found.inputs, captured.inputs),
            )
        return self._places[slot]


def take_layers(param_groups: Sequence[MutableMapping[str, Any]], model: nn.Module) -> None:
    """Writes names and layer layouts into groups that came without, from the model.

    A parameter whose layer is of no known kind loses its views and follows the fallback; views that
    came from the shape alone give way to those of the layer's kind.

    Raises:
        ValueError: for a parameter that is none of the model's.
    """
    names = {id(param): canonical_name(name) for name, param in model.named_parameters()}
    infos = {id(info.param): info for info in iter_params(model)}
    trained = untied_names(infos.values())
    for group in param_groups:
        strange = [param.shape for param in group["params"] if id(param) not in names]
        if strange:
            raise ValueError(
                f"{len(strange)} parameters of the optimizer are no parameters of the model, the "
                f"first of shape {tuple(strange[0])}"
            )
        if "param_names" not in group:
            group["param_names"] = [names[id(param)] for param in group["params"]]
        for index, param in enumerate(group["params"]):
            info = infos.get(id(param))
            if info is None:  # frozen
                group["views"][index] = []
            elif group["views"][index] and not group["layers"][index]:
                found = with_known_layers([(info, _assignment(info, group["views"][index]))])
                group["views"][index] = [view.to_plain() for view in found[0][1].views]
                (group["layers"][index],) = layer_layouts(found, trained)


def _assignment(info: ParamInfo, plain: Sequence[Any]) -> Assignment:
    views = tuple(map(ParamView.from_plain, plain))
    if views == (rows(info.param.shape),):
        return assign(info, GENERAL_RULES)
    return Assignment(views=views, reason="given")


def _picked(x_NSF: Tensor, index_GK: Tensor | None) -> Tensor:
    """Features of each group: ``[G, N, S, K]``."""
    return x_NSF.unsqueeze(0) if index_GK is None else x_NSF[..., index_GK].movedim(2, 0)


def _unless_all(index_GK: Tensor, x_NSF: Tensor) -> Tensor | None:
    """The index on the device of ``x``, None for one group with all features as they come."""
    if torch.equal(index_GK, torch.arange(x_NSF.shape[-1]).unsqueeze(0)):
        return None
    return index_GK.to(x_NSF.device)
