"""Optimizers that need layers, on models of every kind: who is captured, who is missed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_precond import PreconditionedOptimizer, create_optimizer
from hf_precond.optim.capture import LayerInputError
from tests.statistics.capturing import (
    NO_DROPOUT,
    PLAIN,
    assert_equal,
    kfac,
    state_of,
    tiny_gpt2,
    weights,
)
from trainer_ext.build import build_optimizer

LAYER_METHODS = ["kfac", "seng", "ng_plus_per_sample"]


def views_of(optimizer: PreconditionedOptimizer) -> dict[str, list[Any]]:
    """Views by name, empty for the fallback."""
    names = iter(optimizer.param_names)
    return {next(names): views for group in optimizer.param_groups for views in group["views"]}


def taken(optimizer: PreconditionedOptimizer) -> set[str]:
    return {name for name, views in views_of(optimizer).items() if views}


def missing(optimizer: PreconditionedOptimizer) -> float:
    """How often a layer had a gradient and no columns, since the last call."""
    return optimizer.health().get("missing_columns", 0.0)


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert all(weight.isfinite().all() for weight in weights(model))


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int = 0, size: int = 8) -> Tensor:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(size, 4, generator=rng, dtype=torch.float64)


def lm_loss(model: nn.Module) -> Tensor:
    ids = torch.arange(10).view(2, 5)
    return model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss


# -- attaching --


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_not_attached_is_an_error_with_both_remedies(name: str) -> None:
    model = mlp()
    optimizer = create_optimizer(model.parameters(), name)
    model(batch()).square().mean().backward()
    before = weights(model)
    with pytest.raises(LayerInputError) as caught:
        optimizer.step()
    assert "create_optimizer(model" in str(caught.value)
    assert "optimizer.attach(model)" in str(caught.value)
    assert isinstance(caught.value, (RuntimeError, ArithmeticError))
    assert_equal(weights(model), before)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, :, None, None].expand(-1, -1, 3, 3).cumsum(2)
        return self.head(self.norm(self.conv(image)).relu().mean((2, 3)))


@pytest.mark.parametrize("name", LAYER_METHODS)
@pytest.mark.parametrize("kind", ["mlp", "convolutional"])
@pytest.mark.parametrize("given", ["bare", "named", "groups"])
def test_bare_groups_attached_later_are_as_from_the_model(name: str, kind: str, given: str) -> None:
    model: nn.Module = {"mlp": mlp, "convolutional": Convolutional}[kind]()
    other = copy.deepcopy(model)
    options = {**PLAIN, "update_interval": 1}
    options.pop("inverse_interval")
    params: Any = {
        "bare": lambda: model.parameters(),
        "named": lambda: model.named_parameters(),
        "groups": lambda: [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim < 2]},
        ],
    }[given]()
    optimizer = create_optimizer(params, name, lr=0.01, **options)
    optimizer.attach(model)
    expected = create_optimizer(other, name, lr=0.01, **options)
    assert sorted(optimizer.param_names) == sorted(expected.param_names)
    for step in range(3):
        step_on(model, optimizer, model(batch(step)).square().mean())
        step_on(other, expected, other(batch(step)).square().mean())
    assert_equal(weights(model), weights(other))
    assert {row.algorithm: row.num_params for row in optimizer.plan()} == {
        row.algorithm: row.num_params for row in expected.plan()
    }


def test_parameters_of_another_model_are_an_error() -> None:
    optimizer = create_optimizer(mlp().parameters(), "kfac")
    with pytest.raises(ValueError, match="no parameters of the model"):
        optimizer.attach(mlp())


def test_frozen_parameters_in_bare_groups_are_left_alone() -> None:
    """As torch's own optimizers do."""
    model = mlp()
    for param in model[0].parameters():
        param.requires_grad_(False)
    frozen = weights(model[0])
    optimizer = create_optimizer(model.parameters(), "kfac", lr=0.01)
    optimizer.attach(model)
    step_on(model, optimizer, model(batch()).square().mean())
    assert_equal(weights(model[0]), frozen)
    assert not missing(optimizer)


def test_layers_unfrozen_later_are_captured() -> None:
    """Gradual unfreezing: a group is added, and the model attached again."""
    model = mlp()
    for param in model[0].parameters():
        param.requires_grad_(False)
    optimizer = kfac(model)
    step_on(model, optimizer, model(batch()).square().mean())
    for param in model[0].parameters():
        param.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.named_parameters())[:2]})
    optimizer.attach(model)
    step_on(model, optimizer, model(batch(1)).square().mean())
    assert not missing(optimizer)
    layers = [layer for group in optimizer.param_groups for layer in group["layers"]]
    assert sum(map(bool, layers)) == 2


def test_a_group_added_without_attaching_again_says_so() -> None:
    model = mlp()
    for param in model[0].parameters():
        param.requires_grad_(False)
    optimizer = kfac(model)
    for param in model[0].parameters():
        param.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.named_parameters())[:2]})
    model(batch()).square().mean().backward()
    with pytest.raises(LayerInputError, match="attach"):
        optimizer.step()


def test_state_comes_back_on_an_attached_optimizer() -> None:
    model, other = mlp(), mlp()
    optimizer = kfac(model)
    for step in range(2):
        step_on(model, optimizer, model(batch(step)).square().mean())
    other.load_state_dict(model.state_dict())
    resumed = kfac(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        step_on(model, optimizer, model(batch(step)).square().mean())
        step_on(other, resumed, other(batch(step)).square().mean())
    assert_equal(weights(other), weights(model))
    assert_equal(state_of(resumed), state_of(optimizer))


# -- layers that are missed --


class Functional(nn.Module):
    """Calls one layer, and takes the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.taken = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x).tanh(), self.taken.weight, self.taken.bias)


def test_weights_used_as_tensors_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = Functional()
    optimizer = kfac(model)
    step_on(model, optimizer, model(batch()).square().mean())
    assert missing(optimizer) == 1
    assert "taken.weight" in caplog.text
    assert "called.weight" not in caplog.text


def test_weights_used_as_tensors_raise_in_the_end() -> None:
    model = Functional()
    optimizer = kfac(model, max_failures=3)
    for step in range(2):
        step_on(model, optimizer, model(batch(step)).square().mean())
    with pytest.raises(LayerInputError, match=r"'taken\.weight'.*3 in a row"):
        step_on(model, optimizer, model(batch()).square().mean())


def test_a_captured_step_ends_the_streak() -> None:
    model = Functional()
    optimizer = kfac(model, max_failures=2)
    for step in range(6):
        hidden = model.called(batch(step)).tanh()
        captured = step % 2 == 1
        y = model.taken(hidden) if captured else model(batch(step))
        step_on(model, optimizer, y.square().mean())
    assert missing(optimizer) == 3


class Branches(nn.Module):
    """Takes one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor, way: str) -> Tensor:
        return getattr(self, way)(x)


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_an_unused_layer_is_left_alone(name: str) -> None:
    model = Branches()
    optimizer = create_optimizer(
        model, name, lr=0.01, graft="none", momentum="none", update_interval=2
    )
    right = weights(model.right)
    fresh: list[Tensor] = []
    for step in range(3):
        step_on(model, optimizer, model(batch(step), "left").square().mean())
        state = [v.clone() for p in model.right.parameters() for v in optimizer.state[p].values()]
        fresh = fresh or state
    assert_equal(weights(model.right), right)
    assert_equal(state, fresh)
    assert all(int(optimizer.state[param]["step"]) == 0 for param in model.right.parameters())
    assert not missing(optimizer)
    # Its own first step is captured whenever it comes.
    alone = copy.deepcopy(model)
    theirs = create_optimizer(
        alone, name, lr=0.01, graft="none", momentum="none", update_interval=2
    )
    for each, optimizer_of in ((model, optimizer), (alone, theirs)):
        step_on(each, optimizer_of, each(batch(7), "right").square().mean())
    assert_equal(weights(model.right), weights(alone.right))


def test_multihead_attention_is_left_to_the_fallback() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model = Attending()
    optimizer = kfac(model, max_failures=1)
    for step in range(2):
        step_on(model, optimizer, model(batch(step).view(2, 4, 4)).square().mean())
    assert taken(optimizer) == {"head.weight"}
    assert not missing(optimizer)


def test_transformer_encoder_layer() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    optimizer = kfac(model, max_failures=1)
    for step in range(2):
        step_on(model, optimizer, model(batch(step).view(2, 4, 4)).square().mean())
    assert taken(optimizer) == {"linear1.weight", "linear2.weight"}


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_parametrized_weights_are_left_to_the_fallback(wrap: Any) -> None:
    """What is trained is not the weight that meets the input."""
    model = mlp()
    wrap(model[0])
    optimizer = kfac(model, max_failures=1)
    for step in range(2):
        step_on(model, optimizer, model(batch(step)).square().mean())
    assert taken(optimizer) == {"2.weight"}


# -- real models --


def test_bare_groups_of_gpt2_attached_later() -> None:
    """Its layers are transposed: views by the shape alone must not stay."""
    model = tiny_gpt2(**NO_DROPOUT)
    optimizer = create_optimizer(model.parameters(), "kfac", lr=0.01)
    optimizer.attach(model)
    step_on(model, optimizer, lm_loss(model))
    assert "transformer.h.0.mlp.c_fc.weight" in taken(optimizer)


def test_bare_groups_of_a_grouped_convolution_attached_later() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 1, groups=2), nn.Flatten()).double()
    optimizer = create_optimizer(model.parameters(), "kfac", lr=0.01)
    optimizer.attach(model)
    step_on(model, optimizer, model(batch()[..., None]).square().mean())
    assert taken(optimizer) == {"0.weight"}


def test_tied_heads_follow_the_fallback() -> None:
    model = tiny_gpt2()
    optimizer = build_optimizer(model, "kfac", lr=0.01, max_failures=1)
    for _ in range(2):
        step_on(model, optimizer, lm_loss(model))
    assert taken(optimizer) == {
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_tied_linear_layers_follow_the_fallback() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.head = nn.Linear(4, 2)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).tanh()))

    model = Tied()
    optimizer = kfac(model, max_failures=1)
    step_on(model, optimizer, model(batch()).square().mean())
    assert taken(optimizer) == {"head.weight"}


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_only_adapters_are_captured(name: str) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra dev")
    base = tiny_gpt2(**NO_DROPOUT)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config).train()
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    optimizer = build_optimizer(model, name, lr=0.01, max_failures=1)
    losses = []
    for _ in range(4):
        loss = lm_loss(model)
        losses.append(loss.item())
        step_on(model, optimizer, loss)
    assert len(taken(optimizer)) == 4
    assert all(".lora_A." in key or ".lora_B." in key for key in taken(optimizer))
    for key, param in model.named_parameters():
        if key in frozen:
            assert torch.equal(param, frozen[key])
            assert param.grad is None
    assert losses[-1] < losses[0]
    assert not missing(optimizer)


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_a_layer_whose_first_gradient_is_zero_trains(name: str) -> None:
    """The first matrix of an adapter: the second one starts at zero."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    nn.init.zeros_(model[1].weight)
    optimizer = create_optimizer(model, name, lr=0.01)
    before = weights(model)
    for step in range(4):
        step_on(model, optimizer, (model(batch(step)) - 1).square().mean())
    for old, new in zip(before, weights(model), strict=True):
        assert not torch.equal(old, new)
