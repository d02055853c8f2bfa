"""K-FAC variants that look on while a model trains, each with a state of its own.

They get the columns of one layer and its gradient, and say how far their inverses and steps are
from those of a reference (Puiu, Brand New K-FACs, 2022, section 4.2).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond import option_specs, resolve
from hf_precond.optim.layer_columns import LayerColumns
from hf_precond.optim.layout import buckets_of, placed_views
from hf_precond.preconditioners.base import MAIN, Columns, State, StepContext
from hf_precond.preconditioners.brand_kfac import BrandKFac
from hf_precond.preconditioners.kronecker import SIDES, Kronecker
from hf_precond.views.plan import Slot
from trainer_ext.arguments import parse_optim_args
from trainer_ext.build import build_optimizer
from trainer_ext.timing import now

REFERENCE = "reference"
# What observers measure, and in words.
METRICS: Mapping[str, str] = {
    "input": "inverse of the input factor",
    "output": "inverse of the output factor",
    "step": "step",
    "angle": "1 - cos of the step",
}


@dataclass(frozen=True, kw_only=True)
class Observer:
    """The algorithms that look on, by label, the reference first."""

    algorithms: Mapping[str, Kronecker]

    @classmethod
    def of(
        cls,
        variants: Iterable[str],
        *,
        update_interval: int = 1,
        max_columns: int | None = None,
        common: str = "",
    ) -> Observer:
        """The reference and variants written ``NAME[:OPTIONS]``.

        Args:
            update_interval: steps between updates of the factors, of all of them.
            max_columns: positions of a batch that all of them see; None for all positions.
            common: options of all that have them, as in ``optim_args``.

        Raises:
            ValueError: a bad option, or a variant that is none of the K-FAC family or wants other
                columns than the reference.
        """
        options = {"update_interval": update_interval, "max_columns": max_columns}
        exact = f"kfac:inverse_interval={update_interval}"
        labels = {REFERENCE: exact} | {label: label for label in variants}
        algorithms = {key: to_algorithm(label, common, options) for key, label in labels.items()}
        wanted = algorithms[REFERENCE].layer_needs
        for label, algorithm in algorithms.items():
            if algorithm.layer_needs != wanted:
                raise ValueError(
                    f"--variants {label}: all see the same columns; give max_columns, "
                    "weight_sharing and seed by --max_columns, --common and --seeds"
                )
        return cls(algorithms=algorithms)

    @property
    def reference(self) -> Kronecker:
        """K-FAC at every update of the factors."""
        return self.algorithms[REFERENCE]

    def alignment(self) -> int:
        """Steps after which all intervals of all algorithms are due together."""
        return math.lcm(
            *(
                getattr(algorithm, item.name)
                for algorithm in self.algorithms.values()
                for item in fields(algorithm)
                if item.name.endswith("_interval")
            )
        )

    def wants(self, step: int) -> bool:
        """Whether any of them takes columns in at a step."""
        return any(algorithm.captures_at(step) for algorithm in self.algorithms.values())


def to_algorithm(label: str, common: str, options: Mapping[str, Any]) -> Kronecker:
    """The algorithm of ``NAME[:OPTIONS]`` with the common options.

    Raises:
        ValueError: a bad name or option, or none of the K-FAC family.
    """
    name, _, text = label.partition(":")
    specs = option_specs(name)
    shared = [part for part in common.split(",") if part.partition("=")[0].strip() in specs]
    options = {
        **options,
        **parse_optim_args(name, ",".join(shared)).options,
        **parse_optim_args(name, text).options,
    }
    algorithm = resolve(name, {key: options[key] for key in options if key in specs}).algorithm
    if not isinstance(algorithm, Kronecker):
        raise ValueError(f"--variants {label}: {name} is none of the K-FAC family")
    return algorithm


def rests(algorithm: Kronecker) -> bool:
    """Whether its state after a refresh follows from the factors alone."""
    adapts = getattr(algorithm, "adaptive_rank", False) or algorithm.authors_code
    return not isinstance(algorithm, BrandKFac) and not adapts


@dataclass(kw_only=True)
class Watcher:
    """One algorithm on one layer, and what it took in a window.

    Attributes:
        seconds: of each update and application in the window so far, by what they were.
    """

    algorithm: Kronecker
    state: State
    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def update(self, g_GMB: Tensor, ctx: StepContext) -> None:
        """Takes a step's columns in."""
        with timed(self.seconds["update"], self.device):
            self.algorithm.update(self.state, g_GMB, ctx)

    def direction(self, g_GMB: Tensor, ctx: StepContext) -> Tensor:
        """The preconditioned gradient."""
        with timed(self.seconds["apply"], self.device):
            return self.algorithm.apply(self.state, g_GMB, ctx)

    def inverse(self, side: str, ctx: StepContext) -> Tensor:
        """The inverse of a damped factor, ``[G, size, size]``."""
        vectors = self.state[f"{side}_vectors"]
        eye = torch.eye(vectors.shape[-2], dtype=vectors.dtype, device=vectors.device)
        return self.algorithm.precondition(self.state, side, eye.expand(len(vectors), -1, -1), ctx)


class timed:  # noqa: N801  reads as a function
    """Appends the seconds that its body took, the device's queue included."""

    def __init__(self, times: list[float], device: torch.device) -> None:
        self._times, self._device = times, device

    def __enter__(self) -> None:
        self._start = now(self._device)

    def __exit__(self, *_: object) -> None:
        self._times.append(now(self._device) - self._start)


class ObservedLayer:
    """All algorithms on one layer."""

    def __init__(self, name: str, slot: Slot, observer: Observer, device: torch.device) -> None:
        self.name, self.slot = name, slot
        self.shape = (slot.view.shape[0], slot.view.shape[1], slot.view.shape[2])
        self.watchers = {
            label: Watcher(
                algorithm=algorithm,
                state=algorithm.init(self.shape, dtype=torch.float32, device=device),
                device=device,
            )
            for label, algorithm in observer.algorithms.items()
        }
        self.factors: State = {}

    def follow(self, g_GMB: Tensor, ctx: StepContext) -> None:
        """A step outside all windows: factors, and whoever does not rest."""
        reference = self.watchers[REFERENCE]
        if ctx.columns is not None and ctx.due(reference.algorithm.update_interval):
            self._update_factors(reference, ctx.columns)
        for watcher in self.watchers.values():
            if not rests(watcher.algorithm):
                watcher.update(g_GMB, ctx)

    def begin_window(self) -> None:
        """Those who rested take the factors over; times start anew."""
        for watcher in self.watchers.values():
            if rests(watcher.algorithm):
                for name, tensor in self.factors.items():
                    watcher.state[name].copy_(tensor)
            watcher.seconds.clear()

    def measure(
        self, g_GMB: Tensor, ctx: StepContext, *, inverses: bool, directions: bool
    ) -> dict[str, dict[str, float]]:
        """A step of a window: label -> metric -> value."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for watcher in self.watchers.values():
            watcher.update(g_GMB, ctx)
        if inverses:
            for side in SIDES:
                for label, inverse, exact in self._each(
                    partial(Watcher.inverse, side=side, ctx=ctx)
                ):
                    found[label][side] = relative_error(inverse, exact)
        if directions:
            for label, step, exact in self._each(lambda each: each.direction(g_GMB, ctx)):
                found[label]["step"] = relative_error(step, exact)
                found[label]["angle"] = angle_error(step, exact)
        return found

    def end_window(self) -> dict[str, dict[str, float]]:
        """Mean milliseconds of a step, by label; the factors stay for those who will rest."""
        reference = self.watchers[REFERENCE]
        for name in (f"{side}_{kind}" for side in SIDES for kind in ("factor", "updates")):
            self.factors[name] = reference.state[name].clone()
        return {
            label: {what: 1e3 * fmean(times) for what, times in watcher.seconds.items()}
            for label, watcher in self.watchers.items()
        }

    def _each(self, what: Callable[[Watcher], Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Label, a variant's tensor and the reference's."""
        exact = what(self.watchers[REFERENCE])
        for label, watcher in self.watchers.items():
            yield label, exact if label == REFERENCE else what(watcher), exact

    def _update_factors(self, reference: Watcher, columns: Columns) -> None:
        """The running averages of both factors, without a decomposition."""
        for side, own in zip(SIDES, columns.flat(), strict=True):
            old = {
                name: self.factors.get(f"{side}_{name}", reference.state[f"{side}_{name}"])
                for name in ("factor", "updates")
            }
            for name, tensor in reference.algorithm.updated_factor(old, own).items():
                self.factors[f"{side}_{name}"] = tensor


def relative_error(x_GMB: Tensor, exact_GMB: Tensor) -> float:
    """||x - exact|| / ||exact||, the mean over groups."""
    norm = torch.linalg.matrix_norm(exact_GMB)
    return float((torch.linalg.matrix_norm(x_GMB - exact_GMB) / norm).mean())


def angle_error(x_GMB: Tensor, exact_GMB: Tensor) -> float:
    """1 - cos, the mean over groups; from the unit vectors' difference, which does not cancel."""
    units = [
        each.double() / torch.linalg.matrix_norm(each.double(), keepdim=True)
        for each in (x_GMB, exact_GMB)
    ]
    return float((units[0] - units[1]).square().sum((-2, -1)).mean() / 2)


def observed_layers(
    model: nn.Module,
    observer: Observer,
    *,
    layers: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[list[ObservedLayer], LayerColumns, list[nn.Parameter]]:
    """The layers asked for, what captures their columns, and the parameters slots speak of.

    Args:
        layers: names, or ``["all"]``; None for the largest.

    Raises:
        ValueError: a layer that is not there, or that K-FAC does not take.
    """
    shell = build_optimizer(model, "kfac", lr=0.0)
    shell.detach()
    groups = shell.param_groups
    params = [param for group in groups for param in group["params"]]
    names = [name.removesuffix(".weight") for name in shell.param_names]
    whole = max(param.numel() for param in params) * len(params)
    buckets = buckets_of(placed_views(groups, observer.reference), params, max_elements=whole)
    slots: dict[str, list[Slot]] = defaultdict(list)
    for bucket in buckets:
        for slot in bucket.slots if bucket.key.role == MAIN else ():
            slots[names[slot.param]].append(slot)
    largest = max(slots, key=lambda name: sum(slot.view.numel for slot in slots[name]))
    wanted = layers or [largest]
    wanted = list(slots) if wanted == ["all"] else wanted
    for name in wanted:
        if name not in slots:
            raise ValueError(f"layers={name!r} must be all or one of {', '.join(slots)}")
    device = torch.device(device)
    observed = [
        ObservedLayer(name if len(slots[name]) == 1 else f"{name}[{index}]", slot, observer, device)
        for name in wanted
        for index, slot in enumerate(slots[name])
    ]
    columns = LayerColumns(model, groups, observer.reference.layer_needs, dtype=torch.float32)
    return observed, columns, params
