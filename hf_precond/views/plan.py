"""Which views share a stack: equal block shapes of one algorithm become one batched call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_precond.views.joint import Joint
from hf_precond.views.tiles import Tiles
from hf_precond.views.view import ParamView

AnyView = ParamView | Tiles | Joint
Range = tuple[int, int]
Tensors = Mapping[int, Tensor] | Sequence[Tensor]


class Key(NamedTuple):
    """What views have in common that are stacked.

    Attributes:
        role: what works on them: the algorithm, the graft step alone, or the fallback.
        chunk: number of the stack among those that must stay apart.
        rank: of the algorithm for these views; 0 for the one it has by its options.
    """

    role: str
    device: torch.device
    chunk: int = 0
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The part of a whole stack ``[G, M, B]`` that one rank works on, as ranges."""

    groups: Range
    rows: Range
    columns: Range

    def __str__(self) -> str:
        return ",".join(f"{low}:{high}" for low, high in (self.groups, self.rows, self.columns))

    @classmethod
    def parse(cls, text: str) -> Extent:
        """Inverse of ``str``.

        Raises:
            ValueError: for any other text.
        """
        groups, rows, columns = (part.split(":") for part in text.split(","))
        pairs = [(int(low), int(high)) for low, high in (groups, rows, columns)]
        return cls(groups=pairs[0], rows=pairs[1], columns=pairs[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedView:
    """One view of one parameter, before stacking.

    Attributes:
        param: index of the parameter.
        view: its window, or equal tiles of it.
        bias: index of the bias that a joint view takes along.
        number: index of the window among all windows of the optimizer.
        first_group: index of the window's first group among all groups of the optimizer.
        key: views stack only with views of an equal key.
        piece: index among all views that are stacked, tiles of several sizes apart.
        extent: what of the piece the view has; None for all of it.
    """

    param: int
    view: AnyView
    bias: int | None = None
    number: int = 0
    first_group: int = 0
    key: Key
    piece: int = 0
    extent: Extent | None = None

    @property
    def role(self) -> str:
        """What works on it: the algorithm, the graft step alone, or the fallback."""
        return self.key.role

    @property
    def params(self) -> tuple[int, ...]:
        """Indices of the parameter and, in a joint view, of its bias."""
        return (self.param,) if self.bias is None else (self.param, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A view's place in a bucket: groups ``start:stop`` of the stack."""

    param: int
    view: AnyView
    bias: int | None
    number: int
    first_group: int
    piece: int
    extent: Extent | None
    role: str
    start: int
    stop: int

    @property
    def params(self) -> tuple[int, ...]:
        """Indices of the parameter and, in a joint view, of its bias."""
        return (self.param,) if self.bias is None else (self.param, self.bias)

    def to_blocks(self, tensors: Mapping[int, Tensor]) -> Tensor:
        """Returns ``[G, M, B]`` from the tensors of its parameters."""
        return self.view.to_blocks(*(tensors[index] for index in self.params))

    def add_from_blocks(
        self, params: Tensors, blocks: Tensor, alphas: Sequence[float | Tensor]
    ) -> None:
        """Adds blocks to its parameters, in place, each with its own factor."""
        add_from_blocks(self, params, blocks, alphas)

    def part_of(self, whole: Sequence[float]) -> Sequence[float]:
        """What belongs to the slot's groups of one number for each group of its piece."""
        return whole if self.extent is None else whole[slice(*self.extent.groups)]

    def owners(self, scope: str) -> list[int]:
        """For each group of the slot, the parameter, view or group it is a part of.

        The tiles of a group belong to that group.
        """
        size = self.stop - self.start
        if scope == "group":
            tiles = self.view.tiles_per_group
            first = self.extent.groups[0] if self.extent else 0
            return [self.first_group + (first + index) // tiles for index in range(size)]
        return [self.param if scope == "parameter" else self.number] * size


def add_from_blocks(
    item: Slot | PlannedView, params: Tensors, blocks: Tensor, alphas: Sequence[float | Tensor]
) -> None:
    """Adds blocks of a view to its parameters, in place, each with its own factor."""
    if isinstance(item.view, Joint):
        assert item.bias is not None
        weight, bias = params[item.param], params[item.bias]
        item.view.add_from_blocks(weight, bias, blocks, (alphas[0], alphas[1]))
    else:
        item.view.add_from_blocks(params[item.param], blocks, alphas[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A stack ``[G, M, B]`` of views of one block shape, worked on by one batched call."""

    key: Key
    slots: tuple[Slot, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, M, B) of the whole stack."""
        _, blocks, size = self.slots[0].view.shape
        return self.slots[-1].stop, blocks, size

    @property
    def params(self) -> tuple[int, ...]:
        """Indices of the parameters that have a view here, each once."""
        return tuple(dict.fromkeys(index for slot in self.slots for index in slot.params))


def plan_buckets(views: Iterable[PlannedView], *, max_elements: int) -> list[Bucket]:
    """Stacks views of equal key and block shape, in order, up to ``max_elements`` per stack.

    The limit bounds the memory of a step's temporaries. A parameter's views of one shape stay
    together.
    """
    stacks: dict[tuple[object, ...], list[list[PlannedView]]] = {}
    for item in views:
        parts = stacks.setdefault((item.key, item.view.shape[1:]), [[]])
        if parts[-1] and parts[-1][-1].param != item.param:
            filled = sum(other.view.numel for other in parts[-1])
            if filled + item.view.numel > max_elements:
                parts.append([])
        parts[-1].append(item)
    return [_bucket(part) for parts in stacks.values() for part in parts]


def clusters(buckets: Sequence[Bucket]) -> list[list[Bucket]]:
    """Groups buckets that share a parameter: norms over parameters stay inside a cluster."""
    found: list[tuple[set[int], list[Bucket]]] = []
    for bucket in buckets:
        params, members = set(bucket.params), [bucket]
        apart = []
        for other_params, others in found:
            if params & other_params:
                params |= other_params
                members = others + members
            else:
                apart.append((other_params, others))
        found = [*apart, (params, members)]
    return [members for _, members in found]


def _bucket(items: Sequence[PlannedView]) -> Bucket:
    slots, start = [], 0
    for item in items:
        stop = start + item.view.shape[0]
        slots.append(
            Slot(
                param=item.param,
                view=item.view,
                bias=item.bias,
                number=item.number,
                first_group=item.first_group,
                piece=item.piece,
                extent=item.extent,
                role=item.role,
                start=start,
                stop=stop,
            )
        )
        start = stop
    return Bucket(key=items[0].key, slots=tuple(slots))
