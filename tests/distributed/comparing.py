"""What tests on ranks compare: ranks with each other, and with one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond import list_optimizers
from tests.distributed.training import BLOCKWISE, STEPS, Run, Training, Weights

# What a step turns rounding into: sums over ranks are taken in another order than on one.
TOLERANCE = 1e-10
# Full second moments of ten gradients have far more null space than rank, and the roots of its
# rounding are what the gradient is divided by; SOAP's bases turn in that of its factors.
TOLERANCES = {"block_adam": 1e-8, "full_matrix_adagrad": 1e-7, "soap": 1e-8}
_FOUND: dict[str, Any] = {}


def names_for(mode: str) -> tuple[str, ...]:
    """The optimizers that a mode can spread."""
    return BLOCKWISE if mode == "blocks" else list_optimizers()


def cases(
    modes: Sequence[str], names: Sequence[str], *, every: Sequence[str] | None = None
) -> list[Any]:
    """Test parameters (name, mode); for names in ``every`` alone the slow ones."""
    return [
        pytest.param(name, mode, marks=() if name in names else pytest.mark.slow)
        for mode in modes
        for name in names_for(mode)
        if name in names or name in (every or ())
    ]


def tolerance(name: str) -> float:
    """How far several ranks may be from one, relative to a weight's largest entry."""
    return TOLERANCES.get(name, TOLERANCE)


def alone(run: Run, steps: int = STEPS) -> Weights:
    """Weights of the same run on one process; trained once for all modes."""
    key = repr((run.on("replicated"), steps))
    if key not in _FOUND:
        _FOUND[key] = Training(run.on("replicated")).take(range(steps)).weights()
    return _FOUND[key]


@cache
def layout_alone(name: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each state tensor of one process."""
    return layout(Training(Run(name=name)).take([0]).state())


def layout(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor."""
    return {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}


def bytes_of(layout: Mapping[str, tuple[torch.Size, torch.dtype]]) -> int:
    """Bytes of a state."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in layout.values())


def assert_ranks_agree(found: Sequence[Weights]) -> None:
    """Equal bit for bit on all ranks, and finite."""
    for rank, weights in enumerate(found):
        assert weights.keys() == found[0].keys()
        for name, weight in weights.items():
            assert weight.isfinite().all(), f"rank {rank}: {name} is not finite"
            apart = (weight - found[0][name]).abs().max()
            assert torch.equal(weight, found[0][name]), f"{name}: {rank} and 0 differ by {apart}"


def assert_near(actual: Weights, expected: Weights, tolerance: float) -> None:
    """Equal up to ``tolerance`` times the largest expected entry of each weight."""
    assert actual.keys() == expected.keys()
    errors = {
        name: float((actual[name].double() - weight).abs().max() / weight.double().abs().max())
        for name, weight in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, (
        f"{worst} differs by {errors[worst]:.3e} of its largest entry"
    )


def assert_equal(actual: Weights, expected: Weights) -> None:
    """Equal bit for bit."""
    assert_ranks_agree([expected, actual])


def assert_moved(actual: Weights, start: Weights) -> None:
    """Training has changed every weight."""
    still = [name for name, weight in start.items() if torch.equal(actual[name], weight)]
    assert not still
