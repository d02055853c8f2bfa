"""The fallback's Adam in torch's fused kernel: the same step as the shell's own, where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_precond import create_optimizer
from hf_precond.optim import fused_adam


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4), nn.LayerNorm(4))
    return layers.to(dtype)


def trained(
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
    *,
    dtype: torch.dtype = torch.float64,
    spoil: Callable[[int, list[Tensor]], None] = lambda step, params: None,
    **options: Any,
) -> tuple[list[Tensor], list[dict[str, Tensor]], int]:
    """Weights and states after five steps, and how often the kernel was used."""
    calls = []
    with monkeypatch.context() as patch:
        real = fused_adam.step_

        def counted(*args: Any) -> None:
            calls.append(1)
            real(*args)

        patch.setattr(fused_adam, "step_", counted)
        if not fused:
            patch.setattr(fused_adam, "can_fuse", lambda *_: False)
        model = model_of(dtype)
        state = "float64" if dtype == torch.float64 else "float32"
        options = {"lr": 0.05, "weight_decay": 0.1, "state_dtype": state, **options}
        optimizer = create_optimizer(model, "two_sided_basis", **options)
        params = list(model.parameters())
        generator = torch.Generator().manual_seed(1)
        for step in range(5):
            for param in params:
                drawn = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                param.grad = drawn.to(param.dtype)
            spoil(step, params)
            optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p] for p in params], len(calls)


def assert_equal_but_for_rounding(monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    own, own_states, none = trained(False, monkeypatch, **options)
    found, states, calls = trained(True, monkeypatch, **options)
    assert none == 0
    for a, b in zip(own, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for one, other in zip(own_states, states, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-12, atol=1e-13)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0},
        {"fallback_lr_ratio": 0.3},
        {"fallback_beta1": 0.5, "fallback_eps": 1e-3, "betas": (0.8, 0.95)},
        {"lr_schedule": "1/0.5@step3"},
        {"lr": torch.tensor(0.05, dtype=torch.float64)},
    ],
    ids=str,
)
def test_it_is_the_shells_own_step(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert assert_equal_but_for_rounding(monkeypatch, **options) >= 5


def test_it_is_torchs_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, _ = trained(True, monkeypatch)
    model = model_of()
    torch.manual_seed(0)
    reference = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        reference.step()
    torch.testing.assert_close(found[0], next(model.parameters()), rtol=1e-12, atol=1e-13)


def test_parameters_that_miss_a_step_keep_their_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(step: int, params: list[Tensor]) -> None:
        if step == 1:
            params[0].grad = None
        if step == 2:
            assert params[2].grad is not None
            params[2].grad[0] = torch.nan

    assert_equal_but_for_rounding(monkeypatch, spoil=spoil)
    _, states, _ = trained(True, monkeypatch, spoil=spoil)
    assert [int(state["step"]) for state in states] == [4, 5, 4, 5, 5]


def test_what_the_kernel_cannot_take_goes_the_shells_way(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, calls = trained(True, monkeypatch, dtype=torch.bfloat16)
    assert calls == 0  # weights of 16 bits beside moments of 32
    *_, calls = trained(True, monkeypatch, dtype=torch.float32, state_storage="bfloat16")
    assert calls == 0
    *_, calls = trained(True, monkeypatch, fallback="sgd")
    assert calls == 0

    def transpose(step: int, params: list[Tensor]) -> None:
        assert params[0].grad is not None
        params[0].grad = params[0].grad.t().contiguous().t()

    own, *_ = trained(False, monkeypatch, spoil=transpose)
    found, *_ = trained(True, monkeypatch, spoil=transpose)
    torch.testing.assert_close(own[0], found[0], rtol=1e-12, atol=1e-13)
