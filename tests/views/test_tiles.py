"""Tiles: what they cover, what they read, what they write, what they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

import pytest
import torch
from torch import Tensor

from hf_precond.views.tiles import Tiles, tile
from hf_precond.views.view import ParamView, fused_rows, rows
from tests.reference.tiles import tiles as reference_tiles
from tests.views.test_view import COVERS, Views

Piece = ParamView | Tiles
Size = tuple[int, int]

# Smaller than the matrices, unequal, as large as some of them in one direction or in both.
SIZES: tuple[Size, ...] = ((1, 1), (2, 2), (2, 3), (3, 2), (4, 1), (2, 100), (100, 3), (100, 100))
LENGTHS = (1, 2, 5, 7)

per_cover = pytest.mark.parametrize(("shape", "views"), COVERS.values(), ids=COVERS)


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def pieces_of(views: Iterable[ParamView], size: Size) -> list[Piece]:
    """All pieces of all views."""
    return [piece for view in views for piece in tile(view, *size)]


def matrices(pieces: Iterable[Piece], tensor: Tensor) -> list[Tensor]:
    """Every matrix of every piece of a tensor."""
    return [matrix for piece in pieces for matrix in piece.to_blocks(tensor)]


def expected_matrices(views: Iterable[ParamView], size: Size, tensor: Tensor) -> list[Tensor]:
    """Every tile of every group, cut with slices."""
    return [
        matrix[place]
        for view in views
        for matrix in view.to_blocks(tensor)
        for place in reference_tiles(tuple(matrix.shape), size)
    ]


def in_order(found: Iterable[Tensor]) -> list[tuple[tuple[int, ...], list[float]]]:
    """Shapes and entries, sorted: equal for equal collections of matrices."""
    return sorted((tuple(matrix.shape), matrix.flatten().tolist()) for matrix in found)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def stored_backwards(tensor: Tensor) -> Tensor:
    """The same numbers, the first dimension running fastest in memory."""
    dims = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(dims).clone(memory_format=torch.contiguous_format).permute(dims)


# --- reading --------------------------------------------------------------------------------------


@per_cover
def test_tiles_are_the_slices_of_the_matrices(shape: tuple[int, ...], views: Views) -> None:
    weight = numbered(*shape)
    for size in SIZES:
        found = matrices(pieces_of(views, size), weight)
        assert in_order(found) == in_order(expected_matrices(views, size, weight)), size


@per_cover
def test_each_element_is_covered_once(shape: tuple[int, ...], views: Views) -> None:
    for size in SIZES:
        pieces = pieces_of(views, size)
        entries = torch.cat([piece.to_blocks(numbered(*shape)).flatten() for piece in pieces])
        assert entries.sort().values.tolist() == list(range(torch.Size(shape).numel())), size
        assert sum(piece.numel for piece in pieces) == len(entries), size


@pytest.mark.parametrize("size", list(product((1, 2, 3, 7, 8), repeat=2)), ids=str)
def test_every_remainder_is_covered_once(size: Size) -> None:
    for shape in product(LENGTHS, LENGTHS):
        weight = numbered(*shape)
        views = (rows(shape),)
        found = matrices(pieces_of(views, size), weight)
        assert in_order(found) == in_order(expected_matrices(views, size, weight)), shape


@per_cover
def test_shapes_are_what_is_read_and_no_larger_than_asked(
    shape: tuple[int, ...], views: Views
) -> None:
    for size in SIZES:
        for piece in pieces_of(views, size):
            blocks = piece.to_blocks(numbered(*shape))
            assert tuple(blocks.shape) == piece.shape
            assert piece.shape[0] % piece.tiles_per_group == 0
            assert all(found <= asked for found, asked in zip(piece.shape[1:], size, strict=True))


def test_tiles_of_a_group_follow_each_other_row_by_row() -> None:
    """The order of the groups decides which tiles the scope "group" takes together."""
    (piece,) = tile(rows((8, 6), groups=2), 2, 3)
    whole = rows((8, 6), groups=2).to_blocks(numbered(8, 6))
    assert piece.shape == (8, 2, 3)
    assert piece.tiles_per_group == 4
    for index, block in enumerate(piece.to_blocks(numbered(8, 6))):
        group, row, column = index // 4, index // 2 % 2, index % 2
        place = slice(2 * row, 2 * row + 2), slice(3 * column, 3 * column + 3)
        assert torch.equal(block, whole[group][place])


# --- writing --------------------------------------------------------------------------------------


@per_cover
def test_adding_what_was_read_doubles_the_tensor(shape: tuple[int, ...], views: Views) -> None:
    for size in SIZES:
        weight = torch.randn(shape)
        expected = 2 * weight
        for piece in pieces_of(views, size):
            piece.add_from_blocks(weight, piece.to_blocks(weight.clone()), 1.0)
        assert torch.equal(weight, expected), size


@per_cover
@pytest.mark.parametrize("alpha", [-0.5, torch.tensor(-0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("stored", [strided, stored_backwards])
def test_stored_with_other_strides(
    shape: tuple[int, ...],
    views: Views,
    alpha: float | Tensor,
    stored: Callable[[Tensor], Tensor],
) -> None:
    """Gradient, update and weight may each lie in memory as they like."""
    plain, update = torch.randn(shape), torch.randn(shape)
    weight = stored(plain)
    strides = weight.stride()
    for piece in pieces_of(views, (2, 3)):
        blocks = piece.to_blocks(stored(update))
        piece.add_from_blocks(weight, blocks.mT.contiguous().mT, alpha)
    torch.testing.assert_close(weight, plain - 0.5 * update)
    assert weight.stride() == strides


def test_channels_last_kernels_keep_their_layout() -> None:
    plain, update = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    kernel = plain.clone().to(memory_format=torch.channels_last)
    for target in (plain, kernel):
        for piece in tile(rows(target.shape, groups=2), 2, 5):
            piece.add_from_blocks(target, piece.to_blocks(update), -0.1)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernel, plain)


@per_cover
def test_float32_tiles_added_to_a_bfloat16_weight_round_once(
    shape: tuple[int, ...], views: Views
) -> None:
    weight, update = torch.randn(shape).bfloat16(), torch.randn(shape)
    expected = (weight.float() - 1e-2 * update).bfloat16()
    for piece in pieces_of(views, (2, 3)):
        piece.add_from_blocks(weight, piece.to_blocks(update), -1e-2)
    assert torch.equal(weight, expected)


def test_other_tiles_stay_as_they_are() -> None:
    weight = torch.zeros(5, 7)
    full, *_ = tile(rows((5, 7)), 2, 3)
    full.add_from_blocks(weight, torch.ones(full.shape), 1.0)
    assert bool((weight[:4, :6] == 1).all())
    assert weight.sum() == 24


# --- names ----------------------------------------------------------------------------------------


@per_cover
def test_names_are_unique(shape: tuple[int, ...], views: Views) -> None:
    for size in SIZES:
        names = [piece.name for piece in pieces_of(views, size)]
        assert len(set(names)) == len(names), size


@per_cover
def test_a_view_that_one_tile_holds_is_returned_as_it_is(
    shape: tuple[int, ...], views: Views
) -> None:
    for view in views:
        _, blocks, size = view.shape
        for extra in (0, 1, 100):
            (whole,) = tile(view, blocks + extra, size + extra)
            assert whole is view


def test_names_tell_the_size_only_where_there_are_remainders() -> None:
    q, k = fused_rows((10, 4), [("q", 6, 1), ("k", 4, 1)])
    assert [piece.name for piece in tile(q, 3, 2)] == ["q"]
    assert [piece.name for piece in tile(k, 3, 4)] == ["k.3x4", "k.1x4"]
    assert [piece.name for piece in tile(rows((5, 7)), 2, 3)] == ["2x3", "2x1", "1x3", "1x1"]


def test_text_of_tiles() -> None:
    (q,) = tile(fused_rows((6, 4), [("q", 6, 2)])[0], 3, 2)
    assert str(q) == "q: 4 x [3, 2]"
    assert [str(piece) for piece in tile(rows((3, 4)), 2, 4)] == [
        "2x4: 1 x [2, 4]",
        "1x4: 1 x [1, 4]",
    ]
