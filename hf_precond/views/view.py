"""How a parameter tensor becomes stacked matrices.

A parameter is covered by a tuple of views. Each view is a window into the parameter's storage that
is read as ``[G, M, B]``: G independent groups of M blocks of size B. The window is described by
four plain steps, so that one class serves linear layers, GPT-2's transposed ``Conv1D``,
convolutions, attention heads, fused and interleaved QKV kernels, mixture-of-experts weights and
tiles:

    storage -> view(split) -> narrow(dim, start, length)* -> permute(order) -> reshape(G, M, B)

The first three steps never copy, so writing through the window writes into the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor

Narrow = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamView:
    """A window into a parameter, read as ``[G, M, B]`` stacked matrices.

    Args:
        name: piece name, ``""`` for a parameter with one view, else for example ``"q"``.
        split: shape the storage is viewed as first; its product is the parameter's element count.
        narrows: ``(dim, start, length)`` windows on dimensions of ``split``.
        order: permutation of the dimensions of ``split``.
        shape: ``(G, M, B)``; its product is the window's element count.

    Raises:
        ValueError: if the steps do not fit each other.
    """

    name: str = ""
    split: tuple[int, ...]
    narrows: tuple[Narrow, ...] = ()
    order: tuple[int, ...]
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.split))):
            raise ValueError(
                f"view {self.name!r}: order {self.order} is not a permutation of the "
                f"{len(self.split)} dimensions of split {self.split}"
            )
        if len({dim for dim, _, _ in self.narrows}) != len(self.narrows):
            raise ValueError(f"view {self.name!r}: narrows {self.narrows} repeat a dimension")
        for dim, start, length in self.narrows:
            if not 0 <= dim < len(self.split) or start < 0 or length < 1:
                raise ValueError(f"view {self.name!r}: bad narrow {(dim, start, length)}")
            if start + length > self.split[dim]:
                raise ValueError(
                    f"view {self.name!r}: narrow {(dim, start, length)} leaves split {self.split}"
                )
        if prod(self.window_shape) != prod(self.shape):
            raise ValueError(
                f"view {self.name!r}: window {self.window_shape} does not fill shape {self.shape}"
            )

    @property
    def window_shape(self) -> tuple[int, ...]:
        """Shape of the window after narrowing and permuting."""
        sizes = list(self.split)
        for dim, _, length in self.narrows:
            sizes[dim] = length
        return tuple(sizes[dim] for dim in self.order)

    @property
    def numel(self) -> int:
        """Number of parameter elements the view covers."""
        return prod(self.shape)

    @property
    def tiles_per_group(self) -> int:
        """One: a view is not cut into tiles."""
        return 1

    def window(self, tensor: Tensor) -> Tensor:
        """Returns the strided window into ``tensor`` (contiguous storage; never copies)."""
        out = tensor.view(self.split)
        for dim, start, length in self.narrows:
            out = out.narrow(dim, start, length)
        return out.permute(self.order)

    def to_blocks(self, tensor: Tensor) -> Tensor:
        """Returns ``tensor``'s window as ``[G, M, B]``; a view where strides allow, else a copy."""
        return self.window(tensor.contiguous()).reshape(self.shape)

    def copy_from_blocks(self, tensor: Tensor, blocks: Tensor) -> None:
        """Writes ``[G, M, B]`` blocks into the window of ``tensor``, in place."""
        self.window(tensor).copy_(blocks.reshape(self.window_shape))

    def add_from_blocks(self, tensor: Tensor, blocks: Tensor, alpha: float | Tensor) -> None:
        """Adds ``alpha * blocks`` to the window of ``tensor``, in place.

        The sum is rounded once, also where ``tensor`` has fewer bits than the blocks. A tensor that
        is not contiguous (a ``channels_last`` kernel) goes through a copy.
        """
        if not tensor.is_contiguous():
            copy = tensor.contiguous()
            self.add_from_blocks(copy, blocks, alpha)
            tensor.copy_(copy)
            return
        update = blocks.reshape(self.window_shape)
        if isinstance(alpha, Tensor):
            update, alpha = update * alpha, 1.0
        self.window(tensor).add_(update, alpha=alpha)

    def to_plain(self) -> list[Any]:
        """Returns nested lists of str and int, fit for optimizer ``param_groups``."""
        return [
            self.name,
            list(self.split),
            [list(narrow) for narrow in self.narrows],
            list(self.order),
            list(self.shape),
        ]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> ParamView:
        """Inverse of :meth:`to_plain`."""
        name, split, narrows, order, shape = plain
        return cls(
            name=name,
            split=tuple(split),
            narrows=tuple((int(d), int(s), int(n)) for d, s, n in narrows),
            order=tuple(order),
            shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        )

    def __str__(self) -> str:
        groups, blocks, size = self.shape
        label = f"{self.name}: " if self.name else ""
        return f"{label}{groups} x [{blocks}, {size}]"


def rows(shape: Sequence[int], *, groups: int = 1, name: str = "") -> ParamView:
    """View of an ``[O, ...]`` weight: a block is everything that feeds one output neuron.

    Covers ``nn.Linear`` ``[O, I]``, grouped convolutions ``[O, I/g, kh, kw]`` (``groups=g``) and
    q/k/v kernels per head (``groups=num_heads``: the head axis is the slow part of O; paper 001,
    6.1).
    """
    out = int(shape[0])
    _check_divides(groups, out, "groups", shape)
    block = prod(shape[1:])
    return ParamView(
        name=name,
        split=(groups, out // groups, block),
        order=(0, 1, 2),
        shape=(groups, out // groups, block),
    )


def columns(shape: Sequence[int], *, groups: int = 1, name: str = "") -> ParamView:
    """View of a transposed ``[I, O]`` weight (``Conv1D``): :func:`rows` of its transpose."""
    size_in, out = shape
    _check_divides(groups, out, "groups", shape)
    return ParamView(
        name=name,
        split=(size_in, groups, out // groups),
        order=(1, 2, 0),
        shape=(groups, out // groups, size_in),
    )


def heads_in(
    shape: Sequence[int], *, heads: int, transposed: bool = False, name: str = ""
) -> ParamView:
    """View of an attention output kernel: ``[O, H*d]`` (or ``[H*d, O]``) as ``(H, O, d)``."""
    out, size_in = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    _check_divides(heads, size_in, "heads", shape)
    head_dim = size_in // heads
    if transposed:
        split, order = (heads, head_dim, out), (0, 2, 1)
    else:
        split, order = (out, heads, head_dim), (1, 0, 2)
    return ParamView(name=name, split=split, order=order, shape=(heads, out, head_dim))


def fused_rows(
    shape: Sequence[int],
    pieces: Iterable[tuple[str, int, int]],
    *,
    transposed: bool = False,
) -> tuple[ParamView, ...]:
    """Views of kernels stacked along the output axis, for example fused QKV with fewer key heads.

    Args:
        shape: ``[q+k+v, I]``, or ``[I, q+k+v]`` with ``transposed``.
        pieces: ``(name, rows, groups)`` in storage order; the rows add up to the output size.
    """
    pieces = tuple(pieces)
    out, size_in = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    if sum(size for _, size, _ in pieces) != out:
        raise ValueError(
            f"pieces {pieces} do not add up to the output size {out} of shape {tuple(shape)}"
        )
    views, start = [], 0
    for name, size, groups in pieces:
        _check_divides(groups, size, f"groups of {name!r}", shape)
        dim, order = (1, (1, 0)) if transposed else (0, (0, 1))
        views.append(
            ParamView(
                name=name,
                split=tuple(shape),
                narrows=((dim, start, size),),
                order=order,
                shape=(groups, size // groups, size_in),
            )
        )
        start += size
    return tuple(views)


def interleaved_rows(
    shape: Sequence[int],
    *,
    heads: int,
    names: Sequence[str],
    per_head: bool,
    counts: Sequence[int] = (),
    transposed: bool = False,
) -> tuple[ParamView, ...]:
    """Views of a kernel whose output axis runs ``(head, piece, head_dim)``, as in GPT-NeoX.

    Args:
        shape: ``[O, I]``, or ``[I, O]`` with ``transposed``.
        heads: how often the sequence of pieces repeats: the number of key heads.
        names: the pieces inside one repetition, in storage order.
        per_head: one group per head, else one group per piece.
        counts: heads of each piece inside one repetition, one each if empty. Falcon's grouped-query
            kernel has ``(H/K, 1, 1)`` for q, k and v.
    """
    out, size_in = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    counts = tuple(counts) or (1,) * len(names)
    total = sum(counts)
    _check_divides(heads * total, out, "heads * pieces", shape)
    head_dim = out // (heads * total)
    inner = (heads, total, head_dim)
    split, dim, order = (
        ((size_in, *inner), 2, (1, 2, 3, 0)) if transposed else ((*inner, size_in), 1, (0, 1, 2, 3))
    )
    views, start = [], 0
    for name, count in zip(names, counts, strict=True):
        groups = heads * count if per_head else 1
        views.append(
            ParamView(
                name=name,
                split=split,
                narrows=((dim, start, count),),
                order=order,
                shape=(groups, heads * count * head_dim // groups, size_in),
            )
        )
        start += count
    return tuple(views)


def experts(
    shape: Sequence[int],
    *,
    transposed: bool = False,
    pieces: Sequence[tuple[str, int]] = (),
) -> tuple[ParamView, ...]:
    """Views of stacked expert weights ``[E, O, I]`` (or ``[E, I, O]``): experts are groups.

    Args:
        pieces: ``(name, rows)`` of kernels fused along O (``gate_up_proj``); empty for one kernel.
    """
    num_experts = shape[0]
    out, size_in = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    dim, order = (2, (0, 2, 1)) if transposed else (1, (0, 1, 2))
    pieces = tuple(pieces) or (("", out),)
    if sum(size for _, size in pieces) != out:
        raise ValueError(
            f"pieces {pieces} do not add up to the output size {out} of shape {tuple(shape)}"
        )
    views, start = [], 0
    for name, size in pieces:
        views.append(
            ParamView(
                name=name,
                split=tuple(shape),
                narrows=() if size == out else ((dim, start, size),),
                order=order,
                shape=(num_experts, size, size_in),
            )
        )
        start += size
    return tuple(views)


def alternating_experts(
    shape: Sequence[int], *, names: Sequence[str], transposed: bool = False
) -> tuple[ParamView, ...]:
    """Views of expert weights whose output rows alternate between pieces: gate, up, gate, ..."""
    num_experts = shape[0]
    out, size_in = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    _check_divides(len(names), out, "pieces", shape)
    size = out // len(names)
    split, dim, order = (
        ((num_experts, size_in, size, len(names)), 3, (0, 2, 3, 1))
        if transposed
        else ((num_experts, size, len(names), size_in), 2, (0, 1, 2, 3))
    )
    return tuple(
        ParamView(
            name=name,
            split=split,
            narrows=((dim, index, 1),),
            order=order,
            shape=(num_experts, size, size_in),
        )
        for index, name in enumerate(names)
    )


def flat(shape: Sequence[int]) -> ParamView:
    """The whole parameter as one row ``(1, 1, numel)``: for elementwise (fallback) algorithms."""
    numel = prod(shape)
    return ParamView(split=(1, 1, numel), order=(0, 1, 2), shape=(1, 1, numel))


def check_cover(views: Sequence[ParamView], shape: Sequence[int]) -> None:
    """Raises ValueError unless the views cover each element of a parameter exactly once."""
    problem = _split_problem(views, prod(shape)) or (
        _box_problem(views, prod(shape)) if _same_split(views) else _count_problem(views, shape)
    )
    if problem:
        raise ValueError(
            f"views {[str(view) for view in views]} of a parameter of shape {tuple(shape)} "
            f"{problem}"
        )


def _split_problem(views: Sequence[ParamView], numel: int) -> str:
    wrong = [view.split for view in views if prod(view.split) != numel]
    return f"have a split of another size: {wrong[0]}" if wrong else ""


def _same_split(views: Sequence[ParamView]) -> bool:
    return len({view.split for view in views}) == 1


def _box_problem(views: Sequence[ParamView], numel: int) -> str:
    """Windows of one split are boxes: disjoint and of full total size means an exact cover."""
    boxes = []
    for view in views:
        box = [(0, size) for size in view.split]
        for dim, start, length in view.narrows:
            box[dim] = (start, start + length)
        boxes.append(box)
    for first, second in combinations(boxes, 2):
        if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(first, second, strict=True)):
            return "cover some elements more than once"
    covered = sum(view.numel for view in views)
    return "" if covered == numel else f"cover {covered} of {numel} elements"


def _count_problem(views: Sequence[ParamView], shape: Sequence[int]) -> str:
    counts = torch.zeros(tuple(shape), dtype=torch.uint8)
    for view in views:
        view.window(counts).add_(1)
    missed, twice = int((counts == 0).sum()), int((counts > 1).sum())
    return (
        f"leave {missed} elements out and cover {twice} more than once" if missed or twice else ""
    )


def _check_divides(part: int, whole: int, what: str, shape: Sequence[int]) -> None:
    if part < 1 or whole % part:
        raise ValueError(f"{what} = {part} does not divide {whole} (shape {tuple(shape)})")
