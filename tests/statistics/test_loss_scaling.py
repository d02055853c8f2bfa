"""A GradScaler multiplies the loss: what the layers see is multiplied, too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hf_precond import PreconditionedOptimizer
from hf_precond.optim.capture import LayerInputError
from tests.statistics.capturing import assert_all_close, assert_equal, kfac, state_of, weights

SCALE = 2.0**12
TOLERANCE = 1e-10


def model_of(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    rng = torch.Generator().manual_seed(step)
    return model(torch.randn(8, 4, generator=rng, dtype=torch.float64)).square().mean()


def scaler_of(interval: int = 2000) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=interval)


def plain(steps: int = 4, skip: tuple[int, ...] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and state after steps without any scaling."""
    model = model_of()
    optimizer = kfac(model)
    for step in range(steps):
        if step in skip:
            continue
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return weights(model), state_of(optimizer)


def scaled(
    *, known: bool, unscale: bool = False, overflow: tuple[int, ...] = (), reset: str = "optimizer"
) -> tuple[nn.Module, PreconditionedOptimizer]:
    """Four steps under a scaler that doubles its scale after each."""
    model, scaler = model_of(), scaler_of(interval=1)
    optimizer = kfac(model)
    if known:
        optimizer.grad_scaler = scaler
    for step in range(4):
        if reset == "zeroed":
            model.zero_grad(set_to_none=False)
        else:
            {"optimizer": optimizer, "model": model}[reset].zero_grad()
        loss = scaler.scale(loss_of(model, step))
        if step in overflow:
            before = weights(model), state_of(optimizer) if step else []
            (loss * math.inf).backward()
        else:
            loss.backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step in overflow:
            assert_equal(weights(model), before[0])
            if step:
                assert_equal(state_of(optimizer), before[1])
    return model, optimizer


@pytest.mark.parametrize(("known", "unscale"), [(True, False), (True, True), (False, False)])
def test_scaling_changes_nothing(known: bool, unscale: bool) -> None:
    expected_weights, expected_state = plain()
    model, optimizer = scaled(known=known, unscale=unscale)
    assert_all_close(weights(model), expected_weights, TOLERANCE)
    assert_all_close(state_of(optimizer), expected_state, TOLERANCE)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("reset", ["optimizer", "model", "zeroed"])
@pytest.mark.parametrize("overflow", [(0,), (1,), (1, 2)])
def test_an_overflow_leaves_everything_as_it_was(
    known: bool, reset: str, overflow: tuple[int, ...]
) -> None:
    """And nothing of it is left for the next step."""
    expected_weights, expected_state = plain(skip=overflow)
    model, optimizer = scaled(known=known, overflow=overflow, reset=reset)
    assert_all_close(weights(model), expected_weights, TOLERANCE)
    assert_all_close(state_of(optimizer), expected_state, TOLERANCE)


def test_unscaled_gradients_alone_are_an_error() -> None:
    """The scale of the captured columns is not known any more."""
    model, scaler = model_of(), scaler_of()
    optimizer = kfac(model)
    before = weights(model)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(LayerInputError, match=r"optimizer\.grad_scaler = scaler"):
        scaler.step(optimizer)
    assert_equal(weights(model), before)


def test_accumulation_under_a_scaler() -> None:
    expected_weights, expected_state = plain(steps=1)
    model, scaler = model_of(), scaler_of()
    optimizer = kfac(model)
    optimizer.grad_scaler = scaler
    for _ in range(2):
        scaler.scale(loss_of(model, 0) / 2).backward()
    scaler.step(optimizer)
    assert_all_close(weights(model), expected_weights, TOLERANCE)
    # The same batch twice: twice the columns, the same second moments.
    assert_all_close(state_of(optimizer), expected_state, TOLERANCE)


@pytest.mark.parametrize("known", [True, False])
def test_a_disabled_scaler(known: bool) -> None:
    expected_weights, _ = plain(steps=1)
    model = model_of()
    optimizer, scaler = kfac(model), torch.amp.GradScaler("cpu", enabled=False)
    if known:
        optimizer.grad_scaler = scaler
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(weights(model), expected_weights)


def test_autocast_and_scaler() -> None:
    """The whole of mixed precision, on the CPU."""
    model, scaler = model_of().float(), scaler_of()
    optimizer = kfac(model, state_dtype="float32", lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            rng = torch.Generator().manual_seed(0)
            loss = model(torch.randn(32, 4, generator=rng)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(value.isfinite().all() for value in state_of(optimizer))


@pytest.mark.parametrize("inverse_interval", [1, 2, 5])
def test_columns_that_overflowed_alone_poison_nothing(inverse_interval: int) -> None:
    """A gradient clipped to finite values beside columns that are not."""
    model = model_of()
    optimizer = kfac(model, inverse_interval=inverse_interval)
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if step == 1:
            (loss * math.inf).backward()
            for param in model.parameters():
                assert param.grad is not None
                param.grad.nan_to_num_(0.0, 0.0, 0.0)
        else:
            loss.backward()
        optimizer.step()
    assert all(value.isfinite().all() for value in state_of(optimizer))
    assert all(weight.isfinite().all() for weight in weights(model))
