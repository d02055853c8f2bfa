"""Capturing what layers see: their inputs, and the gradients of their outputs.

A forward hook remembers a layer's input and puts a hook on its output's gradient; that one fires
once per backward pass in every mode (micro-batches, both kinds of activation checkpointing, DDP,
FSDP2), however often the forward is repeated. Nothing is captured on steps that need nothing, in
evaluation, or without gradients.

Positions that are padding (``attention_mask`` is 0, or ``labels`` are -100, and the gradient there
is zero) are left out: they are no part of the loss, and their inputs would be noise in the
statistics.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.statistics import exchange
from hf_precond.statistics.captured import Captured, with_length
from hf_precond.statistics.layers import LayerKind, layer_kind
from hf_precond.statistics.sampling import Reservoir
from hf_precond.views.positions import WeightLayout
from hf_precond.views.rules import canonical_name

_MASKS = ("attention_mask", "decoder_attention_mask")
_IGNORED_LABEL = -100


class LayerIO:
    """Captures the layers of a model from now on, until :meth:`remove`.

    Args:
        model: whose call says which positions are padding.
        layers: canonical name of a weight -> the layer that owns it.
        dtype: of the statistics.
        max_columns: positions kept per layer and batch; None keeps all.
        by_sample: keep whole samples.
        reduce: one column per sample, not per position.
        form_gradient: whether the backward pass forms the weights' gradients, too. Without, a
            weight counts as constant while its layer runs, wherever the layer's input has a
            gradient that takes one's place.
        seed: of the draw.

    Raises:
        ValueError: for a layer of a kind that is not known, or several processes without gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        dtype: torch.dtype,
        max_columns: int | None = None,
        by_sample: bool = False,
        reduce: bool = False,
        form_gradient: bool = True,
        seed: int = 0,
    ) -> None:
        if not form_gradient and exchange.world_size() > 1:
            raise ValueError(
                "form_gradient = False is not allowed with several processes: they average "
                "gradients, which are not there"
            )
        self._model = weakref.ref(model)
        self._records: dict[str, _Record] = {}
        for name, layer in layers.items():
            kind = layer_kind(layer)
            if kind is None:
                raise ValueError(f"no layer input is known for {name!r}: {type(layer).__name__}")
            self._records[name] = _Record(layer, kind, dtype, max_columns, by_sample, reduce)
        self._seed, self._dtype, self._by_sample = seed, dtype, by_sample
        self._masks: list[Tensor] = []
        self._handles = [model.register_forward_pre_hook(_RootHook(self), with_kwargs=True)]
        for record in self._records.values():
            hook = _LayerHook(self, record)
            self._handles.append(record.layer.register_forward_hook(hook, with_kwargs=True))
            if not form_gradient:
                self._handles += _stop_weight_gradients(self, record)

    def arm(self, steps: Mapping[str, int]) -> None:
        """Says which layers are captured from now on, and for which step each (it seeds the draw).

        What was captured before is dropped.
        """
        for name, record in self._records.items():
            step = steps.get(name)
            record.arm(None if step is None else self._seed + 1_000_003 * step)

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Takes note of the arguments that the model is called with.

        Where no gradient has been accumulated yet, whatever was captured belongs to a step that
        never came (an overflow under loss scaling) and is dropped.
        """
        model = self._model()
        if any(record.pending for record in self._records.values()) and all(
            param.grad is None for param in (model.parameters() if model is not None else ())
        ):
            self.clear()
        self._masks = list(_paddings(arguments))

    def remember(self, record: _Record, x: Tensor, output: Tensor) -> None:
        """Puts a hook on a layer's output that takes its gradient in."""
        output.register_hook(partial(record.take_in, x.detach(), self._masks))

    def take(self, loss_scale: float | Tensor = 1.0) -> dict[str, Captured]:
        """Returns what was captured since :meth:`arm`, over all processes, by the weight's name.

        Args:
            loss_scale: what the loss was multiplied with before the backward pass.
        """
        armed = {name: record for name, record in self._records.items() if record.armed}
        local = {name: record.captured() for name, record in armed.items()}
        found = {name: item for name, item in local.items() if item is not None}
        if armed and exchange.world_size() > 1:
            found = exchange.gathered(
                local,
                {name: record.features for name, record in armed.items()},
                by_sample=self._by_sample,
                dtype=self._dtype,
                device=next(iter(armed.values())).layer.weight.device,
            )
        return {name: item.scaled(loss_scale) for name, item in found.items()}

    def clear(self) -> None:
        """Drops what was captured."""
        for record in self._records.values():
            record.clear()

    def remove(self) -> None:
        """Takes all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Record:
    """What one layer has seen since its step began."""

    def __init__(
        self,
        layer: nn.Module,
        kind: LayerKind,
        dtype: torch.dtype,
        max_columns: int | None,
        by_sample: bool,
        reduce: bool,
    ) -> None:
        self.layer: Any = layer
        self._kind = kind
        self._dtype = dtype
        self._max_columns = max_columns
        self._by_sample = by_sample
        self._reduce = reduce
        self._seed: int | None = None
        self._kept: Reservoir | None = None
        self._total: Tensor | int = 0
        self.alone = False

    @property
    def armed(self) -> bool:
        """Whether the layer is captured in this step."""
        return self._seed is not None

    @property
    def pending(self) -> bool:
        """Whether something has been captured."""
        return self._kept is not None

    def arm(self, seed: int | None) -> None:
        """Begins a step, with the seed of its draw; None captures nothing."""
        self._seed = seed
        self.clear()

    def clear(self) -> None:
        """Drops what was captured."""
        self._kept = None
        self._total = 0
        self.alone = False

    @torch.no_grad()
    def take_in(self, x: Tensor, masks: Sequence[Tensor], gradient: Tensor) -> None:
        """Takes one use of the layer in: its input and the gradient of its output."""
        if self._seed is None:
            return
        inputs = self._kind.inputs(self.layer, x).to(self._dtype)
        outputs = self._kind.outputs(self.layer, gradient).to(self._dtype)
        valid = _valid(outputs, masks)
        ones = inputs.new_ones(inputs.shape[:2])
        if valid is not None:
            ones = valid.to(self._dtype)
            inputs, outputs = inputs * ones.unsqueeze(-1), outputs * ones.unsqueeze(-1)
        if self._reduce:
            count = ones.sum(1, keepdim=True)
            inputs = (inputs.sum(1) / count.clamp(min=1)).unsqueeze(1)
            outputs = outputs.sum(1, keepdim=True)
            ones = (count > 0).to(self._dtype)
            valid = None if valid is None else count > 0
        self._total += ones.numel() if valid is None else ones.sum()
        if self._kept is None:
            self._kept = Reservoir(self._unit_limit(inputs.shape[1]), self._seed)
        if not self._by_sample:
            inputs, outputs, ones = (x.flatten(0, 1).unsqueeze(1) for x in (inputs, outputs, ones))
            valid = None if valid is None else valid.flatten()
        else:
            inputs, outputs, ones = self._same_length([inputs, outputs, ones])
            valid = None if valid is None else valid.any(1)
        self._kept.add([inputs, outputs, ones], valid)

    @property
    def features(self) -> tuple[int, int]:
        """Number of input and output features, as the layer kind counts them."""
        weight = self.layer.weight
        layout = WeightLayout(transposed=self._kind.transposed)
        outputs = layout.num_outputs(weight.shape)
        return weight.numel() // outputs * getattr(self.layer, "groups", 1), outputs

    def captured(self) -> Captured | None:
        """Returns what was captured, not scaled yet."""
        if self._kept is None:
            return None
        inputs, outputs, valid = self._kept.rows
        return Captured(
            inputs=inputs,
            outputs=outputs,
            valid=valid,
            total=self._total,
            seen=self._kept.seen,
            by_sample=self._by_sample,
            alone=self.alone,
        )

    def _unit_limit(self, positions: int) -> int | None:
        """Samples or positions that may be kept, here and on all other processes together."""
        if self._max_columns is None:
            return None
        limit = self._max_columns // positions if self._by_sample else self._max_columns
        return max(1, limit // exchange.world_size())

    def _same_length(self, rows: list[Tensor]) -> list[Tensor]:
        """Pads new or kept samples with zeros where micro-batches have another length."""
        assert self._kept is not None
        if not self._kept.rows:
            return rows
        length = max(rows[0].shape[1], self._kept.rows[0].shape[1])
        self._kept.pad(length)
        return [with_length(tensor, length) for tensor in rows]


class _LayerHook:
    """A forward hook that dies with its capture; copies of the model carry an inert one."""

    def __init__(self, io: LayerIO, record: _Record) -> None:
        self._io = weakref.ref(io)
        self._record = weakref.ref(record)

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        record = self._record()
        if record is None or not record.armed or not torch.is_grad_enabled():
            return
        io = self._io()
        if io is None or not layer.training or not isinstance(output, Tensor):
            return
        if output.requires_grad:
            io.remember(record, args[0] if args else next(iter(kwargs.values())), output)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()


class _WeightOff:
    """A pre-hook that makes a layer's weight a constant, so that its gradient is not formed."""

    def __init__(self, io: LayerIO, record: _Record) -> None:
        self._io = weakref.ref(io)
        self._record = weakref.ref(record)

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record = self._record()
        if record is None or not record.armed or not torch.is_grad_enabled():
            return
        x = args[0] if args else next(iter(kwargs.values()))
        # Without a gradient of its input the output would have none to capture.
        if layer.training and x.requires_grad and layer.weight.requires_grad:
            layer.weight.requires_grad_(False)
            record.alone = True

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()


def _weight_on(layer: Any, args: tuple[Any, ...], output: Any) -> None:
    """Undoes :class:`_WeightOff` after the layer has run, also where it failed."""
    layer.weight.requires_grad_(True)


def _stop_weight_gradients(io: LayerIO, record: _Record) -> list[Any]:
    off = record.layer.register_forward_pre_hook(_WeightOff(io, record), with_kwargs=True)
    return [off, record.layer.register_forward_hook(_weight_on, always_call=True)]


class _RootHook:
    """A pre-hook of the whole model, see :meth:`LayerIO.begin`."""

    def __init__(self, io: LayerIO) -> None:
        self._io = weakref.ref(io)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        io = self._io()
        if io is not None and model.training and torch.is_grad_enabled():
            io.begin(kwargs)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()


def _inert_hook() -> Callable[..., None]:
    """What copies and pickles of a model have in place of a hook."""
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    """A hook of a copy."""


def _paddings(arguments: Mapping[str, Any]) -> Iterator[Tensor]:
    """Which positions ``[N, S]`` the arguments of a model call padding."""
    for name in _MASKS:
        mask = arguments.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            yield mask == 0
    labels = arguments.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        yield labels == _IGNORED_LABEL


def _valid(outputs: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
    """Which positions of a layer count, ``[N, S]``; None where nothing may be padding.

    A position that has a gradient counts whatever the mask says: a label of -100 also marks prompts
    and tokens that are not masked, which other positions' losses reach.
    """
    fitting = [mask for mask in masks if mask.shape == outputs.shape[:2]]
    if not fitting:
        return None
    padding = torch.stack(fitting).any(0).to(outputs.device)
    return ~padding | (outputs != 0).any(-1)


def layers_by_weight(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers of a model by the canonical names of their weights."""
    found = {}
    for name, module in model.named_modules():
        prefix = canonical_name(name)
        found[f"{prefix}.weight" if prefix else "weight"] = module
    return found
