"""What views make of a layer's inputs and outputs: the same as of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_precond.optim.layer_columns import LayerColumns
from hf_precond.optim.layout import buckets_of, placed_views
from hf_precond.preconditioners.base import layer_needs
from hf_precond.registry import param_groups, resolve
from hf_precond.statistics.layers import layer_layouts, with_known_layers, without_layer
from hf_precond.views.joint import Joint
from hf_precond.views.positions import WeightLayout, positions
from hf_precond.views.rules import (
    Assignment,
    ParamInfo,
    assign_all,
    fallback,
    vector_rule,
)
from hf_precond.views.tiles import Tiles, tile
from hf_precond.views.view import (
    ParamView,
    columns,
    flat,
    fused_rows,
    heads_in,
    interleaved_rows,
    rows,
)
from tests.statistics.capturing import assert_close, capture

Views = tuple[ParamView | Tiles, ...]
Case = tuple[Callable[[], nn.Module], tuple[int, ...], Views]

LINEAR, TRANSPOSED = (lambda: nn.Linear(6, 20)), (lambda: Conv1D(20, 6))
PIECES = [("q", 12, 3), ("k", 4, 1), ("v", 4, 1)]
TALL = {"heads": 2, "names": "qkv", "counts": (3, 1, 1)}

CASES: dict[str, Case] = {
    "rows": (LINEAR, (3, 2, 6), (rows((20, 6)),)),
    "heads": (LINEAR, (3, 2, 6), (rows((20, 6), groups=4),)),
    "heads-in": (LINEAR, (3, 2, 6), (heads_in((20, 6), heads=3),)),
    "fused": (LINEAR, (3, 2, 6), fused_rows((20, 6), PIECES)),
    "interleaved": (LINEAR, (3, 2, 6), interleaved_rows((20, 6), per_head=True, **TALL)),
    "interleaved-whole": (LINEAR, (3, 2, 6), interleaved_rows((20, 6), per_head=False, **TALL)),
    "tiles": (LINEAR, (3, 2, 6), tile(rows((20, 6), groups=2), 4, 4)),
    "tiles-of-heads-in": (LINEAR, (3, 2, 6), tile(heads_in((20, 6), heads=2), 8, 2)),
    "columns": (TRANSPOSED, (3, 2, 6), (columns((6, 20)),)),
    "heads-transposed": (TRANSPOSED, (3, 2, 6), (columns((6, 20), groups=4),)),
    "heads-in-transposed": (
        TRANSPOSED,
        (3, 2, 6),
        (heads_in((6, 20), heads=3, transposed=True),),
    ),
    "fused-transposed": (TRANSPOSED, (3, 2, 6), fused_rows((6, 20), PIECES, transposed=True)),
    "interleaved-transposed": (
        TRANSPOSED,
        (3, 2, 6),
        interleaved_rows((6, 20), per_head=True, transposed=True, **TALL),
    ),
    "tiles-transposed": (TRANSPOSED, (3, 2, 6), tile(columns((6, 20)), 7, 5)),
    "convolution": (lambda: nn.Conv2d(2, 4, 3), (2, 2, 4, 5), (rows((4, 2, 3, 3)),)),
    "convolution-groups": (
        lambda: nn.Conv2d(6, 4, 3, groups=2),
        (2, 6, 4, 5),
        (rows((4, 3, 3, 3), groups=2),),
    ),
    "convolution-finer-groups": (
        lambda: nn.Conv1d(6, 8, 2, groups=2),
        (2, 6, 4),
        (rows((8, 3, 2), groups=4),),
    ),
    "convolution-tiles": (
        lambda: nn.Conv2d(6, 4, 2, groups=2),
        (2, 6, 4, 5),
        tile(rows((4, 3, 2, 2), groups=2), 2, 5),
    ),
}
per_case = pytest.mark.parametrize(("make", "shape", "views"), CASES.values(), ids=CASES)


@per_case
def test_each_group_has_its_part_of_the_gradient(
    make: Callable[[], nn.Module], shape: tuple[int, ...], views: Views
) -> None:
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    seen = capture(layer, [lambda: layer(x).sin().sum()])["weight"]
    layout = WeightLayout(transposed=isinstance(layer, Conv1D), groups=getattr(layer, "groups", 1))
    for view in views:
        found = positions(view, layout, layer.weight.shape)
        assert found is not None
        cut = torch.einsum(
            "nsgm,nsgb->gmb", seen.outputs[..., found.outputs], seen.inputs[..., found.inputs]
        )
        assert_close(cut, view.to_blocks(layer.weight.grad))


def views_rule(views: Sequence[ParamView]) -> Any:
    """A rule that gives these views to all weights."""

    def rule(info: ParamInfo) -> Assignment | None:
        return Assignment(views=tuple(views), reason="as given") if info.param.ndim > 1 else None

    return rule


WHOLE = {key: case for key, case in CASES.items() if isinstance(case[2][0], ParamView)}


@pytest.mark.parametrize(("make", "shape", "views"), WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("name", ["kfac", "ng_plus_per_sample"])
def test_columns_of_a_slot_make_its_gradient(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], views: tuple[ParamView, ...]
) -> None:
    """Through the optimizer's own layout: with the bias as a column, and cut into tiles."""
    layer = make().double()
    options = {"block_size": 3} if name == "ng_plus_per_sample" else {}
    recipe = resolve(name, options)
    groups = param_groups(layer, recipe, rules=(views_rule(views), vector_rule))
    for group in groups:
        group["param_names"] = [param_name for param_name, _ in group["params"]]
        group["params"] = [param for _, param in group["params"]]
    needs = layer_needs(recipe.algorithm)
    assert needs is not None
    source = LayerColumns(layer, groups, needs, dtype=torch.float64)
    source.arm({0: 1})
    layer(torch.randn(shape, dtype=torch.float64)).sin().sum().backward()
    source.collect(1.0)
    params = [param for group in groups for param in group["params"]]
    gradients = {index: param.grad for index, param in enumerate(params)}
    joint = whole = 0
    buckets = buckets_of(placed_views(groups, recipe.algorithm), params, max_elements=1000)
    for slot in (slot for bucket in buckets if bucket.key.role == "main" for slot in bucket.slots):
        found = source.columns(slot, gradients)
        assert found is not None
        assert found.complete
        cut = torch.einsum("gnsm,gnsb->gmb", found.outputs, found.inputs)
        assert_close(cut, slot.to_blocks(gradients))
        whole += slot.view.numel
        joint += isinstance(slot.view, Joint)
    repeated = views[0].name == "" and views[0].shape[1] == 20 and views[0].shape[0] == 3
    assert joint == (0 if name != "kfac" or repeated else len(views))
    assert whole == layer.weight.numel() + (layer.bias.numel() if joint else 0)


@pytest.mark.parametrize(
    ("view", "layout", "shape"),
    [
        (columns((4, 6)), WeightLayout(), (4, 6)),
        (rows((4, 6)), WeightLayout(transposed=True), (4, 6)),
        (flat((4, 6)), WeightLayout(), (4, 6)),
        (rows((4, 3, 2)), WeightLayout(groups=2), (4, 3, 2)),
        (heads_in((4, 6), heads=2), WeightLayout(transposed=True), (4, 6)),
        # Half a row of outputs each: a matrix that takes several outputs side by side.
        (
            ParamView(split=(2, 2, 6), order=(0, 1, 2), shape=(1, 2, 12)),
            WeightLayout(),
            (4, 6),
        ),
    ],
)
def test_a_view_that_mixes_has_no_positions(
    view: ParamView, layout: WeightLayout, shape: tuple[int, ...]
) -> None:
    assert positions(view, layout, shape) is None


def test_a_view_that_mixes_is_an_error_with_the_name() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    rules = (views_rule([columns((4, 6))]), vector_rule)
    with pytest.raises(ValueError, match=r"'0\.weight'.*mixes outputs and inputs"):
        param_groups(model, resolve("kfac"), rules=rules)


def test_layouts_come_back_from_plain_values() -> None:
    layout = WeightLayout(transposed=True, groups=3, bias="h.0.bias")
    assert WeightLayout.from_plain(layout.to_plain()) == layout
    assert layout.num_outputs((4, 6)) == 6
    assert WeightLayout().num_outputs((4, 6)) == 4


def test_only_a_trained_bias_is_in_the_layout() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].bias.requires_grad_(False)
    assigned = assign_all(model)
    layouts = dict(zip([info.name for info, _ in assigned], layer_layouts(assigned), strict=True))
    assert layouts == {
        "0.weight": WeightLayout(bias="0.bias").to_plain(),
        "0.bias": [],
        "1.weight": WeightLayout().to_plain(),
        "2.weight": WeightLayout().to_plain(),
    }


def test_a_shared_bias_is_not_trained_with_one_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    assigned = assign_all(model, (vector_rule, views_rule([rows((4, 4))])))
    assert all(not layout or layout[2] == "" for layout in layer_layouts(assigned))


def test_what_has_no_known_layer_follows_the_fallback() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 4),
            "embedding": nn.Embedding(5, 4),
            "transposed": nn.ConvTranspose1d(2, 3, 2),
            "tied": nn.Linear(4, 4),
            "partner": nn.Linear(4, 4),
        }
    )
    model["partner"].weight = model["tied"].weight
    # Views as they follow from shapes alone, where nobody knows of layers.
    assigned = [
        (info, Assignment(views=(rows(info.param.shape),), reason="shape"))
        for info, _ in assign_all(model)
        if info.param.ndim > 1
    ]
    found = {info.name: assignment for info, assignment in with_known_layers(assigned)}
    assert found["linear.weight"].reason == "shape"
    assert found["embedding.weight"] == fallback("no layer input known for Embedding")
    assert found["transposed.weight"] == fallback("no layer input known for ConvTranspose1d")
    assert found["tied.weight"] == fallback("tied: no single layer's input")
    known = [info.name for info, _ in assigned if not without_layer(info)]
    assert known == ["linear.weight"]


# -- a weight and its bias as one matrix --


def joint_of(view: ParamView, layout: WeightLayout, shape: tuple[int, ...]) -> Joint:
    found = positions(view, layout, shape)
    assert found is not None
    return Joint(base=view, outputs=found.outputs)


JOINT = {
    "rows": (rows((6, 4)), WeightLayout(), (6, 4)),
    "heads": (rows((6, 4), groups=3), WeightLayout(), (6, 4)),
    "columns": (columns((4, 6), groups=2), WeightLayout(transposed=True), (4, 6)),
    "interleaved": (
        interleaved_rows((6, 4), heads=3, names="kv", per_head=True)[1],
        WeightLayout(),
        (6, 4),
    ),
    "fused-transposed": (
        fused_rows((4, 6), [("q", 4, 2), ("v", 2, 1)], transposed=True)[0],
        WeightLayout(transposed=True),
        (4, 6),
    ),
    "convolution": (rows((6, 2, 2), groups=2), WeightLayout(groups=2), (6, 2, 2)),
}
per_joint = pytest.mark.parametrize(("view", "layout", "shape"), JOINT.values(), ids=JOINT)


@per_joint
def test_joint_reads_and_writes_weight_and_bias(
    view: ParamView, layout: WeightLayout, shape: tuple[int, ...]
) -> None:
    joint = joint_of(view, layout, shape)
    weight, bias = torch.randn(shape), torch.randn(layout.num_outputs(shape))
    blocks = joint.to_blocks(weight, bias)
    assert blocks.shape == joint.shape
    assert blocks.numel() == joint.numel
    assert torch.equal(blocks[..., :-1], view.to_blocks(weight))
    new_weight, new_bias = torch.zeros(shape), torch.zeros_like(bias)
    joint.add_from_blocks(new_weight, new_bias, blocks, (2.0, torch.tensor(3.0)))
    assert torch.equal(view.to_blocks(new_weight), 2 * view.to_blocks(weight))
    covered = joint.outputs.flatten()
    assert torch.equal(new_bias[covered], 3 * bias[covered])
    rest = [index for index in range(len(bias)) if index not in covered.tolist()]
    assert new_bias[rest].eq(0).all()
    assert new_weight.count_nonzero() == view.numel


@per_joint
def test_joint_rounds_once(view: ParamView, layout: WeightLayout, shape: tuple[int, ...]) -> None:
    joint = joint_of(view, layout, shape)
    weight = torch.randn(shape).bfloat16()
    bias = torch.randn(layout.num_outputs(shape)).bfloat16()
    blocks = torch.randn(joint.shape)
    expected = joint.to_blocks(weight.float(), bias.float()).add(blocks, alpha=-0.1).bfloat16()
    joint.add_from_blocks(weight, bias, blocks, (-0.1, -0.1))
    assert torch.equal(joint.to_blocks(weight, bias), expected)
