from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.norms import group_squares, norms

SHAPES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "long rows": lambda dtype: torch.randn(3, 5, 100, dtype=dtype),
    "short rows": lambda dtype: torch.randn(3, 50, 4, dtype=dtype),
    "columns": lambda dtype: torch.randn(3, 100, 5, dtype=dtype).mT,
    "with gaps": lambda dtype: torch.randn(3, 5, 200, dtype=dtype)[..., ::2],
    "no entries": lambda dtype: torch.randn(3, 0, 100, dtype=dtype),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norms_are_those_of_all_entries(shape: str, dtype: torch.dtype) -> None:
    tensors = [SHAPES[shape](dtype), torch.randn(7, dtype=dtype), torch.tensor(-2.0, dtype=dtype)]
    found = norms(tensors)
    assert [norm.dtype for norm in found] == [dtype] * 3
    expected = [tensor.double().square().sum().sqrt().to(dtype) for tensor in tensors]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_squares_are_those_of_each_group(shape: str) -> None:
    x = SHAPES[shape](torch.float64)
    torch.testing.assert_close(group_squares(x), x.square().sum((-2, -1)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = torch.randn(4, 100)
    x[2, 3] = bad
    (norm,) = norms([x])
    assert not torch.isfinite(norm)


def test_no_tensors() -> None:
    assert norms([]) == []
