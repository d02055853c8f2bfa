from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError, eigh, eigvalsh
from hf_precond.linalg.svd import thin_svd

TOLERANCE = 1e-12
OURS = {"eigh": eigh, "eigvalsh": eigvalsh, "svd": thin_svd}


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


@pytest.mark.parametrize("function", ["eigh", "eigvalsh", "svd"])
def test_not_a_number_without_a_word_is_retried_in_float64(
    monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """As a LAPACK has answered for a finite matrix of low rank, at one place in a stack."""
    a = symmetric(2, dtype=torch.float32)
    solver = getattr(torch.linalg, function)

    def silent(x: Tensor, **options: bool) -> Tensor | tuple[Tensor, ...]:
        found = solver(x, **options)
        if x.dtype == torch.float32:
            for part in (found,) if isinstance(found, Tensor) else found:
                part[-1].fill_(torch.nan)
        return found

    decompose: Callable[[Tensor], Any] = OURS[function]
    expected = decompose(a)
    monkeypatch.setattr(torch.linalg, function, silent)
    found = decompose(a)
    for new, old in zip(_parts(found), _parts(expected), strict=True):
        torch.testing.assert_close(new.abs(), old.abs(), rtol=1e-4, atol=1e-5)


def _parts(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


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
