"""Laws about training: what a step does, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from hf_precond import PreconditionedOptimizer
from tests.suite.building import (
    Grads,
    assert_bit_equal,
    assert_same,
    build,
    parameter,
    params_of,
    random_grads,
    run,
    state_tensors,
)

TOLERANCE = 1e-11
# The gradient itself is summed in another order, and what is left of nothing is divided by eps.
SUMMATION_TOLERANCE = 1e-8
DESCENT = 0.1  # share of the first loss that may be left
RATES = (1.0, 4.0)  # normalised steps have each their own length: the better of two rates counts


class Mlp(nn.Module):
    """Two layers and a norm, with the usual ways to compute activations."""

    def __init__(self, *, inplace: bool = False, recompute: bool = False) -> None:
        super().__init__()
        rng = torch.get_rng_state()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 8), nn.ReLU(inplace=inplace)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.recompute = recompute
        self.double()
        torch.set_rng_state(rng)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
        return self.head(self.norm(hidden))


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    """Fixed inputs and targets of a smooth function."""
    rng = torch.Generator().manual_seed(7)
    inputs = torch.randn(size, 6, generator=rng, dtype=torch.float64)
    return inputs, torch.sin(inputs[:, :3])


def train(
    name: str, model: nn.Module, *, steps: int = 6, chunks: int = 1, lr: float = 0.01
) -> tuple[list[Tensor], list[float]]:
    """Full-batch training; returns the weights and the losses."""
    optimizer = build(name, model, lr=lr)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    inputs, targets = batch()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(inputs.chunk(chunks), targets.chunk(chunks), strict=True):
            loss = (model(x) - y).square().mean() / chunks
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        schedule.step()
    return params_of(optimizer), losses


def mixed(name: str, **options: Any) -> PreconditionedOptimizer:
    """Two stacked matrices, another one and a vector."""
    shapes = [(5, 6), (5, 6), (4, 7), (5,)]
    return build(name, [parameter(*s, seed=i) for i, s in enumerate(shapes)], **options)


def test_descends_on_an_mlp(name: str) -> None:
    runs = [train(name, Mlp(), steps=120, lr=0.01 * rate)[1] for rate in RATES]
    assert min(losses[-1] for losses in runs) < DESCENT * runs[0][0]


def test_descends_on_a_matrix_quadratic(name: str) -> None:
    """f(W) = |A (W - W*)|^2 / 2 with a condition number of 100."""
    finals = [quadratic_descent(name, lr=0.05 * rate) for rate in RATES]
    assert min(finals) < DESCENT


def quadratic_descent(name: str, *, lr: float, steps: int = 200) -> float:
    """The share of the first loss that is left after full-batch training."""
    weight, target = parameter(5, 6, seed=0), parameter(5, 6, seed=1).detach()
    scales = torch.logspace(0, -1, 6, dtype=torch.float64)
    optimizer = build(name, [weight], lr=lr)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * ((weight - target) * scales).square().sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    return losses[-1] / losses[0]


def test_zero_learning_rate_leaves_weights_bit_equal(name: str) -> None:
    optimizer = mixed(name, lr=0.0, weight_decay=0.1)
    before = [param.detach().clone() for param in params_of(optimizer)]
    assert_bit_equal(run(optimizer, range(1, 4)), before, "weight")
    assert all(optimizer.state[param]["step"] == 3 for param in params_of(optimizer))


def test_weight_decay_is_decoupled(name: str) -> None:
    """W <- (1 - lr wd) W first, and neither statistics nor momentum see it."""
    lr, decay = 0.05, 0.3
    plain, decayed = mixed(name, lr=lr), mixed(name, lr=lr, weight_decay=decay)
    expected = [param.detach().clone() for param in params_of(plain)]
    for step in range(1, 5):
        before = [param.detach().clone() for param in params_of(plain)]
        after = run(plain, [step])
        expected = [
            e * (1 - lr * decay) + a - b for e, a, b in zip(expected, after, before, strict=True)
        ]
        run(decayed, [step])
    assert_same(params_of(decayed), expected, TOLERANCE)


def first_parameter_gets(bad: float | None, at: set[int]) -> Grads:
    """Gradients of which the first has ``bad`` in one place at some steps, or is missing."""

    def grads(params: Sequence[Tensor], step: int) -> Sequence[Tensor | None]:
        out: list[Tensor | None] = list(random_grads(params, step))
        if step in at:
            if bad is not None:
                assert out[0] is not None
                out[0].view(-1)[3] = bad
            else:
                out[0] = None
        return out

    return grads


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("at", [{1}, {3, 4}], ids=str)
def test_a_bad_gradient_equals_leaving_the_step_out(
    name: str, bad: float | None, at: set[int]
) -> None:
    """For that parameter; all others go on. A missing gradient is one more bad one."""
    steps = range(1, 7)
    actual, others, lone = mixed(name), mixed(name), build(name, [parameter(5, 6, seed=0)])
    run(actual, steps, first_parameter_gets(bad, at))
    run(others, steps)
    run(
        lone,
        [step for step in steps if step not in at],
        lambda params, step: random_grads(params_of(others), step)[:1],
    )
    assert_same(params_of(actual), [*params_of(lone), *params_of(others)[1:]], TOLERANCE)


@pytest.mark.parametrize("bad", [None, math.nan], ids=str)
def test_a_bad_gradient_leaves_weight_and_state_untouched(name: str, bad: float | None) -> None:
    optimizer = mixed(name, weight_decay=0.1)
    run(optimizer, [1, 2])
    param = params_of(optimizer)[0]
    before = param.detach().clone()
    state = {key: tensor.clone() for key, tensor in optimizer.state[param].items()}
    run(optimizer, [3, 4], first_parameter_gets(bad, {3, 4}))
    assert torch.equal(param, before)
    assert_bit_equal(optimizer.state[param].values(), state.values(), "state")


def test_a_lasting_bad_gradient_raises_with_the_name(name: str) -> None:
    optimizer = build(
        name, [("good.weight", parameter(4, 4)), ("bad.weight", parameter(4, 4))], max_failures=3
    )

    def grads(params: Sequence[Tensor], step: int) -> Sequence[Tensor]:
        good, bad = random_grads(params, step)
        return [good, torch.full_like(bad, math.nan)]

    run(optimizer, [1, 2], grads)
    with pytest.raises(FloatingPointError, match=r"bad\.weight"):
        run(optimizer, [3], grads)


def test_zero_gradients_are_finite_and_move_nothing(name: str) -> None:
    def zeros(params: Sequence[Tensor], step: int) -> list[Tensor]:
        return [torch.zeros_like(param) for param in params]

    optimizer = mixed(name)
    before = [param.detach().clone() for param in params_of(optimizer)]
    assert_bit_equal(run(optimizer, range(1, 4), zeros), before, "weight")
    run(optimizer, range(4, 7))
    assert all(tensor.isfinite().all() for tensor in state_tensors(optimizer).values())
    assert all(param.isfinite().all() for param in params_of(optimizer))


@pytest.mark.parametrize("graft", ["rmsprop_normalized", "adam", "sgd", "none"])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e4, 1e8])
def test_every_scale_of_gradients_works_in_float32(name: str, scale: float, graft: str) -> None:
    """Finite, and downhill for every parameter."""
    params = [
        parameter(*s, dtype=torch.float32) for s in [(5, 6), (40, 3), (3, 40), (1, 7), (7, 1)]
    ]
    without_memory = {"momentum": "none", "rotated_momentum": False, "start_step": 1}
    optimizer = build(name, params, state_dtype="float32", graft=graft, lr=1.0, **without_memory)
    for param in params:
        param.data.zero_()  # so that no move is lost in the weight's own rounding
    for step in range(1, 6):
        grads = [scale * grad for grad in random_grads(params, step)]
        before = [param.detach().clone() for param in params]
        after = run(optimizer, [step], lambda _, __, grads=grads: grads)
        for a, b, g in zip(after, before, grads, strict=True):
            move = (a - b).double()
            assert move.isfinite().all()
            assert (move * g.double()).sum() < 0
    assert all(tensor.isfinite().all() for tensor in state_tensors(optimizer).values())


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1), (2, 3, 1, 1)], ids=str)
def test_tiny_parameters_work(name: str, shape: tuple[int, ...]) -> None:
    optimizer = build(name, [parameter(*shape)])
    before = params_of(optimizer)[0].detach().clone()
    (after,) = run(optimizer, range(1, 5))
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_closure_is_evaluated_with_gradients_and_its_loss_returned(name: str) -> None:
    by_closure, by_hand = Mlp(), Mlp()
    closed, plain = build(name, by_closure), build(name, by_hand)
    inputs, targets = batch()

    def closure() -> Tensor:
        closed.zero_grad()
        loss = (by_closure(inputs) - targets).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        returned = closed.step(closure)
        plain.zero_grad()
        loss = (by_hand(inputs) - targets).square().mean()
        loss.backward()
        assert plain.step() is None
        assert torch.equal(returned, loss)
    assert_bit_equal(by_closure.parameters(), by_hand.parameters(), "weight")


def test_lr_schedulers_are_obeyed(name: str) -> None:
    factors = [1.0, 0.5, 0.0, 0.25]
    scheduled, by_hand = mixed(name), mixed(name)
    schedule = LambdaLR(scheduled, lambda step: factors[min(step, 3)])
    for step, factor in enumerate(factors, start=1):
        before = [param.detach().clone() for param in params_of(scheduled)]
        after = run(scheduled, [step])
        schedule.step()
        by_hand.param_groups[0]["lr"] = factor * by_hand.defaults["lr"]
        assert_bit_equal(after, run(by_hand, [step]), "weight")
        assert (factor == 0) == all(map(torch.equal, after, before))


def test_lr_may_be_a_tensor(name: str) -> None:
    number, tensor = mixed(name, lr=0.03), mixed(name, lr=torch.tensor(0.03, dtype=torch.float64))
    assert_same(run(tensor, range(1, 4)), run(number, range(1, 4)), TOLERANCE)


def test_loss_scaling_changes_nothing(name: str) -> None:
    """A power of two, taken back by GradScaler; an overflow leaves the step out."""
    weights = []
    inputs, targets = (x.float() for x in batch())
    for enabled in (True, False):
        model = Mlp().float()
        optimizer = build(name, model, state_dtype="float32")
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**10)
        for _ in range(4):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(list(model.parameters()))
    assert_bit_equal(*weights, "weight")


def test_max_grad_norm_is_torchs_clipping(name: str) -> None:
    limit = 2.0
    own, torchs = mixed(name, max_grad_norm=limit), mixed(name)
    run(own, range(1, 5))
    for step in range(1, 5):
        for param, grad in zip(
            params_of(torchs), random_grads(params_of(torchs), step), strict=True
        ):
            param.grad = grad.clone()
        nn.utils.clip_grad_norm_(params_of(torchs), limit)
        torchs.step()
    assert_same(params_of(own), params_of(torchs), TOLERANCE)


@pytest.mark.parametrize("value", [1e-3, 0.07])
def test_a_clipped_update_has_at_most_its_root_mean_square(name: str, value: float) -> None:
    """Of matrices; what follows the fallback is not clipped."""
    lr = 0.5
    stages = {"momentum": "none", "rotated_momentum": False, "start_step": 1}
    optimizer = mixed(name, lr=lr, clip_mode="update_rms", clip_value=value, **stages)
    before = [param.detach().clone() for param in params_of(optimizer)]
    clipped = 0
    for step in range(1, 4):
        after = run(optimizer, [step])
        moves = [a - b for a, b in zip(after, before, strict=True) if a.ndim > 1]
        before = after
        sizes = [move.square().mean().sqrt().item() / lr for move in moves]
        assert max(sizes) <= value * (1 + 1e-9)
        clipped += sum(size > value * (1 - 1e-6) for size in sizes)
    assert clipped


def test_accumulation_equals_one_batch_of_twice_the_size(name: str) -> None:
    twice, one = (train(name, Mlp(), chunks=chunks)[0] for chunks in (2, 1))
    assert_same(twice, one, SUMMATION_TOLERANCE)


def test_inplace_activations_change_nothing(name: str) -> None:
    assert_bit_equal(train(name, Mlp(inplace=True))[0], train(name, Mlp())[0], "weight")


def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    assert_bit_equal(train(name, Mlp(recompute=True))[0], train(name, Mlp())[0], "weight")


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fallback_adam_equals_torch(name: str, decay: float) -> None:
    params, twins = ([parameter(7, seed=i) for i in range(3)] for _ in range(2))
    options = {"betas": (0.8, 0.95), "fallback_beta1": None, "fallback_eps": 1e-6}
    actual = build(name, params, weight_decay=decay, lr=0.02, **options)
    expected = torch.optim.AdamW(twins, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    assert_same(run(actual, range(1, 9)), run(expected, range(1, 9)), TOLERANCE)


def test_fallback_sgd_equals_torch(name: str) -> None:
    params, twins = ([parameter(7, seed=i) for i in range(3)] for _ in range(2))
    actual = build(name, params, fallback="sgd", fallback_momentum=0.7, lr=0.02)
    expected = torch.optim.SGD(twins, lr=0.02, momentum=0.7)
    assert_same(run(actual, range(1, 9)), run(expected, range(1, 9)), TOLERANCE)


def test_fallback_lr_ratio_scales_only_the_fallback(name: str) -> None:
    ratio, plain = mixed(name, fallback_lr_ratio=0.5, lr=0.02), mixed(name, lr=0.02)
    halved = build(name, [parameter(5, seed=3)], lr=0.01)
    matrices = run(plain, range(1, 5))[:-1]
    run(
        halved,
        range(1, 5),
        lambda params, step: random_grads(params_of(plain), step)[-1:],
    )
    assert_same(run(ratio, range(1, 5)), [*matrices, *params_of(halved)], TOLERANCE)
