from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError, eigh, eigvalsh

TOLERANCE = 1e-12


def symmetric(*batch: int, size: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    a = torch.randn(*batch, size, size, dtype=dtype)
    return a + a.mT


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 200)], ids=str)
def test_eigh_diagonalises_with_ascending_values(batch: tuple[int, ...]) -> None:
    a = symmetric(*batch)
    values, vectors = eigh(a)
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.mT
    torch.testing.assert_close(rebuilt, a, rtol=TOLERANCE, atol=TOLERANCE)
    assert (values.diff() >= 0).all()
    torch.testing.assert_close(eigvalsh(a), values, rtol=TOLERANCE, atol=TOLERANCE)


def test_threads_change_nothing() -> None:
    a = symmetric(600)
    one = eigh(a)
    torch.set_num_threads(2)
    try:
        two = eigh(a)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("function", ["eigh", "eigvalsh"])
def test_a_failure_is_retried_in_float64(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    a = symmetric(2, dtype=torch.float32)
    expected = torch.linalg.eigvalsh(a)
    fail_below(monkeypatch, function, torch.float64)
    found = eigvalsh(a) if function == "eigvalsh" else eigh(a)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("solve", [eigh, eigvalsh])
def test_a_lasting_failure_raises(solve: Callable[[Tensor], object]) -> None:
    with pytest.raises(DecompositionError, match=r"\(2, 4, 4\)"):
        solve(torch.full((2, 4, 4), torch.nan))


def fail_below(monkeypatch: pytest.MonkeyPatch, function: str, dtype: torch.dtype) -> None:
    """Lets a solver of torch fail for every dtype but one."""
    solver = getattr(torch.linalg, function)

    def picky(a: Tensor) -> Tensor:
        if a.dtype != dtype:
            raise torch.linalg.LinAlgError("did not converge")
        return solver(a)

    monkeypatch.setattr(torch.linalg, function, picky)
