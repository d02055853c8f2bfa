"""Stochastic rounding: right in the mean, exact where it can be, alike wherever a number lies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.rounding import HALF_DTYPES, round_stochastically

STEPS = 400


def gap(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of the two numbers of ``dtype`` around x, in float64."""
    info = torch.finfo(dtype)
    magnitude = x.double().abs().clamp(min=info.tiny)
    return info.eps * torch.exp2(torch.floor(torch.log2(magnitude)))


def rounded(x: Tensor, dtype: torch.dtype, steps: int = STEPS) -> Tensor:
    """Results of as many steps, in float64 ``[steps, ...]``."""
    return torch.stack([round_stochastically(x, dtype, t).double() for t in range(1, steps + 1)])


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e-6, 1e4], ids=str)
def test_the_mean_is_exact(dtype: torch.dtype, scale: float, generator: torch.Generator) -> None:
    """3e-6 is below float16's normal numbers. Errors are those of independent noise, not less."""
    x = scale * torch.randn(5000, generator=generator)
    errors = (rounded(x, dtype) - x.double()) / gap(x, dtype)
    assert errors.abs().max() <= 1
    assert abs(errors.mean()) < 4 * math.sqrt(1 / 6 / errors.numel())
    # A uniform share p of the gap has variance p (1 - p), 1/6 in the mean.
    assert errors.mean(0).std() * math.sqrt(STEPS) == pytest.approx(math.sqrt(1 / 6), rel=0.06)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
def test_one_number_is_right_in_the_mean_over_steps(dtype: torch.dtype, share: float) -> None:
    x = torch.tensor(1 + share * torch.finfo(dtype).eps)
    ups = (rounded(x, dtype, 10_000) > 1).double().mean()
    assert ups == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 10_000))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_neighbours_and_steps_are_rounded_independently(dtype: torch.dtype) -> None:
    x = 1 + torch.arange(4000) * 2.0**-23
    errors = rounded(x, dtype, 60) - x.double()
    beside = torch.stack([errors[:, :-1].flatten(), errors[:, 1:].flatten()])
    for series in (errors, beside):
        others = torch.corrcoef(series) - torch.eye(len(series))
        assert others.abs().max() < 5 / math.sqrt(series.shape[1])


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 2, 12345, 2**40])
def test_what_the_dtype_holds_stays(dtype: torch.dtype, step: int) -> None:
    """Every one of its 65,536 bit patterns, subnormals, infinities and NaN included."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    result = round_stochastically(every.float(), dtype, step)
    assert result.dtype == dtype
    assert torch.equal(result.isnan(), every.isnan())
    number = ~every.isnan()
    assert torch.equal(result[number], every[number])


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_nan_stays_whatever_its_payload(dtype: torch.dtype) -> None:
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF]).to(torch.int32)
    for step in range(1, 50):
        assert round_stochastically(payloads.view(torch.float32), dtype, step).isnan().all()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_place_shape_and_layout_change_nothing(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """So neither stacks nor shards do."""
    x = torch.randn(6, 4, 3, 5, generator=generator)
    whole = round_stochastically(x, dtype, 7)
    order = torch.randperm(x.numel(), generator=generator)
    shuffled = round_stochastically(x.flatten()[order], dtype, 7)
    assert torch.equal(shuffled, whole.flatten()[order])
    assert torch.equal(round_stochastically(x[2:3], dtype, 7), whole[2:3])
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(round_stochastically(last, dtype, 7), whole)
    assert torch.equal(round_stochastically(x.mT, dtype, 7), whole.mT)
    assert not torch.equal(round_stochastically(x, dtype, 8), whole)


def test_float64_is_taken_too(generator: torch.Generator) -> None:
    x = torch.randn(100, generator=generator, dtype=torch.float64)
    expected = round_stochastically(x.float(), torch.bfloat16, 3)
    assert torch.equal(round_stochastically(x, torch.bfloat16, 3), expected)


def test_nothing_and_one_number_are_taken() -> None:
    assert round_stochastically(torch.zeros(0, 3), torch.bfloat16, 1).shape == (0, 3)
    assert round_stochastically(torch.tensor(2.0), torch.float16, 1) == 2


def test_the_argument_is_left_alone(generator: torch.Generator) -> None:
    x = torch.randn(100, generator=generator)
    before = x.clone()
    for dtype in HALF_DTYPES:
        round_stochastically(x, dtype, 1)
    assert torch.equal(x, before)
