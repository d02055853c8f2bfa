"""How a matrix is cut into tiles: at multiples of the block size, the last tile smaller."""

from __future__ import annotations

Tile = tuple[slice, slice]


def cuts(size: int, block_size: int) -> list[slice]:
    """[0, p), [p, 2p), ... of ``range(size)``; nothing is padded."""
    return [slice(start, min(start + block_size, size)) for start in range(0, size, block_size)]


def tiles(shape: tuple[int, int], block_shape: tuple[int, int]) -> list[Tile]:
    """(row slice, column slice) of every tile, so that ``matrix[tile]`` is that tile."""
    (rows, columns), (high, wide) = shape, block_shape
    return [(row, column) for row in cuts(rows, high) for column in cuts(columns, wide)]
