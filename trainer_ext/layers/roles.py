"""What a weight is inside its layer, and the views that follow from it.

======================  =====================  ==================================  =================
role                    output (input) rows    views per head                      whole kernels
======================  =====================  ==================================  =================
q                       H * d                  (H, d, I)                           (1, H*d, I)
k, v                    K * d                  (K, d, I)                           (1, K*d, I)
kv, qkv                 pieces one by one      one of the above per piece          likewise
interleaved qkv         (K, H/K + 2, d)        one of the above per piece          likewise
output                  input is H * d         (H, O, d)                           (1, O, H*d)
gate up                 two equal halves       (1, O/2, I) for each                likewise
======================  =====================  ==================================  =================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hf_precond.views.rules import Assignment
from hf_precond.views.view import (
    ParamView,
    columns,
    fused_rows,
    heads_in,
    interleaved_rows,
    rows,
)
from trainer_ext.layers.heads import Heads

Views = tuple[ParamView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """How attention kernels are grouped.

    Attributes:
        per_head: one group per head, else one per kernel.
        min_head_dim: smallest head size for which the output kernel is cut into heads.
    """

    per_head: bool
    min_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One weight of a layer: ``[O, I]``, or ``[I, O]`` where ``transposed`` (Conv1D)."""

    shape: tuple[int, int]
    transposed: bool
    heads: Heads | None

    @property
    def out(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def size_in(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]

    def whole(self, *, groups: int = 1) -> Views:
        """One view of the kernel, its output rows cut into ``groups``."""
        make = columns if self.transposed else rows
        return (make(self.shape, groups=groups),)


class Role(Protocol):
    """What a weight is inside its layer."""

    def assignment(self, kernel: Kernel, grouping: Grouping) -> Assignment:
        """Returns the views of ``kernel``; whole, with a reason, where it cannot be cut."""
        ...


Cut = Callable[[Kernel, Heads, tuple[str, ...], bool], Views]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRole:
    """A weight made of head-major pieces.

    Attributes:
        label: for explanations.
        pieces: kernels inside the weight, in storage order.
        cut: from (kernel, heads, pieces, per head or not) to views, for a kernel whose size fits.
        on_input: the heads lie along the input axis.
    """

    label: str
    pieces: tuple[str, ...]
    cut: Cut
    on_input: bool = False

    def assignment(self, kernel: Kernel, grouping: Grouping) -> Assignment:
        if len(self.pieces) == 1 and not grouping.per_head:
            return Assignment(views=kernel.whole(), reason=f"{self.label} kernel, whole")
        if kernel.heads is None:
            return self._left_whole(kernel, "the model does not tell its head counts")
        if problem := self._misfit(kernel, kernel.heads, grouping):
            return self._left_whole(kernel, problem)
        return Assignment(
            views=self.cut(kernel, kernel.heads, self.pieces, grouping.per_head),
            reason=f"{self.label} kernel, {self._detail(kernel.heads, grouping)}",
        )

    def _detail(self, heads: Heads, grouping: Grouping) -> str:
        if not grouping.per_head:
            return "one group each"
        counts = {piece: heads.of(piece) for piece in self.pieces}
        return f"{'/'.join(map(str, dict.fromkeys(counts.values())))} heads"

    def _left_whole(self, kernel: Kernel, why: str) -> Assignment:
        return Assignment(views=kernel.whole(), reason=f"{self.label} kernel, whole: {why}")

    def _misfit(self, kernel: Kernel, heads: Heads, grouping: Grouping) -> str:
        """Why the head counts do not cut this kernel; ``""`` if they do."""
        axis = kernel.size_in if self.on_input else kernel.out
        total = sum(heads.of(piece) for piece in self.pieces)
        if heads.query % heads.key:
            return f"{heads.key} key heads do not divide {heads.query} query heads"
        if total * heads.size != axis:
            return f"{total} heads of size {heads.size} do not make {axis}"
        if self.on_input and heads.size < grouping.min_head_dim:
            return f"head size {heads.size} is below {grouping.min_head_dim}"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedRole:
    """A weight that stacks equally large kernels without heads along its output axis."""

    pieces: tuple[str, ...]

    def assignment(self, kernel: Kernel, grouping: Grouping) -> Assignment:
        label = f"fused {', '.join(self.pieces)} kernel"
        size, rest = divmod(kernel.out, len(self.pieces))
        if rest:
            why = f"{len(self.pieces)} equal pieces do not make {kernel.out}"
            return Assignment(views=kernel.whole(), reason=f"{label}, whole: {why}")
        pieces = ((name, size, 1) for name in self.pieces)
        views = fused_rows(kernel.shape, pieces, transposed=kernel.transposed)
        return Assignment(views=views, reason=label)


def _separate(kernel: Kernel, heads: Heads, pieces: tuple[str, ...], per_head: bool) -> Views:
    (piece,) = pieces
    return kernel.whole(groups=heads.of(piece) if per_head else 1)


def _stacked(kernel: Kernel, heads: Heads, pieces: tuple[str, ...], per_head: bool) -> Views:
    counts = ((name, heads.of(name)) for name in pieces)
    sizes = ((name, count * heads.size, count if per_head else 1) for name, count in counts)
    return fused_rows(kernel.shape, sizes, transposed=kernel.transposed)


def _interleaved(kernel: Kernel, heads: Heads, pieces: tuple[str, ...], per_head: bool) -> Views:
    return interleaved_rows(
        kernel.shape,
        heads=heads.key,
        names=pieces,
        counts=[heads.of(name) // heads.key for name in pieces],
        per_head=per_head,
        transposed=kernel.transposed,
    )


def _by_input(kernel: Kernel, heads: Heads, pieces: tuple[str, ...], per_head: bool) -> Views:
    return (heads_in(kernel.shape, heads=heads.query, transposed=kernel.transposed),)


ROLES: dict[str, Role] = {
    "q": AttentionRole(label="q", pieces=("q",), cut=_separate),
    "k": AttentionRole(label="k", pieces=("k",), cut=_separate),
    "v": AttentionRole(label="v", pieces=("v",), cut=_separate),
    "kv": AttentionRole(label="fused k, v", pieces=("k", "v"), cut=_stacked),
    "qkv": AttentionRole(label="fused q, k, v", pieces=("q", "k", "v"), cut=_stacked),
    "interleaved qkv": AttentionRole(
        label="interleaved q, k, v", pieces=("q", "k", "v"), cut=_interleaved
    ),
    "output": AttentionRole(label="attention output", pieces=("o",), cut=_by_input, on_input=True),
    "gate up": FusedRole(pieces=("gate", "up")),
}
