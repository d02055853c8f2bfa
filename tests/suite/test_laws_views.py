"""Laws about views: how a tensor is stored and stacked never changes how it is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_precond.preconditioners.base import layer_needs
from hf_precond.views.view import ParamView, columns, fused_rows, heads_in, interleaved_rows, rows
from tests.suite.building import (
    assert_same,
    build,
    group,
    parameter,
    params_of,
    random_grads,
    run,
)

TOLERANCE = 1e-11  # other stacks, other order of summation
STEPS = range(1, 7)
# Each view, or each group, is grafted as if it were a parameter.
BY_VIEW = {"graft": "adam", "graft_scope": "view"}
BY_GROUP = {"graft": "adam", "graft_scope": "group"}


class Conv1D(nn.Module):
    """GPT-2's linear layer, which stores its weight transposed; known by its class name."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def run_split(
    name: str,
    whole: nn.Parameter,
    views: list[ParamView],
    pieces: list[Tensor],
    **options: Any,
) -> None:
    """Trains ``whole`` through ``views`` and its pieces as parameters; both must end alike.

    Args:
        pieces: for every group of every view, in order, element indices into the flat whole.
    """
    separate = [nn.Parameter(whole.detach().flatten()[index]) for index in pieces]
    together = build(name, [group([whole], [views])], **options)
    apart = build(name, [group(separate, [[rows(piece.shape)] for piece in separate])], **options)
    grads = [random_grads([whole], step)[0] for step in STEPS]
    run(together, STEPS, lambda params, step: [grads[step - 1]])
    run(apart, STEPS, lambda params, step: [grads[step - 1].flatten()[index] for index in pieces])
    assert_same([whole.detach().flatten()[index] for index in pieces], separate, TOLERANCE)


def indices(*shape: int) -> Tensor:
    """The flat position of every element of a tensor."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def test_stacked_equals_per_parameter(name: str) -> None:
    shapes = [(5, 6), (4, 6), (5, 6), (5,), (5, 6), (4, 6)]
    stacked = build(name, [parameter(*shape, seed=i) for i, shape in enumerate(shapes)])
    alone = [build(name, [parameter(*shape, seed=i)]) for i, shape in enumerate(shapes)]
    grads = {step: random_grads(params_of(stacked), step) for step in STEPS}
    together = run(stacked, STEPS, lambda params, step: grads[step])
    apart = [
        run(optimizer, STEPS, lambda params, step, i=i: [grads[step][i]])[0]
        for i, optimizer in enumerate(alone)
    ]
    assert_same(together, apart, TOLERANCE)


def test_bucket_size_changes_nothing(name: str) -> None:
    def train(bucket_size: int) -> list[Tensor]:
        params = [parameter(5, 6, seed=i) for i in range(4)]
        return run(build(name, params, bucket_size=bucket_size), STEPS)

    assert_same(train(bucket_size=60), train(bucket_size=2**26), TOLERANCE)


def test_fused_views_equal_separate_parameters(name: str) -> None:
    views = list(fused_rows((12, 5), [("q", 6, 1), ("k", 4, 1), ("v", 2, 1)]))
    pieces = list(indices(12, 5).split([6, 4, 2]))
    run_split(name, parameter(12, 5), views, pieces, **BY_VIEW)


def test_interleaved_views_equal_separate_parameters(name: str) -> None:
    views = list(interleaved_rows((12, 5), heads=2, names=("q", "k", "v"), per_head=False))
    pieces = [piece.reshape(4, 5) for piece in indices(2, 3, 2, 5).unbind(1)]
    run_split(name, parameter(12, 5), views, pieces, **BY_VIEW)


def test_heads_equal_separate_parameters(name: str) -> None:
    pieces = list(indices(8, 6).split(4))
    run_split(name, parameter(8, 6), [rows((8, 6), groups=2)], pieces, **BY_GROUP)


def test_input_heads_equal_separate_parameters(name: str) -> None:
    pieces = list(indices(5, 8).split(4, dim=1))
    run_split(name, parameter(5, 8), [heads_in((5, 8), heads=2)], pieces, **BY_GROUP)


def test_columns_equal_transposed_rows(name: str) -> None:
    run_split(name, parameter(6, 5), [columns((6, 5))], [indices(6, 5).T])


def test_conv1d_equals_transposed_linear(name: str) -> None:
    linear = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    conv = Conv1D(linear.weight)
    for model in (linear, conv):
        optimizer = build(name, model, eps=1e-3)  # small ones magnify rounding
        for step in STEPS:
            (inputs,) = random_grads([torch.empty(7, 6, dtype=torch.float64)], step)
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    assert_same([conv.weight.T], [linear.weight], TOLERANCE)


@pytest.mark.parametrize("embedded", [False, True], ids=["linear", "embedding"])
def test_tied_weights_are_trained_once(name: str, embedded: bool) -> None:
    shared = parameter(6, 6)
    first = nn.Embedding(6, 6, _weight=shared) if embedded else nn.Linear(6, 6, bias=False)
    second = nn.Linear(6, 6, bias=False)
    first.weight = second.weight = shared
    model = nn.ModuleList([first, second])
    optimizer = build(name, model)
    fallback = embedded or layer_needs(optimizer.recipe.algorithm)  # no single layer's input
    views = [] if fallback else [rows((6, 6))]
    lone = parameter(6, 6)
    expected = build(name, [group([lone], [views])])
    tokens = torch.arange(6)
    for _ in STEPS:
        for weight, shell in ((shared, optimizer), (lone, expected)):
            inputs = F.embedding(tokens, weight) if embedded else weight.detach() @ weight.T
            shell.zero_grad()
            F.linear(inputs, weight).tanh().square().sum().backward()
            shell.step()
    assert len(params_of(optimizer)) == 1
    assert torch.equal(shared, lone)
