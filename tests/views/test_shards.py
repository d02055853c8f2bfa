"""Views of row shards: together, and in their places, they are the whole view."""

from __future__ import annotations

import pytest
import torch

from hf_precond.views.shards import chunk_ranges, row_parts
from hf_precond.views.view import (
    ParamView,
    alternating_experts,
    columns,
    experts,
    flat,
    fused_rows,
    heads_in,
    interleaved_rows,
    rows,
)

VIEWS: dict[str, tuple[tuple[int, ...], tuple[ParamView, ...]]] = {
    "linear": ((12, 5), (rows((12, 5)),)),
    "heads": ((12, 5), (rows((12, 5), groups=3),)),
    "fewer rows than ranks": ((3, 5), (rows((3, 5)),)),
    "convolution": ((8, 3, 2, 2), (rows((8, 3, 2, 2), groups=2),)),
    "heads of the input": ((7, 12), (heads_in((7, 12), heads=3),)),
    "fused": ((20, 5), fused_rows((20, 5), [("q", 12, 3), ("k", 4, 1), ("v", 4, 1)])),
    "experts": ((6, 4, 5), experts((6, 4, 5), pieces=[("gate", 2), ("up", 2)])),
    "experts transposed": ((6, 5, 4), experts((6, 5, 4), transposed=True)),
    "alternating experts": ((6, 4, 5), alternating_experts((6, 4, 5), names=["gate", "up"])),
    "interleaved": (
        (24, 5),
        interleaved_rows((24, 5), heads=4, names="qkv", per_head=True),
    ),
    "interleaved whole": (
        (24, 5),
        interleaved_rows((24, 5), heads=4, names="qkv", per_head=False),
    ),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("case", VIEWS)
def test_the_parts_of_all_ranks_are_the_view(case: str, ranks: int) -> None:
    shape, views = VIEWS[case]
    ranges = chunk_ranges(shape[0], ranks)
    whole = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)
    for view in views:
        found = row_parts(view, shape, ranges)
        if case.startswith("interleaved") and any(row % 6 for pair in ranges for row in pair):
            assert found is None
            continue
        assert found is not None
        blocks = torch.zeros(view.shape)
        for parts, (start, stop) in zip(found, ranges, strict=True):
            assert len(parts) <= 3
            for part in parts:
                place = blocks[slice(*part.groups), slice(*part.rows)]
                assert not place.any(), "no block is on two ranks"
                place.copy_(part.view.to_blocks(whole[start:stop]))
        assert torch.equal(blocks, view.to_blocks(whole))


@pytest.mark.parametrize(
    "view",
    [columns((12, 6)), columns((12, 6), groups=2), heads_in((12, 6), heads=3, transposed=True)],
    ids=["columns", "columns per head", "input heads transposed"],
)
def test_rows_that_are_no_blocks_are_none(view: ParamView) -> None:
    # In the last one a row is an entry of each block of one head.
    assert row_parts(view, (12, 6), chunk_ranges(12, 2)) is None


def test_a_flat_view_has_no_rows() -> None:
    assert row_parts(flat((4, 3)), (4, 3), chunk_ranges(4, 2)) is None


@pytest.mark.parametrize(("length", "parts"), [(10, 4), (3, 4), (8, 4), (0, 2), (5, 1)])
def test_chunk_ranges_are_those_of_torch(length: int, parts: int) -> None:
    sizes = [len(chunk) for chunk in torch.arange(length).chunk(parts)] if length else []
    found = [stop - start for start, stop in chunk_ranges(length, parts)]
    assert found == sizes + [0] * (parts - len(sizes))
