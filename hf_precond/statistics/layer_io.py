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

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.statistics import exchange
from hf_precond.statistics.captured import Captured
from hf_precond.statistics.layers import layer_kind
from hf_precond.statistics.record import Call, Record, RecordOptions, unit_limit

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
        options = RecordOptions(
            dtype=dtype, max_columns=max_columns, by_sample=by_sample, reduce=reduce
        )
        self._records: dict[str, Record] = {}
        for name, layer in layers.items():
            kind = layer_kind(layer)
            if kind is None:
                raise ValueError(f"no layer input is known for {name!r}: {type(layer).__name__}")
            self._records[name] = Record(layer, kind, options)
        self._seed, self._options = seed, options
        self._step = 0
        self._call = Call(0, ())
        self._handles: list[Any] = []
        root = model.register_forward_pre_hook(_RootHook(self), with_kwargs=True)
        self._handles.append(root)
        for record in self._records.values():
            hook = _LayerHook(self, record)
            self._handles.append(record.layer.register_forward_hook(hook, with_kwargs=True))
            if not form_gradient:
                off, on = _WeightOff(record), _WeightOn(record)
                self._handles += [
                    record.layer.register_forward_pre_hook(off, with_kwargs=True),
                    record.layer.register_forward_hook(on, always_call=True),
                ]

    def arm(self, steps: Mapping[str, int]) -> None:
        """Says which layers are captured from now on, and for which step each (it seeds the draw).

        What was captured before is dropped.
        """
        for name, record in self._records.items():
            step = steps.get(name)
            record.arm(None if step is None else self._seed_of(step))
        self._step = max(steps.values(), default=0)

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Takes note of the arguments that the model is called with.

        Where no gradient has been accumulated yet, whatever was captured belongs to a step that
        never came (an overflow under loss scaling) and is dropped.
        """
        if any(record.pending for record in self._records.values()) and self._no_gradient():
            self.clear()
        self._call = Call(self._call.number + 1, tuple(_paddings(arguments)))

    def remember(self, record: Record, x: Tensor, output: Tensor) -> None:
        """Puts a hook on a layer's output that takes its gradient in."""
        output.register_hook(partial(record.take_in, x.detach(), x._version, self._call))

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
                by_sample=self._options.by_sample,
                dtype=self._options.dtype,
                device=next(iter(armed.values())).layer.weight.device,
            )
        return {name: self._bounded(item).scaled(loss_scale) for name, item in found.items()}

    def clear(self) -> None:
        """Drops what was captured."""
        for record in self._records.values():
            record.clear()

    def remove(self) -> None:
        """Takes all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _seed_of(self, step: int) -> int:
        return self._seed + 1_000_003 * step

    def _bounded(self, item: Captured) -> Captured:
        """Not more than ``max_columns``, though every process has kept at least one sample."""
        options = self._options
        limit = unit_limit(options.max_columns, item.inputs.shape[1], options.by_sample)
        return item.trimmed(limit, self._seed_of(self._step))

    def _no_gradient(self) -> bool:
        """Whether all gradients have been reset. (One host sync, on steps that capture.)"""
        model = self._model()
        params = model.parameters() if model is not None else ()
        return all(param.grad is None or not bool(param.grad.any()) for param in params)


class _LayerHook:
    """A forward hook that dies with its capture; copies of the model carry an inert one."""

    def __init__(self, io: LayerIO, record: Record) -> None:
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

    def __init__(self, record: Record) -> None:
        self._record = weakref.ref(record)

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record = self._record()
        if record is None or not record.armed or not torch.is_grad_enabled():
            return
        x = args[0] if args else next(iter(kwargs.values()))
        # Without a gradient of its input the output would have none to capture.
        if layer.training and x.requires_grad and layer.weight.requires_grad:
            layer.weight.requires_grad_(False)
            record.alone = record.is_off = True

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()


class _WeightOn:
    """Undoes :class:`_WeightOff` after the layer has run, also where it failed."""

    def __init__(self, record: Record) -> None:
        self._record = weakref.ref(record)

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Any) -> None:
        record = self._record()
        if record is not None and record.is_off:
            layer.weight.requires_grad_(True)
            record.is_off = False

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()


class _RootHook:
    """A pre-hook of the whole model, see :meth:`LayerIO.begin`."""

    def __init__(self, io: LayerIO) -> None:
        self._io = weakref.ref(io)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        io = self._io()
        if io is not None and model.training and torch.is_grad_enabled():
            names = inspect.signature(model.forward).parameters
            io.begin({**dict(zip(names, args, strict=False)), **kwargs})

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
