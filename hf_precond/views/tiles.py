"""Matrices cut into tiles: equal tiles of all groups, and so of all layers, make one stack.

Rows and columns are cut at multiples of the tile size. What is left over at the edges makes stacks
of its own, smaller ones, never padding: a padded factor has eigenvalues that nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_precond.views.view import ParamView

Cut = tuple[int, int, int]  # start, number of tiles, size of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Equal tiles of a view ``[G, M, B]``, read as ``[G * tiles, rows, columns]``.

    Attributes:
        name: of the base view and, where remainders make further pieces, of the tile's size.
        base: the view that is cut.
        rows: (start, number, size) along M.
        columns: (start, number, size) along B.
    """

    name: str
    base: ParamView
    rows: Cut
    columns: Cut

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G * tiles, rows, columns)."""
        return self.base.shape[0] * self.tiles_per_group, self.rows[2], self.columns[2]

    @property
    def tiles_per_group(self) -> int:
        """Number of tiles that one group of the base view is cut into here."""
        return self.rows[1] * self.columns[1]

    @property
    def numel(self) -> int:
        """Number of parameter elements the tiles cover."""
        groups, rows, columns = self.shape
        return groups * rows * columns

    def to_blocks(self, tensor: Tensor) -> Tensor:
        """Returns the tiles of ``tensor`` as ``[G * tiles, rows, columns]``."""
        return self._cut(self.base.to_blocks(tensor)).reshape(self.shape)

    def add_from_blocks(self, tensor: Tensor, blocks: Tensor, alpha: float | Tensor) -> None:
        """Adds ``alpha * blocks`` to the tiles of ``tensor``, in place."""
        window = self.base.window(tensor) if tensor.is_contiguous() else None
        matrices = None if window is None else _as_view(window, self.base.shape)
        if matrices is None:
            # No strides describe these matrices inside the parameter: go through a copy of it.
            matrices = self.base.to_blocks(tensor).clone()
        target = self._cut(matrices)
        update = blocks.reshape(target.shape)
        if isinstance(alpha, Tensor):
            update, alpha = update * alpha, 1.0
        target.add_(update, alpha=alpha)
        if window is None:
            copy = tensor.contiguous()
            self.base.copy_from_blocks(copy, matrices)
            tensor.copy_(copy)
        elif matrices.data_ptr() != window.data_ptr():
            self.base.copy_from_blocks(tensor, matrices)

    def _cut(self, matrices: Tensor) -> Tensor:
        """``[G, M, B]`` as a strided ``[G, row tiles, column tiles, rows, columns]``."""
        for dim, (start, number, size) in ((2, self.columns), (1, self.rows)):
            matrices = matrices.narrow(dim, start, number * size).unflatten(dim, (number, size))
        return matrices.transpose(2, 3)

    def __str__(self) -> str:
        groups, rows, columns = self.shape
        label = f"{self.name}: " if self.name else ""
        return f"{label}{groups} x [{rows}, {columns}]"


def tile(view: ParamView, rows: int, columns: int) -> tuple[ParamView | Tiles, ...]:
    """Cuts a view's matrices into tiles of at most ``rows`` x ``columns``.

    Returns:
        the view itself where one tile holds it, else one to four stacks that cover it once.
    """
    _, blocks, size = view.shape
    if rows >= blocks and columns >= size:
        return (view,)
    pieces = [(r, c) for r in _cuts(blocks, rows) for c in _cuts(size, columns)]
    return tuple(
        Tiles(name=_piece_name(view, r, c, alone=len(pieces) == 1), base=view, rows=r, columns=c)
        for r, c in pieces
    )


def _piece_name(view: ParamView, rows: Cut, columns: Cut, *, alone: bool) -> str:
    size = "" if alone else f"{rows[2]}x{columns[2]}"
    return ".".join(part for part in (view.name, size) if part)


def _cuts(length: int, size: int) -> list[Cut]:
    """The full tiles of a dimension, and the remainder."""
    number, rest = divmod(length, size)
    cuts = [(0, number, size), (number * size, 1, rest)]
    return [cut for cut in cuts if cut[1] and cut[2]]


def _as_view(window: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
    try:
        return window.view(shape)
    except RuntimeError:
        return None
