"""Algorithm 8: steps made of columns, and a backward pass that does not form gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_precond import PreconditionedOptimizer, create_optimizer, resolve
from tests.driving import assert_apart, assert_near

OPTIONS: dict[str, Any] = {
    "damping": 0.1,
    "rank": 4,
    "max_columns": 16,
    "factor_form": "brand",
    "brand_interval": 2,
    "graft": "none",
    "momentum_site": "direction",
    "state_dtype": "float64",
    "lr": 0.05,
    "weight_decay": 0.1,
}
LINEAR = {"application": "linear"}
ALONE = {"application": "linear", "form_gradient": False}


def net() -> nn.Sequential:
    """Wider than its batches of 16."""
    torch.manual_seed(0)
    wide = [nn.Linear(6, 48), nn.Tanh(), Conv1D(64, 48), nn.Tanh(), nn.Linear(64, 40, bias=False)]
    return nn.Sequential(*wide, nn.Tanh(), nn.Linear(40, 3)).double()


def train(
    model: nn.Module, optimizer: PreconditionedOptimizer, *, clip: float | None = None
) -> list[Tensor]:
    """Eight steps of two micro-batches each; ``clip`` by torch."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(8):
        x = torch.randn(16, 6, generator=rng, dtype=torch.float64)
        optimizer.zero_grad()
        for part in x.chunk(2):
            ((model(part) - torch.sin(part[:, :3])).square().mean() / 2).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def trained(*, clip: float | None = None, **options: Any) -> list[Tensor]:
    model = net()
    return train(model, create_optimizer(model, "b_kfac", **{**OPTIONS, **options}), clip=clip)


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other, tolerance)


@pytest.mark.parametrize("options", [LINEAR, ALONE], ids=["formed", "alone"])
@pytest.mark.parametrize("name", ["b_kfac", "b_r_kfac", "b_kfac_c"])
def test_equals_the_plain_application(name: str, options: dict[str, Any]) -> None:
    intervals = {"rsvd_interval": 3, "correction_interval": 3}
    models = [net(), net()]
    chosen = [{}, options]
    weights = []
    for model, more in zip(models, chosen, strict=True):
        known = OPTIONS | more
        if name != "b_kfac":
            key = "rsvd_interval" if name == "b_r_kfac" else "correction_interval"
            known[key] = intervals[key]
        weights.append(train(model, create_optimizer(model, name, **known)))
    # Decompositions of a factor magnify rounding where eigenvalues lie close together.
    assert_same(weights[1], weights[0], 1e-10 if name == "b_kfac" else 1e-8)


@pytest.mark.parametrize("options", [LINEAR, ALONE], ids=["formed", "alone"])
def test_statistics_draw_from_more_columns_than_they_take(options: dict[str, Any]) -> None:
    assert_same(trained(max_columns=5, **options), trained(max_columns=5, **LINEAR))


def test_more_columns_than_width_fall_back_to_the_gradient() -> None:
    """A batch of 16 is wider than a layer of 8: then the product is formed after all."""

    def run(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        return train(model, create_optimizer(model, "b_kfac", **{**OPTIONS, **options}))

    assert_same(run(**ALONE), run())


def test_layers_of_one_shape_need_not_all_have_gradients() -> None:
    """The first layer's gradient is formed; it is stacked with layers whose gradients are not."""

    def run(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        layers = [nn.Linear(24, 24) for _ in range(3)]
        model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(24, 3)).double()
        optimizer = create_optimizer(model, "b_kfac", **{**OPTIONS, "lr": 0.01, **options})
        rng = torch.Generator().manual_seed(1)
        for _ in range(5):
            x = torch.randn(8, 24, generator=rng, dtype=torch.float64)
            optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
        return [param.detach() for param in model.parameters()]

    expected = run()
    assert_same(run(**LINEAR), expected)
    assert_same(run(**ALONE), expected)


def test_gradients_are_not_formed() -> None:
    model = net()
    optimizer = create_optimizer(model, "b_kfac", **OPTIONS, **ALONE)
    model(torch.randn(16, 6, dtype=torch.float64)).sum().backward()
    missing = [name for name, param in model.named_parameters() if param.grad is None]
    # The first layer's input has no gradient: its weight's is formed. Biases cost nothing.
    assert missing == ["2.weight", "4.weight", "6.weight"]
    assert all(param.requires_grad for param in model.parameters())
    optimizer.detach()
    optimizer.zero_grad()
    model(torch.randn(16, 6, dtype=torch.float64)).sum().backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("options", [{}, LINEAR, ALONE], ids=["plain", "formed", "alone"])
def test_the_global_norm_is_clipped_with_gradients_that_were_not_formed(
    options: dict[str, Any],
) -> None:
    limit = 0.05
    expected = trained(clip=limit)
    assert_same(trained(max_grad_norm=limit, **options), expected, 1e-6)
    assert_apart(trained()[0], expected[0], 1e-3)


def test_the_trainers_clipping_reaches_the_columns() -> None:
    assert_same(trained(clip=0.05, **LINEAR), trained(clip=0.05))


def test_no_gradient_at_all_need_be_formed() -> None:
    """An input that has a gradient, and no bias: columns are all there is."""
    model = nn.Linear(24, 20, bias=False).double()
    optimizer = create_optimizer(model, "b_kfac", **OPTIONS, **ALONE)
    before = model.weight.detach().clone()
    x = torch.randn(8, 24, dtype=torch.float64, requires_grad=True)
    model(x).square().mean().backward()
    assert model.weight.grad is None
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_a_changed_input_without_a_gradient_is_an_error() -> None:
    """Under autocast autograd keeps a copy of its own and does not complain."""
    model = nn.Linear(24, 20, bias=False)
    options = {**OPTIONS, **ALONE, "state_dtype": "float32"}
    optimizer = create_optimizer(model, "b_kfac", **options)
    x = torch.randn(8, 24, requires_grad=True) * 1.0
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    with torch.no_grad():
        x.zero_()
    y.float().square().mean().backward()
    with pytest.raises(RuntimeError, match="form_gradient"):
        optimizer.step()


def test_a_failed_forward_leaves_the_weight_trainable() -> None:
    model = net()
    optimizer = create_optimizer(model, "b_kfac", **OPTIONS, **ALONE)
    with pytest.raises(RuntimeError):
        model[4](torch.randn(2, 7, dtype=torch.float64, requires_grad=True))
    assert model[4].weight.requires_grad
    del optimizer


def test_a_copy_of_the_model_forms_its_gradients() -> None:
    model = net()
    optimizer = create_optimizer(model, "b_kfac", **OPTIONS, **ALONE)
    twin = copy.deepcopy(model)
    twin(torch.randn(16, 6, dtype=torch.float64)).sum().backward()
    assert all(param.grad is not None for param in twin.parameters())
    del optimizer


def test_a_nan_leaves_the_step_of_its_layer_out() -> None:
    model = net()
    optimizer = create_optimizer(model, "b_kfac", **OPTIONS, **ALONE)
    before = [param.detach().clone() for param in model.parameters()]
    (model(torch.randn(16, 6, dtype=torch.float64)).sum() * torch.nan).backward()
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.health()["skipped_nonfinite"] == len(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form_gradient": False, "application": "plain"}, "application"),
        ({**ALONE, "graft": "adam"}, "graft = 'adam'"),
        ({**ALONE, "start_step": 5}, "start_step = 5"),
        ({**ALONE, "clip_mode": "kl"}, "clip_mode = 'kl'"),
        ({**LINEAR, "momentum_site": "gradient"}, "momentum_site"),
        ({"max_columns": None}, "max_columns"),
        ({**ALONE, "weight_sharing": "reduce"}, "weight_sharing"),
    ],
    ids=str,
)
def test_what_needs_a_gradient_is_refused(options: dict[str, Any], message: str) -> None:
    stages = {"graft": "none", "momentum_site": "direction"}
    with pytest.raises(ValueError, match=message):
        resolve("b_kfac", stages | options)
