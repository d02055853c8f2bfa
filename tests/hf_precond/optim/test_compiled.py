"""``compile=true``: the same steps, compiled a few times in all and not once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond import create_optimizer
from hf_precond.linalg import fused
from hf_precond.linalg.rounding import HALF_DTYPES, round_stochastically
from tests.suite.building import assert_bit_equal, assert_same, parameter, params_of, run

SHAPES = [(5, 6), (5, 6), (4, 7), (1, 3), (6, 6), (5,), (1,), (3, 3, 2, 2)]
NAME = "muon"  # the method itself has no elementwise parts
STAGES: dict[str, dict[str, Any]] = {
    "ema, rmsprop": {"graft": "rmsprop", "momentum": "ema"},
    "heavy ball, adam": {"graft": "adam", "momentum": "heavy_ball"},
    "nesterov, adagrad": {"graft": "adagrad", "nesterov": True},
    "heavy ball ahead, normalized": {
        "graft": "rmsprop_normalized",
        "momentum": "heavy_ball",
        "nesterov": True,
    },
    "of the gradient": {"graft": "adam_normalized", "momentum_site": "gradient"},
    "none": {"graft": "sgd", "momentum": "none"},
}
TOLERANCE = 1e-6


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    backend = Counting()
    monkeypatch.setattr(fused, "BACKEND", backend)
    yield backend
    torch._dynamo.reset()


def optimizer(
    shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, **options: Any
) -> torch.optim.Optimizer:
    params = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    defaults = {"lr": 0.02, "weight_decay": 0.1, "momentum_site": "direction", "start_step": 2}
    return create_optimizer(params, NAME, **defaults | options)


@pytest.mark.parametrize("label", STAGES)
def test_equals_uncompiled(label: str, counting: Counting) -> None:
    expected = run(optimizer(**STAGES[label]), range(1, 7))
    assert counting.count == 0
    actual = run(optimizer(compile=True, **STAGES[label]), range(1, 7))
    # Without stages there is the fallback's Adam alone, in torch's own kernel.
    assert (counting.count > 0) == (label != "none")
    assert_same(actual, expected, TOLERANCE)


def test_float64_state_keeps_its_digits(counting: Counting) -> None:
    plain, compiled = (
        optimizer(dtype=torch.float64, state_dtype="float64", compile=on) for on in (False, True)
    )
    assert_same(run(compiled, range(1, 7)), run(plain, range(1, 7)), 1e-14)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_rounding_is_the_same_bit_for_bit(dtype: torch.dtype, counting: Counting) -> None:
    x = torch.randn(50, 3, 2)
    with fused.fusing(True):
        compiled = [round_stochastically(x, dtype, step) for step in range(9)]
    assert_bit_equal(compiled, [round_stochastically(x, dtype, step) for step in range(9)])
    assert counting.count == 1


@pytest.mark.parametrize(
    "options", [{}, {"stochastic_rounding": True, "state_storage": "bfloat16"}], ids=str
)
def test_steps_rates_and_layers_compile_nothing_anew(
    options: dict[str, Any], counting: Counting
) -> None:
    dtype = torch.bfloat16 if options else torch.float32
    first = optimizer(dtype=dtype, compile=True, graft="adam", **options)
    run(first, range(1, 4))
    warm = counting.count
    for step in range(4, 24):
        first.param_groups[0]["lr"] = 0.02 / step
        run(first, [step])
    assert counting.count == warm
    larger = [(7, 9), (7, 9), (8, 11), (12, 1), (9, 9), (13,)]
    run(optimizer(larger, dtype=dtype, compile=True, graft="adam", **options), range(1, 4))
    assert counting.count == warm


def test_a_parameter_left_out_compiles_nothing_anew(counting: Counting) -> None:
    """Its stack is worked on in selected rows from then on."""
    shell = optimizer([(5, 6), (5, 6), (5, 6)], compile=True)
    run(shell, range(1, 4))
    warm = counting.count
    for step in range(4, 8):
        run(shell, [step], lambda params, _: [None, *(torch.ones_like(p) for p in params[1:])])
    assert counting.count == warm


def test_a_compilation_that_fails_is_logged_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise OSError("no C++ compiler")

    monkeypatch.setattr(fused, "BACKEND", broken)
    monkeypatch.setattr(fused, "_has_failed", False)
    expected = run(optimizer(), range(1, 5))
    assert_bit_equal(run(optimizer(compile=True), range(1, 5)), expected)
    (message,) = [r.getMessage() for r in caplog.records if r.name == fused.__name__]
    assert "compile=true" in message
    assert "no C++ compiler" in message
    torch._dynamo.reset()


def test_python_without_torch_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._dynamo.is_dynamo_supported", lambda: False)
    optimizer(compile=False)
    with pytest.raises(ValueError, match="compile = True is not allowed"):
        optimizer(compile=True)


@pytest.mark.slow
def test_the_default_backend_equals_uncompiled() -> None:
    """Kernels of machine code, for state of 32 and 16 bits."""
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {"stochastic_rounding": True, "state_storage": "bfloat16"}),
    ):
        plain, compiled = (
            optimizer(dtype=dtype, graft="adam", compile=on, **options) for on in (False, True)
        )
        tolerance = TOLERANCE if dtype == torch.float32 else 2**-7
        assert_same(run(compiled, range(1, 7)), run(plain, range(1, 7)), tolerance)
        assert len(params_of(compiled)) == len(SHAPES)
    assert not fused._has_failed
