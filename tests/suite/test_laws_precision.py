"""Laws about few bits: weights of 16 bits beside state in float32, and state of 16 bits.

Resuming with bf16 weights bit for bit is a law about state already; here it is one with stochastic
rounding and with state kept in bf16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hf_precond import PreconditionedOptimizer, option_specs
from hf_precond.optim.flat_state import flat_state, load_flat_state
from hf_precond.preconditioners.base import exact_state
from tests.suite.building import (
    assert_bit_equal,
    assert_same,
    build,
    parameter,
    params_of,
    random_grads,
    run,
    state_tensors,
)
from tests.suite.test_laws_training import Mlp, batch, first_parameter_gets

BF16 = torch.bfloat16
MODES: dict[str, dict[str, Any]] = {
    "nearest": {},
    "stochastic": {"stochastic_rounding": True},
    "all of bf16": {"stochastic_rounding": True, "state_storage": "bfloat16"},
}
NEW_MODES = {label: options for label, options in MODES.items() if options}
# Two units in the last place of bf16, of the largest entry.
ULPS = 2 * torch.finfo(BF16).eps

# Of the other side, of solvers between samples, and of ranks that adapt.
UNDER_OTHER_OPTIONS = {"right", "picks", "input_rank", "output_rank"}

every_mode = pytest.mark.parametrize("mode", MODES)


def mixed(
    name: str, mode: str, dtype: torch.dtype = BF16, **options: Any
) -> PreconditionedOptimizer:
    """Two stacked matrices, another one and a vector."""
    params = [
        parameter(*s, seed=i, dtype=dtype) for i, s in enumerate([(5, 6), (5, 6), (4, 7), (5,)])
    ]
    return build(name, params, state_dtype="float32", **MODES[mode] | options)


def losses(
    name: str, model: nn.Module, steps: int, *, lr: float = 0.03, **options: Any
) -> list[float]:
    """Full-batch training with a falling rate."""
    optimizer = build(name, model, lr=lr, state_dtype="float32", **options)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    inputs, targets = (x.to(next(model.parameters()).dtype) for x in batch())
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        found.append(loss.item())
        optimizer.step()
        schedule.step()
    return found


@every_mode
def test_descends_with_weights_of_16_bits(name: str, mode: str) -> None:
    found = losses(name, Mlp().to(BF16), 40, **MODES[mode])
    assert all(map(math.isfinite, found))
    assert found[-1] < 0.4 * found[0]


def test_state_of_16_bits_trains_like_state_of_32(name: str) -> None:
    """Weights are float32, so that the state alone differs."""
    whole, half = (
        losses(name, Mlp().float(), 40, state_storage=kind) for kind in ("state", "bfloat16")
    )
    assert half[-1] < 0.4 * half[0]
    # The share of the first loss that is left.
    assert half[-1] / half[0] == pytest.approx(whole[-1] / whole[0], abs=0.03)


def test_state_of_16_bits_takes_half_the_bytes(name: str) -> None:
    """Of what need not be exact; and the plan says so before anything is allocated."""
    whole, half = (mixed(name, "nearest", state_storage=kind) for kind in ("state", "bfloat16"))
    planned = [row.state_bytes for row in half.plan()]
    for optimizer in (whole, half):
        run(optimizer, [1])
    exact = {"0": exact_state(whole.recipe.algorithm), "3": ()}  # a matrix, a vector
    sizes = [0, 0]
    for position, optimizer in enumerate((whole, half)):
        for key, tensor in state_tensors(optimizer).items():
            index, name = key.split(".")
            if name != "step" and index in exact:
                kept = name in exact[index]
                assert tensor.dtype == (BF16 if position and not kept else torch.float32), key
                sizes[position] += 0 if kept else tensor.nbytes
    assert 2 * sizes[1] == sizes[0] > 0
    steps = 4 * len(params_of(half))
    assert sum(planned) == sum(tensor.nbytes for tensor in state_tensors(half).values()) - steps
    layout = {f"{index}.{key}": meta for index, key, meta in half.state_layout()}
    assert {k: m.dtype for k, m in layout.items() if not k.endswith("step")} == {
        k: t.dtype for k, t in state_tensors(half).items() if not k.endswith("step")
    }


def test_exact_state_names_tensors_that_are_there(name: str) -> None:
    optimizer = mixed(name, "nearest")
    keys = {key for index, key, _ in optimizer.state_layout() if index == 0}
    assert set(exact_state(optimizer.recipe.algorithm)) - keys <= UNDER_OTHER_OPTIONS


@pytest.mark.parametrize("mode", NEW_MODES)
def test_resumed_equals_uninterrupted_with_rounding(name: str, mode: str) -> None:
    """Through safetensors, with a parameter that missed a step."""
    grads = first_parameter_gets(None, {2})
    straight, first, second = (mixed(name, mode, weight_decay=0.1) for _ in range(3))
    run(straight, range(1, 8), grads)
    weights = run(first, range(1, 5), grads)
    for param, weight in zip(params_of(second), weights, strict=True):
        param.data.copy_(weight)
    tensors, header = flat_state(first)
    loaded = load(save({key: tensor.clone() for key, tensor in tensors.items()}))
    load_flat_state(second, loaded, json.loads(json.dumps(header)))
    run(second, range(5, 8), grads)
    assert_bit_equal(params_of(second), params_of(straight), "weight")
    expected = state_tensors(straight)
    assert_bit_equal(state_tensors(second).values(), expected.values(), "state")


@every_mode
@pytest.mark.parametrize("bad", [None, math.nan, math.inf], ids=str)
def test_a_bad_gradient_touches_nothing_in_few_bits(
    name: str, mode: str, bad: float | None
) -> None:
    """Not its own weight and state; all others go on as they would have."""
    optimizer, others = mixed(name, mode, weight_decay=0.1), mixed(name, mode, weight_decay=0.1)
    run(optimizer, [1, 2])
    param = params_of(optimizer)[0]
    before = param.detach().clone()
    state = {key: tensor.clone() for key, tensor in optimizer.state[param].items()}
    run(optimizer, [3, 4], first_parameter_gets(bad, {3, 4}))
    run(others, range(1, 5))
    assert torch.equal(param, before)
    assert_bit_equal(optimizer.state[param].values(), state.values(), "state")
    assert_same(params_of(optimizer)[1:], params_of(others)[1:], ULPS)
    after = run(optimizer, [5, 6])
    assert not torch.equal(after[0], before)
    tensors = [*after, *state_tensors(optimizer).values()]
    assert all(tensor.isfinite().all() for tensor in tensors if not _may_be_infinite(tensor))


def _may_be_infinite(tensor: Tensor) -> bool:
    """The adaptive rank of a factor that has not been decomposed."""
    return tensor.ndim == 1


@every_mode
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_zero_learning_rate_leaves_16_bits_equal(name: str, mode: str, dtype: torch.dtype) -> None:
    optimizer = mixed(name, mode, dtype, lr=0.0, weight_decay=0.1)
    before = [param.detach().clone() for param in params_of(optimizer)]
    assert_bit_equal(run(optimizer, range(1, 5)), before, "weight")


@every_mode
def test_zero_gradients_move_no_weight_of_16_bits(name: str, mode: str) -> None:
    def zeros(params: Sequence[Tensor], step: int) -> list[Tensor]:
        return [torch.zeros_like(param) for param in params]

    optimizer = mixed(name, mode)
    before = [param.detach().clone() for param in params_of(optimizer)]
    assert_bit_equal(run(optimizer, range(1, 4), zeros), before, "weight")
    assert all(param.isfinite().all() for param in run(optimizer, range(4, 7)))


@every_mode
def test_stacked_equals_per_parameter_in_16_bits(name: str, mode: str) -> None:
    """To rounding: noise is made of numbers, whose last bits depend on the stack."""
    options = {"state_dtype": "float32", **MODES[mode]}
    shapes, steps = [(5, 6), (5, 6), (5,), (5, 6)], range(1, 4)
    fresh = [parameter(*shape, seed=i, dtype=BF16) for i, shape in enumerate(shapes)]
    stacked = build(name, fresh, **options)
    grads = {step: random_grads(fresh, step) for step in steps}
    alone = [
        run(
            build(name, [parameter(*shape, seed=i, dtype=BF16)], **options),
            steps,
            lambda params, step, i=i: [grads[step][i]],
        )[0]
        for i, shape in enumerate(shapes)
    ]
    together = run(stacked, steps, lambda params, step: grads[step])
    assert_same(together, alone, ULPS)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_small_decays_count_with_stochastic_rounding(name: str, dtype: torch.dtype) -> None:
    """(1 - 2^-13)^n: to nearest, 1 - 2^-13 is one."""
    steps, factor = 64, 2.0**-13
    start = torch.rand(12, 16, generator=torch.Generator().manual_seed(0)).add(1).to(dtype)
    lost = []
    for mode in ("nearest", "stochastic"):
        weight = nn.Parameter(start.clone())
        rates = {"lr": factor / 0.5, "weight_decay": 0.5}
        optimizer = build(name, [weight], state_dtype="float32", **rates, **MODES[mode])
        run(optimizer, range(1, steps + 1), lambda params, step: [torch.zeros_like(params[0])])
        lost.append(1 - (weight.float().mean() / start.float().mean()).item())
    assert lost[0] == 0
    # Equal weights are rounded alike: the mean is over some hundred different ones.
    assert lost[1] == pytest.approx(1 - (1 - factor) ** steps, rel=0.3)


def test_closures_and_schedulers_with_weights_of_16_bits(name: str) -> None:
    optimizer = mixed(name, "all of bf16")
    params = params_of(optimizer)
    factors = [1.0, 0.0]
    schedule = LambdaLR(optimizer, lambda step: factors[min(step, 1)])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((param.float().square().sum() for param in params), torch.zeros(()))
        loss.backward()
        return loss

    for factor in factors:
        before = [param.detach().clone() for param in params]
        assert torch.equal(optimizer.step(closure), closure().detach()) == (factor == 0)
        assert all(map(torch.equal, params, before)) == (factor == 0)
        schedule.step()


class HalfScaler(torch.amp.GradScaler):
    """Torch refuses to unscale gradients of float16; who trains such weights overrides that."""

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, _: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


@every_mode
def test_an_overflow_under_a_scaler_touches_nothing(name: str, mode: str) -> None:
    optimizer = mixed(name, mode, torch.float16, weight_decay=0.1)
    run(optimizer, [1, 2])
    params = params_of(optimizer)
    before = [param.detach().clone() for param in params]
    state = {key: tensor.clone() for key, tensor in state_tensors(optimizer).items()}
    optimizer.grad_scaler = scaler = HalfScaler("cpu", init_scale=4.0)
    for overflows in (True, False):
        scale = scaler.scale(torch.ones(())).item()
        for param, grad in zip(params, random_grads(params, 3), strict=True):
            param.grad = scale * grad
        if overflows:
            params[0].grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, params, before)) == overflows
        if overflows:
            assert_bit_equal(state_tensors(optimizer).values(), state.values(), "state")
    assert all(param.isfinite().all() for param in params)


def test_every_option_of_precision_is_everywhere(name: str) -> None:
    assert {"stochastic_rounding", "state_storage", "compile"} <= option_specs(name).keys()
