"""What a view becomes where a rank has only some rows of its parameter.

FSDP2 cuts parameters along their first dimension. Where that dimension runs over blocks (output
neurons) or groups (heads, experts), the rows at hand are again groups of blocks, whole or cut at
the borders: at most three stacks a view, because a border may lie inside a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from hf_precond.views.view import ParamView

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPart:
    """Some blocks of some groups of a view, inside the local rows of its parameter.

    Attributes:
        view: window into the local rows.
        groups: first and last (excluded) group of the whole view.
        rows: first and last (excluded) block of each of these groups.
    """

    view: ParamView
    groups: Range
    rows: Range


def chunk_ranges(length: int, parts: int) -> list[Range]:
    """Returns the ranges in which ``torch.chunk`` and FSDP2 cut a dimension; the last ones may be
    empty."""
    size = -(-length // parts)
    return [(min(i * size, length), min((i + 1) * size, length)) for i in range(parts)]


def row_parts(
    view: ParamView, shape: Sequence[int], ranges: Sequence[Range]
) -> list[list[RowPart]] | None:
    """Returns the parts of a view that each rank has, or None where rows are not blocks.

    Args:
        shape: of the whole parameter.
        ranges: rows of the parameter on each rank.
    """
    plan = _rows_first(view, shape)
    if plan is None or any(row % plan.unit for pair in ranges for row in pair):
        return None
    return [plan.parts(start // plan.unit, stop // plan.unit) for start, stop in ranges]


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowsFirst:
    """A view whose first split dimension is its parameter's first, maybe divided by ``unit``.

    Attributes:
        unit: rows of the parameter for one index of the first split dimension.
        per_index: blocks (over all groups, or in each group if ``inner``) of one such index.
        inner: the first dimension runs over the blocks of every group, not over groups.
    """

    view: ParamView
    unit: int
    per_index: int
    inner: bool

    def parts(self, start: int, stop: int) -> list[RowPart]:
        """The parts inside local indices ``start:stop`` of the first dimension."""
        first, length = next(
            ((begin, size) for dim, begin, size in self.view.narrows if dim == 0),
            (0, self.view.split[0]),
        )
        low, high = max(start, first), min(stop, first + length)
        if low >= high:
            return []
        groups, blocks, _ = self.view.shape
        if self.inner:
            bounds = (low - first) * self.per_index, (high - first) * self.per_index
            return [self._part(low, high, start, stop, (0, groups), bounds)]
        return [
            self._part(
                first + begin // self.per_index, first + end // self.per_index, start, stop, g, m
            )
            for begin, end, g, m in _rectangles(
                (low - first) * self.per_index, (high - first) * self.per_index, blocks
            )
        ]

    def _part(
        self, low: int, high: int, start: int, stop: int, groups: Range, rows: Range
    ) -> RowPart:
        narrows = [narrow for narrow in self.view.narrows if narrow[0] != 0]
        if high - low < stop - start:
            narrows.insert(0, (0, low - start, high - low))
        local = replace(
            self.view,
            split=(stop - start, *self.view.split[1:]),
            narrows=tuple(narrows),
            shape=(groups[1] - groups[0], rows[1] - rows[0], self.view.shape[2]),
        )
        return RowPart(view=local, groups=groups, rows=rows)


def _rectangles(begin: int, end: int, blocks: int) -> list[tuple[int, int, Range, Range]]:
    """Cuts a run of blocks into rectangles: the end of a group, whole groups, the start of one."""
    found = []
    while begin < end:
        group, row = divmod(begin, blocks)
        whole = (end - begin) // blocks
        if row == 0 and whole:
            stop, groups, rows = begin + whole * blocks, (group, group + whole), (0, blocks)
        else:
            stop = min(end, (group + 1) * blocks)
            groups, rows = (group, group + 1), (row, row + stop - begin)
        found.append((begin, stop, groups, rows))
        begin = stop
    return found


def _rows_first(view: ParamView, shape: Sequence[int]) -> _RowsFirst | None:
    """Reads a view by the rows of its parameter; None where that cannot be done."""
    leading = _leading_dims(view.split, shape)
    if leading is None:
        return None
    if leading > 1:
        if _narrowed(view) & {0} or view.order[:leading] != tuple(range(leading)):
            return None
        if not _narrowed(view) & set(range(leading)):
            view, leading = _merged(view, leading), 1
    window, (groups, blocks, _) = view.window_shape, view.shape
    unit = prod(view.split[1:leading])
    end = _boundary(window, groups * blocks)
    if end is None:
        return None
    if view.order[0] == 0:
        per_index = prod(window[1:end])
        if end < leading or (blocks % per_index and per_index % blocks):
            return None
        return _RowsFirst(view=view, unit=unit, per_index=per_index, inner=False)
    begin = _boundary(window, groups)
    if leading > 1 or begin is None or begin >= end or view.order[begin] != 0:
        return None
    per_index = prod(window[begin + 1 : end])
    return _RowsFirst(view=view, unit=unit, per_index=per_index, inner=True)


def _leading_dims(split: Sequence[int], shape: Sequence[int]) -> int | None:
    """How many dimensions of the split make up the parameter's first."""
    for count in range(1, len(split) + 1):
        if prod(split[:count]) == shape[0] and prod(split[count:]) == prod(shape[1:]):
            return count
    return None


def _narrowed(view: ParamView) -> set[int]:
    return {dim for dim, _, _ in view.narrows}


def _merged(view: ParamView, leading: int) -> ParamView:
    """The same view with its leading split dimensions as one."""
    less = leading - 1
    return replace(
        view,
        split=(prod(view.split[:leading]), *view.split[leading:]),
        narrows=tuple((dim - less, start, length) for dim, start, length in view.narrows),
        order=(0, *(dim - less for dim in view.order[leading:])),
    )


def _boundary(window: Sequence[int], size: int) -> int | None:
    """Number of first window dimensions whose sizes multiply to ``size``."""
    done = 1
    for count, length in enumerate(window):
        if done == size and length != 1:
            return count
        done *= length
    return len(window) if done == size else None
