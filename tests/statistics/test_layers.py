"""Every kind of layer in the weight-sharing format: output gradients times inputs is the gradient.

The references are autograd's own gradients, ``F.unfold``, and the dense capture by probes of
:mod:`tests.reference.layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_precond.statistics.captured import Captured
from hf_precond.statistics.layers import layer_kind, patches
from hf_precond.views.positions import WeightLayout, positions
from hf_precond.views.view import columns, rows
from tests.reference import layers as reference
from tests.statistics.capturing import assert_close, capture, product

Case = tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int]]

# Layer, shape of its input, expected (samples, positions).
LINEAR: dict[str, Case] = {
    "1d": (lambda: nn.Linear(5, 4), (5,), (1, 1)),
    "2d": (lambda: nn.Linear(5, 4), (3, 5), (3, 1)),
    "3d": (lambda: nn.Linear(5, 4), (3, 2, 5), (3, 2)),
    "4d": (lambda: nn.Linear(5, 4), (3, 2, 4, 5), (3, 8)),
    "no-bias": (lambda: nn.Linear(5, 4, bias=False), (3, 2, 5), (3, 2)),
    "conv1d-2d": (lambda: Conv1D(4, 5), (3, 5), (3, 1)),
    "conv1d-3d": (lambda: Conv1D(4, 5), (3, 2, 5), (3, 2)),
}


def conv(dims: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: kind(*args, **options)


CONVOLUTIONS: dict[str, Case] = {
    "1d": (conv(1, 2, 4, 3), (3, 2, 7), (3, 5)),
    "1d-all": (conv(1, 4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (3, 4, 9), (3, 5)),
    "1d-unbatched": (conv(1, 2, 4, 3, padding=1), (2, 7), (1, 7)),
    "1d-same": (conv(1, 2, 4, 4, padding="same"), (3, 2, 7), (3, 7)),
    "1d-same-dilated": (conv(1, 2, 4, 4, padding="same", dilation=3), (3, 2, 9), (3, 9)),
    "1d-circular": (conv(1, 2, 4, 3, padding=2, padding_mode="circular"), (3, 2, 5), (3, 7)),
    "2d": (conv(2, 2, 4, 3), (3, 2, 5, 6), (3, 12)),
    "2d-no-bias": (conv(2, 2, 4, 3, bias=False), (3, 2, 5, 6), (3, 12)),
    "2d-uneven": (
        conv(2, 2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (3, 2, 5, 6),
        (3, 3 * 8),
    ),
    "2d-groups": (conv(2, 6, 4, 3, padding=1, groups=2), (2, 6, 4, 4), (2, 16)),
    "2d-valid": (conv(2, 2, 4, 3, padding="valid"), (3, 2, 5, 5), (3, 9)),
    "2d-same": (conv(2, 2, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 2, 6, 5), (2, 30)),
    "2d-reflect": (conv(2, 2, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 2, 4, 4), (2, 24)),
    "2d-replicate": (conv(2, 2, 4, 3, padding=1, padding_mode="replicate"), (2, 2, 4, 4), (2, 16)),
    "2d-same-circular": (
        conv(2, 2, 4, 2, padding="same", padding_mode="circular"),
        (2, 2, 4, 4),
        (2, 16),
    ),
    "2d-unbatched": (conv(2, 2, 4, 3, stride=2), (2, 5, 5), (1, 4)),
    "3d": (conv(3, 2, 4, 2, stride=(1, 2, 1), padding=1), (2, 2, 3, 4, 3), (2, 4 * 3 * 4)),
    "3d-reflect": (
        conv(3, 2, 4, 3, padding=1, padding_mode="reflect"),
        (2, 2, 3, 3, 3),
        (2, 27),
    ),
    "3d-unbatched": (conv(3, 2, 4, 2), (2, 3, 3, 3), (1, 8)),
    "3d-groups": (conv(3, 4, 6, 2, groups=2, dilation=2), (2, 4, 4, 3, 3), (2, 2)),
}

ALL = {f"linear-{key}": case for key, case in LINEAR.items()}
ALL |= {f"conv-{key}": case for key, case in CONVOLUTIONS.items()}
# Torch itself warns that an even kernel with padding "same" needs a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
per_layer = pytest.mark.parametrize(("make", "shape", "expected"), ALL.values(), ids=ALL)


def used(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Captured]:
    """A layer under a loss that weighs every output differently, and what was captured of it."""
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)

    def loss() -> Tensor:
        y = layer(x)
        return (y.sin() * torch.randn_like(y)).sum()

    return layer, capture(layer, [loss], by_sample=True)["weight"]


@per_layer
def test_outputs_times_inputs_is_the_gradient(
    make: Callable[[], nn.Module], shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    layer, seen = used(make, shape)
    assert seen.inputs.shape[:2] == seen.outputs.shape[:2] == seen.valid.shape == expected
    assert seen.complete
    transposed, groups = isinstance(layer, Conv1D), getattr(layer, "groups", 1)
    weight = layer.weight
    view = columns(weight.shape) if transposed else rows(weight.shape, groups=groups)
    found = positions(view, WeightLayout(transposed=transposed, groups=groups), weight.shape)
    assert found is not None
    cut = torch.einsum(
        "nsgm,nsgb->gmb", seen.outputs[..., found.outputs], seen.inputs[..., found.inputs]
    )
    assert_close(cut, view.to_blocks(weight.grad))
    if groups == 1:
        gradient = weight.grad.T if transposed else weight.grad.flatten(1)
        assert_close(product(seen), gradient)


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [case for key, case in ALL.items() if not key.endswith("no-bias")],
    ids=[key for key in ALL if not key.endswith("no-bias")],
)
def test_outputs_times_valid_is_the_gradient_of_the_bias(
    make: Callable[[], nn.Module], shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    layer, seen = used(make, shape)
    assert_close(torch.einsum("nsm,ns->m", seen.outputs, seen.valid), layer.bias.grad)


@per_layer
def test_scaling_takes_the_number_of_positions_out(
    make: Callable[[], nn.Module], shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    _, seen = used(make, shape)
    total = expected[0] * expected[1]
    assert seen.total == total
    assert_close(seen.valid, torch.full(expected, total**-0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"kernel_size": 2, "stride": 3, "padding": 1},
    ],
)
def test_patches_are_those_of_unfold(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(3, 4, **options).double()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    assert torch.equal(patches(layer, x), F.unfold(x, **options).mT)


def test_keyword_input() -> None:
    layer = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    seen = capture(layer, [lambda: layer(input=x).square().sum()])["weight"]
    assert_close(product(seen), layer.weight.grad)


@pytest.mark.parametrize(
    "case", [reference.tiny_mlp, reference.tiny_gpt2_block, reference.tiny_conv_net]
)
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("by_sample", [False, True])
def test_equals_capture_by_probes(
    case: Callable[[], reference.Case], accumulated: int, by_sample: bool
) -> None:
    model, loss, batches = case()
    batches = batches[:accumulated]
    expected = reference.capture(model, loss, batches)
    found = capture(
        model,
        [lambda batch=batch: loss(model, batch) / accumulated for batch in batches],
        by_sample=by_sample,
    )
    assert found.keys() == {f"{name}.weight" for name in expected}
    for name, record in expected.items():
        seen, columns_of_layer = found[f"{name}.weight"], record.columns()
        inputs = seen.inputs
        if record.module.bias is not None:
            inputs = torch.cat([inputs, seen.valid.unsqueeze(-1)], -1)
        for mine, theirs in (
            (inputs, columns_of_layer.inputs),
            (seen.outputs, columns_of_layer.outputs),
        ):
            assert_close(mine, theirs if by_sample else theirs.flatten(0, 1).unsqueeze(1))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(3, 4),
        nn.LayerNorm(3),
        nn.ConvTranspose2d(2, 3, 3),
        nn.Bilinear(2, 3, 4),
        nn.MultiheadAttention(4, 2).out_proj,
    ],
)
def test_other_kinds_are_not_known(layer: nn.Module) -> None:
    assert layer_kind(layer) is None
