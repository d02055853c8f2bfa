"""Bad gradients, dead layers, extreme scales: training goes on, what was left out is counted.

What is decided by the gradients alone (zero, missing or bad ones, a learning rate of zero) has its
laws in ``tests/suite/test_laws_training.py``; here are the counts, the logs and the long absences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hf_precond import PreconditionedOptimizer
from hf_precond.linalg.precision import flushed
from tests.suite.building import (
    assert_bit_equal,
    build,
    parameter,
    params_of,
    random_grads,
    run,
    state_tensors,
)

# Before start_step an optimizer without a graft partner takes raw gradients, of whatever scale.
EAGER = {
    "basis_interval": 2,
    "projection_interval": 2,
    "oversampling": 1,
    "rank": 4,
    "start_step": 1,
}
SHAPES = [(12, 10), (12, 10), (40, 3), (1, 7), (5,)]


def named_matrices(name: str, **options: object) -> PreconditionedOptimizer:
    """Float32 matrices of different shapes and a vector, with names."""
    params = [
        (f"layer{i}.weight", parameter(*shape, seed=i, dtype=torch.float32))
        for i, shape in enumerate(SHAPES)
    ]
    return build(name, params, **{**EAGER, "state_dtype": "float32", **options})


def assert_finite(optimizer: PreconditionedOptimizer) -> None:
    assert all(param.isfinite().all() for param in params_of(optimizer))
    assert all(tensor.isfinite().all() for tensor in state_tensors(optimizer).values())


# --- gradients that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_bad_gradient_is_counted_and_named(
    name: str, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    def grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
        found = random_grads(params, step)
        if step in (3, 4):
            found[1].view(-1)[5] = bad
        return found

    optimizer = named_matrices(name)
    run(optimizer, range(1, 9), grads)
    assert_finite(optimizer)
    assert optimizer.health()["skipped_nonfinite"] == 2
    assert "layer1.weight: gradient is not finite, step left out (2 in a row)" in caplog.text
    assert "layer0.weight" not in caplog.text


def test_a_weight_that_is_not_finite_ends_in_an_error_with_a_name(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss and with it every gradient is not finite: no step is taken, nothing else is spoilt.

    The optimizer never reads the weights, so it is the gradients that tell.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = build(name, model, state_dtype="float32", max_failures=3)
    with torch.no_grad():
        model[0].weight[2, 3] = math.nan
    before = [param.detach().clone() for param in model.parameters()]
    inputs = torch.randn(4, 6)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()

    train(2)
    with pytest.raises(FloatingPointError, match=r"'0\.weight'.*not finite.*3 in a row"):
        train(1)
    assert optimizer.health()["skipped_nonfinite"] >= 2 * len(before)
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.nan_to_num(0), old.nan_to_num(0))
    assert "2.weight: gradient is not finite" in caplog.text


# --- gradients that are zero or missing -----------------------------------------------------------


def test_zero_gradients_between_others_move_little_and_spoil_nothing(name: str) -> None:
    def grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
        alive = step % 10 == 0
        return [grad if alive else torch.zeros_like(grad) for grad in random_grads(params, step)]

    optimizer = named_matrices(name)
    run(optimizer, range(1, 32), grads)
    assert_finite(optimizer)
    figures = optimizer.health()
    assert figures["failed_updates"] == figures["skipped_nonfinite"] == 0


def test_a_layer_without_gradient_for_a_hundred_steps(name: str) -> None:
    """Unused, it does not change; used again, it does what one does that begins only then."""

    def grads(params: Sequence[Tensor], step: int) -> list[Tensor | None]:
        first, *others = random_grads(params, step)
        return [first if step > 100 else None, *others]

    optimizer = named_matrices(name)
    first = params_of(optimizer)[0]
    before = first.detach().clone()
    state_before = {key: t.clone() for key, t in optimizer.state.get(first, {}).items()}
    run(optimizer, range(1, 101), grads)
    assert torch.equal(first, before)
    assert not state_before
    assert optimizer.state[first]["step"] == 0
    run(optimizer, range(101, 107), grads)
    assert_finite(optimizer)

    late = named_matrices(name)
    begun = params_of(late)[0]
    run(late, range(101, 107), lambda params, step: [random_grads(params, step)[0], *[None] * 4])
    torch.testing.assert_close(first, begun, rtol=1e-4, atol=1e-5)


def test_a_learning_rate_of_zero_moves_nothing_and_learns(name: str) -> None:
    optimizer = named_matrices(name, lr=0.0)
    before = [param.detach().clone() for param in params_of(optimizer)]
    assert_bit_equal(run(optimizer, range(1, 13)), before, "weight")
    assert_finite(optimizer)
    optimizer.param_groups[0]["lr"] = 0.01
    after = run(optimizer, [13])
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-20, 1e-15, 1e-10, 1e10, 1e15, 1e25, 1e30])
def test_gradients_of_any_scale_leave_finite_weights(name: str, scale: float) -> None:
    """Where the squares leave the range of float32, the step is left out and counted."""
    optimizer = named_matrices(name, lr=1e-2, max_failures=50)
    before = [param.detach().clone() for param in params_of(optimizer)]
    after = run(
        optimizer, range(1, 9), lambda params, step: [scale * g for g in random_grads(params, step)]
    )
    assert_finite(optimizer)
    assert all((a - b).abs().max() < 10 for a, b in zip(after, before, strict=True))
    figures = optimizer.health()
    assert figures["failed_updates"] == 0
    assert figures["skipped_nonfinite"] == (8 * len(SHAPES) if scale > 1e20 else 0)
    run(optimizer, range(9, 13))
    assert_finite(optimizer)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e15, 1e25])
def test_losses_of_any_scale_leave_finite_weights(name: str, scale: float) -> None:
    """Of a model, so that layers' inputs and output gradients have the scales they have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3))
    options = {**EAGER, "state_dtype": "float32", "max_failures": 50}
    optimizer = build(name, model, lr=1e-3, **options)
    inputs, targets = torch.randn(8, 10), torch.randn(8, 3)
    for _ in range(8):
        optimizer.zero_grad()
        ((model(inputs) - targets).square().mean() * scale).backward()
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())


def test_squares_at_the_edge_of_the_range_leave_finite_weights() -> None:
    optimizer = named_matrices("shared_basis_adagrad", max_failures=50)
    run(optimizer, range(1, 9), lambda params, step: [1e18 * g for g in random_grads(params, step)])
    assert all(param.isfinite().all() for param in params_of(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_too_small_for_a_reciprocal_are_zero(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    moments = torch.tensor([0.0, info.tiny, 1e3 * info.tiny / info.eps, 1.0], dtype=dtype)
    assert flushed(moments).tolist() == [0.0, 0.0, *moments[2:].tolist()]
    # A share of 1e-6 of what is left still has a finite reciprocal.
    assert (1 / (1e-6 * moments[2:])).isfinite().all()
