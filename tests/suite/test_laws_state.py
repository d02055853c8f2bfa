"""Laws about state: it survives saving, copying and growing, in its own dtype and in one place."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from hf_precond import PreconditionedOptimizer
from hf_precond.optim.flat_state import flat_state, load_flat_state
from hf_precond.views.view import fused_rows, rows
from tests.suite.building import (
    assert_bit_equal,
    assert_same,
    build,
    fed,
    group,
    parameter,
    params_of,
    random_grads,
    run,
    state_tensors,
)

TOLERANCE = 1e-11
TRANSFER = Callable[[PreconditionedOptimizer, PreconditionedOptimizer], None]


def through_torch_save(source: PreconditionedOptimizer, target: PreconditionedOptimizer) -> None:
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))


def through_safetensors(source: PreconditionedOptimizer, target: PreconditionedOptimizer) -> None:
    tensors, header = flat_state(source)
    loaded = load(save({key: tensor.clone() for key, tensor in tensors.items()}))
    load_flat_state(target, loaded, json.loads(json.dumps(header)))


def through_memory(source: PreconditionedOptimizer, target: PreconditionedOptimizer) -> None:
    target.load_state_dict(copy.deepcopy(source.state_dict()))


def with_a_gap(params: Sequence[Tensor], step: int) -> Sequence[Tensor | None]:
    """The first parameter misses step 2, so that step counts differ within a stack."""
    first, *others = random_grads(params, step)
    return [None if step == 2 else first, *others]


ROUTES = [through_torch_save, through_safetensors, through_memory]


def mixed_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Equal and different shapes, a fused kernel and vectors."""
    shapes = [(5, 6), (9, 4), (5, 6), (5,), (3, 3, 4), (7,)]
    return [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def mixed_optimizer(name: str, dtype: torch.dtype = torch.float32) -> PreconditionedOptimizer:
    params = mixed_parameters(dtype)
    views = [
        list(fused_rows(p.shape, [("q", 6, 2), ("k", 3, 1)]))
        if p.shape == (9, 4)
        else [rows(p.shape)]
        if p.ndim > 1
        else []
        for p in params
    ]
    half = len(params) // 2
    groups = [group(params[:half], views[:half]), group(params[half:], views[half:])]
    groups[1] |= {"lr": 0.01, "weight_decay": 0.3}
    return build(name, groups, state_dtype="float32", coef_interval=1)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_equals_uninterrupted(name: str, dtype: torch.dtype, route: TRANSFER) -> None:
    """Bit for bit: weights, state and hyperparameters of the groups."""
    straight = mixed_optimizer(name, dtype)
    run(straight, range(1, 9), with_a_gap)

    first = mixed_optimizer(name, dtype)
    weights = run(first, range(1, 5), with_a_gap)
    second = mixed_optimizer(name, dtype)
    for param, weight in zip(params_of(second), weights, strict=True):
        param.data.copy_(weight)
    second.param_groups[0]["lr"] = 123.0
    route(first, second)
    run(second, range(5, 9), with_a_gap)

    assert_bit_equal(params_of(second), params_of(straight), "weight")
    expected = state_tensors(straight)
    actual = state_tensors(second)
    assert actual.keys() == expected.keys()
    assert_bit_equal(actual.values(), expected.values(), "state")


@pytest.mark.parametrize("route", ROUTES)
def test_loading_keeps_state_dtypes(name: str, route: TRANSFER) -> None:
    """torch.optim casts state to the weights' bf16 on load; the shell must not."""
    source, target = (mixed_optimizer(name, torch.bfloat16) for _ in range(2))
    run(source, range(1, 4))
    before = {key: tensor.dtype for key, tensor in state_tensors(source).items()}
    route(source, target)
    after = {key: tensor.dtype for key, tensor in state_tensors(target).items()}
    assert after == before
    assert set(before.values()) == {torch.float32}


def test_loaded_state_is_not_shared(name: str) -> None:
    source, target = mixed_optimizer(name), mixed_optimizer(name)
    run(source, range(1, 4))
    saved = source.state_dict()
    kept = copy.deepcopy(saved["state"])
    target.load_state_dict(saved)
    run(target, range(4, 7))
    for index, state in kept.items():
        assert_bit_equal(saved["state"][index].values(), state.values(), f"state {index}")


def test_state_storage_is_not_reallocated_by_a_step(name: str) -> None:
    optimizer = mixed_optimizer(name)
    run(optimizer, range(1, 2))
    tensors = state_tensors(optimizer)
    places = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    run(optimizer, range(2, 6))
    assert {key: tensor.data_ptr() for key, tensor in state_tensors(optimizer).items()} == places
    assert {key: tensor.shape for key, tensor in state_tensors(optimizer).items()} == shapes


def test_state_dict_is_plain(name: str) -> None:
    """Only what torch.load(weights_only=True), JSON and a deep copy by torch leave intact."""
    optimizer = mixed_optimizer(name)
    run(optimizer, range(1, 2))
    saved = optimizer.state_dict()
    assert all(type(t) is torch.Tensor for state in saved["state"].values() for t in state.values())
    assert json.loads(json.dumps(saved["param_groups"])) == saved["param_groups"]


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["copy", "pickle"],
)
def test_a_copy_continues_alike_and_apart(name: str, duplicate: Callable) -> None:
    optimizer = mixed_optimizer(name)
    run(optimizer, range(1, 4))
    _, twin = duplicate((params_of(optimizer), optimizer))
    fed(twin)
    before = [param.detach().clone() for param in params_of(optimizer)]
    run(twin, range(4, 7))
    assert_bit_equal(params_of(optimizer), before, "the original's weight")
    run(optimizer, range(4, 7))
    assert_bit_equal(params_of(twin), params_of(optimizer), "weight")
    assert_bit_equal(state_tensors(twin).values(), state_tensors(optimizer).values(), "state")


def test_a_late_param_group_starts_fresh(name: str) -> None:
    """Of a shape that is stacked with the old ones; the old ones keep their state."""
    grown, old = (build(name, [parameter(5, 6, seed=0)]) for _ in range(2))
    late = parameter(5, 6, seed=1)
    fresh = build(name, [parameter(5, 6, seed=1)])
    for optimizer in (grown, old):
        run(optimizer, range(1, 4))
    grown.add_param_group({"params": [late]})
    grads = {step: random_grads([late, late], step) for step in range(4, 9)}
    run(grown, range(4, 9), lambda params, step: grads[step])
    run(old, range(4, 9), lambda params, step: grads[step][:1])
    run(fresh, range(4, 9), lambda params, step: grads[step][1:])
    assert_same(params_of(grown), [*params_of(old), *params_of(fresh)], TOLERANCE)


def test_no_state_before_the_first_step(name: str) -> None:
    """FSDP replaces parameters after the optimizer was built."""
    optimizer = mixed_optimizer(name)
    assert not optimizer.state
    run(optimizer, [1])
    assert all(optimizer.state[param] for param in params_of(optimizer))
