"""Windows into parameters: what they read, what they write, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_precond.views.view import (
    ParamView,
    alternating_experts,
    check_cover,
    columns,
    experts,
    flat,
    fused_rows,
    heads_in,
    interleaved_rows,
    rows,
)

Views = tuple[ParamView, ...]

COVERS: dict[str, tuple[tuple[int, ...], Views]] = {
    "linear": ((6, 4), (rows((6, 4)),)),
    "heads": ((6, 4), (rows((6, 4), groups=3),)),
    "convolution": ((6, 2, 3, 3), (rows((6, 2, 3, 3), groups=2),)),
    "conv1d": ((4, 6), (columns((4, 6)),)),
    "conv1d-heads": ((4, 6), (columns((4, 6), groups=3),)),
    "output": ((4, 6), (heads_in((4, 6), heads=3),)),
    "output-conv1d": ((6, 4), (heads_in((6, 4), heads=3, transposed=True),)),
    "fused": ((10, 4), fused_rows((10, 4), [("q", 6, 3), ("k", 2, 1), ("v", 2, 1)])),
    "fused-conv1d": (
        (4, 10),
        fused_rows((4, 10), [("q", 6, 3), ("k", 2, 1), ("v", 2, 1)], transposed=True),
    ),
    "interleaved": (
        (18, 4),
        interleaved_rows((18, 4), heads=2, names="qkv", per_head=True),
    ),
    "interleaved-whole": (
        (18, 4),
        interleaved_rows((18, 4), heads=2, names="qkv", per_head=False),
    ),
    "interleaved-grouped": (
        (20, 4),
        interleaved_rows((20, 4), heads=2, names="qkv", counts=(3, 1, 1), per_head=True),
    ),
    "interleaved-conv1d": (
        (4, 20),
        interleaved_rows(
            (4, 20), heads=2, names="qkv", counts=(3, 1, 1), per_head=True, transposed=True
        ),
    ),
    "experts": ((3, 4, 5), experts((3, 4, 5))),
    "experts-fused": ((3, 4, 5), experts((3, 4, 5), pieces=[("gate", 2), ("up", 2)])),
    "experts-transposed": (
        (3, 5, 4),
        experts((3, 5, 4), transposed=True, pieces=[("gate", 2), ("up", 2)]),
    ),
    "experts-alternating": ((3, 4, 5), alternating_experts((3, 4, 5), names=("gate", "up"))),
    "experts-alternating-transposed": (
        (3, 5, 4),
        alternating_experts((3, 5, 4), names=("gate", "up"), transposed=True),
    ),
    "flat": ((2, 3, 4), (flat((2, 3, 4)),)),
    "scalar": ((), (flat(()),)),
}

per_cover = pytest.mark.parametrize(("shape", "views"), COVERS.values(), ids=COVERS)


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def blocks_of(name: str) -> list[Tensor]:
    shape, views = COVERS[name]
    return [view.to_blocks(numbered(*shape)) for view in views]


def as_linear(shape: tuple[int, ...]) -> Tensor:
    """Numbers of the transposed layer's weight, in the storage order of a linear layer."""
    return numbered(*shape).transpose(-1, -2)


@per_cover
def test_plain_form_round_trip(shape: tuple[int, ...], views: Views) -> None:
    for view in views:
        plain = json.loads(json.dumps(view.to_plain()))
        assert ParamView.from_plain(plain) == view
        assert hash(ParamView.from_plain(plain)) == hash(view)


@per_cover
def test_blocks_written_back_rebuild_the_tensor(shape: tuple[int, ...], views: Views) -> None:
    check_cover(views, shape)
    source, target = torch.randn(shape), torch.full(shape, torch.nan)
    for view in views:
        blocks = view.to_blocks(source)
        assert blocks.shape == view.shape
        assert blocks.numel() == view.numel
        view.copy_from_blocks(target, blocks)
    assert torch.equal(target, source)


@per_cover
def test_strided_blocks_and_tensors(shape: tuple[int, ...], views: Views) -> None:
    """Gradients may be strided, directions may come out of a transposed product."""
    source, target = torch.randn(shape), torch.zeros(shape)
    strided = torch.stack([source, source], dim=-1)[..., 0]
    for view in views:
        blocks = view.to_blocks(strided)
        view.copy_from_blocks(target, blocks.mT.contiguous().mT)
    assert torch.equal(target, source)


@per_cover
@pytest.mark.parametrize("alpha", [-0.5, torch.tensor(-0.5)])
def test_add_from_blocks(shape: tuple[int, ...], views: Views, alpha: float | Tensor) -> None:
    target, update = torch.randn(shape), torch.randn(shape)
    expected = target - 0.5 * update
    for view in views:
        view.add_from_blocks(target, view.to_blocks(update), alpha)
    torch.testing.assert_close(target, expected)


def test_adding_float32_blocks_to_a_bfloat16_weight_rounds_once() -> None:
    target = torch.ones(2, 3, dtype=torch.bfloat16)
    rows((2, 3)).add_from_blocks(target, torch.full((1, 2, 3), 0.25), torch.tensor(0.5))
    assert torch.equal(target, torch.full((2, 3), 1.125, dtype=torch.bfloat16))


@per_cover
def test_window_shares_storage(shape: tuple[int, ...], views: Views) -> None:
    tensor = torch.zeros(shape)
    for view in views:
        view.window(tensor).fill_(1.0)
    assert bool((tensor == 1).all())


def test_rows_of_heads_are_slices() -> None:
    (blocks,) = blocks_of("heads")
    assert torch.equal(blocks[1], numbered(6, 4)[2:4])


def test_grouped_convolution_blocks_are_output_channels() -> None:
    (blocks,) = blocks_of("convolution")
    assert blocks.shape == (2, 3, 18)
    assert torch.equal(blocks[1, 2], numbered(6, 2, 3, 3)[5].flatten())


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_conv1d_is_the_transposed_linear(groups: int) -> None:
    weight = torch.randn(4, 6)
    transposed = columns((4, 6), groups=groups).to_blocks(weight)
    assert torch.equal(transposed, rows((6, 4), groups=groups).to_blocks(weight.T.contiguous()))


SHARED: dict[str, Any] = {"heads": 1, "names": "qk", "counts": (2, 1), "per_head": True}
FUSED = (("q", 4, 2), ("k", 2, 1))


@pytest.mark.parametrize(
    ("shape", "plain", "transposed"),
    [
        (
            (4, 6),
            (heads_in((4, 6), heads=3),),
            (heads_in((6, 4), heads=3, transposed=True),),
        ),
        ((6, 4), fused_rows((6, 4), FUSED), fused_rows((4, 6), FUSED, transposed=True)),
        (
            (6, 4),
            interleaved_rows((6, 4), **SHARED),
            interleaved_rows((4, 6), transposed=True, **SHARED),
        ),
    ],
)
def test_transposed_views_equal_plain_views(
    shape: tuple[int, int], plain: Views, transposed: Views
) -> None:
    weight = torch.randn(shape)
    other = weight.T.contiguous()
    for first, second in zip(plain, transposed, strict=True):
        assert torch.equal(first.to_blocks(weight), second.to_blocks(other))


def test_output_heads_are_column_slices() -> None:
    (blocks,) = blocks_of("output")
    assert torch.equal(blocks[1], numbered(4, 6)[:, 2:4])


def test_fused_pieces_are_slices() -> None:
    q, k, v = blocks_of("fused")
    weight = numbered(10, 4)
    assert torch.equal(q.flatten(0, 1), weight[:6])
    assert torch.equal(k[0], weight[6:8])
    assert torch.equal(v[0], weight[8:])


def test_interleaved_pieces_alternate_per_head() -> None:
    q, k, v = blocks_of("interleaved")
    weight = numbered(18, 4)
    assert torch.equal(q[1], weight[9:12])
    assert torch.equal(k[1], weight[12:15])
    assert torch.equal(v[0], weight[6:9])
    for head, whole in zip((q, k, v), blocks_of("interleaved-whole"), strict=True):
        assert torch.equal(head.flatten(0, 1), whole[0])


def test_interleaved_pieces_with_shared_key_heads() -> None:
    q, k, v = blocks_of("interleaved-grouped")
    weight = numbered(20, 4).view(10, 2, 4)
    assert torch.equal(q, weight[[0, 1, 2, 5, 6, 7]])
    assert torch.equal(k, weight[[3, 8]])
    assert torch.equal(v, weight[[4, 9]])


def test_expert_pieces() -> None:
    weight = numbered(3, 4, 5)
    gate, up = blocks_of("experts-fused")
    assert torch.equal(gate, weight[:, :2])
    assert torch.equal(up, weight[:, 2:])
    gate, up = blocks_of("experts-alternating")
    assert torch.equal(gate, weight[:, ::2])
    assert torch.equal(up, weight[:, 1::2])
    gate, up = blocks_of("experts-alternating-transposed")
    assert torch.equal(up, as_linear((3, 5, 4))[:, 1::2])


def test_splitting_equals_separate_parameters() -> None:
    """A fused weight's pieces are the tensors that separate layers would have had."""
    layers = [nn.Linear(4, size) for size in (6, 2, 2)]
    fused = torch.cat([layer.weight for layer in layers])
    for view, layer, heads in zip(COVERS["fused"][1], layers, (3, 1, 1), strict=True):
        own = rows(layer.weight.shape, groups=heads)
        assert torch.equal(view.to_blocks(fused), own.to_blocks(layer.weight))


LEFT = ParamView(
    name="left", split=(4, 2, 3), narrows=((1, 0, 1),), order=(1, 0, 2), shape=(1, 4, 3)
)
RIGHT = ParamView(
    name="right",
    split=(2, 2, 2, 3),
    narrows=((2, 1, 1),),
    order=(0, 2, 1, 3),
    shape=(2, 2, 3),
)


def test_windows_of_different_splits_may_cover_together() -> None:
    check_cover([LEFT, RIGHT], (4, 6))


@pytest.mark.parametrize(
    ("shape", "views", "message"),
    [
        ((6, 4), [rows((6, 4)), rows((6, 4))], "cover some elements more than once"),
        ((10, 4), COVERS["fused"][1][:2], "cover 32 of 40 elements"),
        ((6, 4), [rows((6, 4)), columns((6, 4))], "leave 0 .* cover 24 more than once"),
        ((4, 6), [LEFT, rows((4, 6))], "leave 0 elements out and cover 12 more than once"),
        ((4, 12), [LEFT, RIGHT], "have a split of another size"),
        ((5, 4), [rows((6, 4))], "have a split of another size"),
        ((4, 6), [LEFT], "cover 12 of 24 elements"),
    ],
)
def test_wrong_covers_raise(
    shape: tuple[int, ...], views: Sequence[ParamView], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_cover(views, shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": (0, 0)}, "not a permutation"),
        ({"order": (0,)}, "not a permutation"),
        ({"narrows": ((2, 0, 1),)}, "bad narrow"),
        ({"narrows": ((0, -1, 1),)}, "bad narrow"),
        ({"narrows": ((0, 0, 0),)}, "bad narrow"),
        ({"narrows": ((0, 5, 2),)}, "leaves split"),
        ({"narrows": ((0, 0, 3), (0, 0, 3))}, "repeat a dimension"),
        ({"shape": (1, 6, 5)}, "does not fill"),
    ],
)
def test_steps_that_do_not_fit_raise(changes: dict[str, Any], message: str) -> None:
    steps: dict[str, Any] = {"name": "q", "split": (6, 4), "order": (0, 1), "shape": (1, 6, 4)}
    with pytest.raises(ValueError, match=message) as caught:
        ParamView(**{**steps, **changes})
    assert "'q'" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rows((6, 4), groups=4), "groups = 4 does not divide 6"),
        (lambda: columns((4, 6), groups=0), "groups = 0 does not divide 6"),
        (lambda: heads_in((4, 6), heads=5), "heads = 5 does not divide 6"),
        (lambda: fused_rows((6, 4), [("q", 4, 2)]), "do not add up to the output size 6"),
        (lambda: fused_rows((6, 4), [("q", 6, 4)]), "groups of 'q' = 4 does not divide 6"),
        (
            lambda: interleaved_rows((6, 4), heads=2, names="qk", per_head=True),
            "pieces = 4 does not divide 6",
        ),
        (
            lambda: interleaved_rows((6, 4), heads=1, names="qkv", counts=(1, 1), per_head=True),
            "zip",
        ),
        (lambda: experts((3, 4, 5), pieces=[("gate", 3)]), "do not add up to the output size 4"),
        (
            lambda: alternating_experts((3, 5, 4), names=("gate", "up")),
            "pieces = 2 does not divide 5",
        ),
    ],
)
def test_sizes_that_do_not_fit_raise(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_text_of_a_view() -> None:
    assert [str(view) for view in COVERS["fused"][1]] == [
        "q: 3 x [2, 4]",
        "k: 1 x [2, 4]",
        "v: 1 x [2, 4]",
    ]
    assert str(rows((6, 4))) == "1 x [6, 4]"


def test_adding_to_a_channels_last_kernel() -> None:
    plain = torch.randn(4, 3, 2, 2)
    kernel = plain.clone().to(memory_format=torch.channels_last)
    view, update = rows((4, 3, 2, 2)), torch.randn(1, 4, 12)
    for target in (plain, kernel):
        view.add_from_blocks(target, update, -0.5)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernel, plain)


def test_adding_to_bfloat16_rounds_once() -> None:
    weight, update = torch.randn(3, 5).bfloat16(), torch.randn(1, 3, 5)
    expected = (weight.float() - 1e-2 * update[0]).bfloat16()
    rows((3, 5)).add_from_blocks(weight, update, -1e-2)
    assert torch.equal(weight, expected)
