"""Samples of a training run that diagnostics are made of: a few weights of a few kernels.

What is kept does not grow with the model: of each kernel some rows and columns of its gradient at
every step, the gradient seen from the singular vectors of the first one, and some of the positions
that its layer has seen.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import ceil

import torch
from torch import Tensor, nn

from hf_precond.statistics.layer_io import LayerIO
from hf_precond.statistics.layers import without_layer
from hf_precond.views.rules import ParamInfo, assign_all
from hf_precond.views.view import ParamView
from trainer_ext.layers import view_rules

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSizes:
    """How much is kept of each kernel.

    Attributes:
        rows: output neurons.
        columns: inputs of each of them.
        heads: groups, where there are several.
        picture: outputs, and inputs, of what is shown entry by entry.
        positions: of a layer's inputs, over all steps.
        largest_side: kernels with more rows and columns than this are not rotated.
    """

    rows: int = 32
    columns: int = 512
    heads: int = 4
    picture: int = 32
    positions: int = 1024
    largest_side: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One matrix of the model: a weight, or a piece of a fused one.

    Attributes:
        name: of the parameter, with the piece in brackets.
        view: of all of it, ``[1, O, I]``.
        heads: the same by attention heads, ``[G, M, B]``; None where it has none.
    """

    name: str
    info: ParamInfo
    view: ParamView
    heads: ParamView | None


def kernels_of(model: nn.Module) -> list[Kernel]:
    """All matrices of a model that preconditioners work on, in its order."""
    by_head = {
        (info.name, view.name): view
        for info, assignment in assign_all(model, view_rules(model, attention_grouping="head"))
        for view in assignment.views
    }
    kernels = []
    for info, assignment in assign_all(model, view_rules(model, attention_grouping="kernel")):
        for view in assignment.views:
            heads = by_head.get((info.name, view.name))
            piece = f"[{view.name}]" if view.name else ""
            kernels.append(
                Kernel(
                    name=f"{info.name.removesuffix('.weight')}{piece}",
                    info=info,
                    view=view,
                    heads=heads if heads is not None and heads.shape != view.shape else None,
                )
            )
    return kernels


def choose_kernels(kernels: Sequence[Kernel], patterns: Sequence[str] | None) -> list[Kernel]:
    """Those whose names match a shell pattern; without patterns of each kind the first, a middle
    and the last (kernels whose names differ in numbers only are of one kind).

    Raises:
        ValueError: a pattern that matches none, or a model without matrices.
    """
    if not kernels:
        raise ValueError("the model has no matrix that a preconditioner would work on")
    if patterns is None:
        kinds: dict[str, list[Kernel]] = defaultdict(list)
        for kernel in kernels:
            kinds[_NUMBER.sub("N", kernel.name)].append(kernel)
        chosen = {
            kind[index].name
            for kind in kinds.values()
            for index in (0, (len(kind) - 1) // 2, len(kind) - 1)
        }
    else:
        for pattern in patterns:
            if not any(_matches(kernel, pattern) for kernel in kernels):
                names = ", ".join(kernel.name for kernel in kernels)
                raise ValueError(f"layers={pattern!r} matches none of {names}")
        chosen = {
            kernel.name
            for kernel in kernels
            if any(_matches(kernel, pattern) for pattern in patterns)
        }
    return [kernel for kernel in kernels if kernel.name in chosen]


def _matches(kernel: Kernel, pattern: str) -> bool:
    """A pattern is for a whole kernel's name, a piece's, or a module above."""
    whole = kernel.name.partition("[")[0]
    forms = pattern, f"{pattern}.*"
    return any(fnmatch(name, form) for name in (kernel.name, whole) for form in forms)


@dataclass(kw_only=True)
class KernelSamples:
    """What is kept of one kernel.

    Attributes:
        shape: (G, M, B) of all of it.
        head_shape: the same by heads; None where it has none.
        blocks: for each step ``[1, O', I']``.
        heads: for each step ``[G', M', B']``, empty where it has no heads.
        one_sided: for each step the gradient seen from some left singular vectors of the first
            gradient; empty for large kernels.
        two_sided: the same from singular vectors on both sides.
        inputs: positions ``[n, I]`` of what the layer has seen, per step.
    """

    name: str
    shape: tuple[int, int, int]
    head_shape: tuple[int, int, int] | None
    blocks: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    one_sided: list[Tensor] = field(default_factory=list)
    two_sided: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def g_TGMB(self) -> Tensor:
        """``[T, 1, O', I']``."""
        return torch.stack(self.blocks)

    def picture(self, size: int) -> Tensor:
        """``[T, O'', I'']``: at most ``size`` outputs and inputs."""
        g_TOI = self.g_TGMB[:, 0]
        rows, columns = (evenly(count, size) for count in g_TOI.shape[1:])
        return g_TOI[:, rows][:, :, columns]


class Sampler:
    """Takes samples of a model in training, step after step, until :meth:`remove`.

    Args:
        steps: how many steps there will be.

    Attributes:
        samples: of each kernel, by name.
        skipped: steps whose gradients were not finite.
    """

    def __init__(
        self, model: nn.Module, kernels: Sequence[Kernel], sizes: SampleSizes, *, steps: int
    ) -> None:
        self._kernels, self._sizes = list(kernels), sizes
        self.samples = {
            kernel.name: KernelSamples(
                name=kernel.name,
                shape=kernel.view.shape,
                head_shape=None if kernel.heads is None else kernel.heads.shape,
            )
            for kernel in kernels
        }
        self.skipped = 0
        self._rotations: dict[str, tuple[Tensor, Tensor] | None] = {}
        layers = {
            kernel.info.name: kernel.info.module
            for kernel in kernels
            if not without_layer(kernel.info)
        }
        self._io = LayerIO(
            model, layers, dtype=torch.float32, max_columns=ceil(sizes.positions / steps)
        )
        self._names = list(layers)

    def arm(self, step: int) -> None:
        """Inputs of the step that comes are wanted."""
        self._io.arm(dict.fromkeys(self._names, step))

    @torch.no_grad()
    def take(self) -> None:
        """Takes a step's gradients, and what the layers have seen, in.

        Raises:
            ValueError: gradients of which a process has a part only.
        """
        captured = self._io.take()
        gradients = {kernel.name: _gradient(kernel) for kernel in self._kernels}
        if not all(bool(g.isfinite().all()) for g in gradients.values() if g is not None):
            self.skipped += 1
            return
        for kernel in self._kernels:
            g = gradients[kernel.name]
            if g is not None:
                self._take_gradient(kernel, g)
        for kernel in self._kernels:
            seen = captured.get(kernel.info.name)
            if seen is not None:
                valid = seen.valid.flatten() > 0
                rows = seen.inputs.flatten(0, 1)[valid] / seen.valid.flatten()[valid, None]
                self.samples[kernel.name].inputs.append(rows.cpu())

    def remove(self) -> None:
        """Takes all hooks off the model."""
        self._io.remove()
        self._rotations.clear()

    def _take_gradient(self, kernel: Kernel, g: Tensor) -> None:
        samples, sizes = self.samples[kernel.name], self._sizes
        blocks = kernel.view.to_blocks(g)
        samples.blocks.append(_corner(blocks, (1, sizes.rows, sizes.columns)))
        if kernel.heads is not None:
            by_head = kernel.heads.to_blocks(g)
            samples.heads.append(_corner(by_head, (sizes.heads, sizes.rows, sizes.columns)))
        if kernel.name not in self._rotations:
            self._rotations[kernel.name] = self._rotation(blocks[0])
        rotation = self._rotations[kernel.name]
        if rotation is not None:
            left, right = rotation
            columns = evenly(blocks.shape[2], sizes.picture).to(g.device)
            half = left.mT @ blocks[0].float()
            samples.one_sided.append(half[:, columns].cpu())
            samples.two_sided.append((half @ right).cpu())

    def _rotation(self, g_OI: Tensor) -> tuple[Tensor, Tensor] | None:
        """Some of the singular vectors of a gradient, evenly from the largest to the smallest."""
        if min(g_OI.shape) > self._sizes.largest_side:
            return None
        left, _, right = torch.linalg.svd(g_OI.float(), full_matrices=False)
        chosen = evenly(left.shape[1], self._sizes.picture).to(g_OI.device)
        return left[:, chosen], right.mT[:, chosen]


def evenly(count: int, most: int) -> Tensor:
    """At most ``most`` indices, evenly from 0 to ``count - 1``.

    >>> evenly(10, 4).tolist(), evenly(3, 4).tolist()
    ([0, 3, 6, 9], [0, 1, 2])
    """
    if count <= most:
        return torch.arange(count)
    return torch.linspace(0, count - 1, most, dtype=torch.float64).round().long()


def _corner(blocks: Tensor, most: Iterable[int]) -> Tensor:
    """Evenly chosen groups, rows and columns, on the CPU."""
    for dim, (count, limit) in enumerate(zip(blocks.shape, most, strict=True)):
        if count > limit:
            blocks = blocks.index_select(dim, evenly(count, limit).to(blocks.device))
    return blocks.float().cpu().clone()


def _gradient(kernel: Kernel) -> Tensor | None:
    grad = kernel.info.param.grad
    if grad is not None and hasattr(grad, "to_local"):
        raise ValueError(
            f"the gradient of {kernel.info.name!r} is spread over processes (FSDP); diagnose on "
            "one process, or under DDP"
        )
    return grad
