"""What a piece of code computes and allocates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer_ext.dry_run import DryRun

BATCH, ROWS, INNER, COLUMNS = 2, 3, 5, 4
FLOPS = 2 * BATCH * ROWS * INNER * COLUMNS
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "bmm": lambda x, a, b: a @ b,
    "baddbmm": lambda x, a, b: torch.baddbmm(x, a, b, alpha=-1),
    "baddbmm_": lambda x, a, b: x.baddbmm_(a, b, beta=0.5),
    "mm": lambda x, a, b: [one @ two for one, two in zip(a, b, strict=True)],
    "addmm_": lambda x, a, b: [c.addmm_(one, two) for c, one, two in zip(x, a, b, strict=True)],
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_place_or_not_count_alike(name: str, device: str) -> None:
    x, a, b = (
        torch.ones(BATCH, *shape, device=device)
        for shape in ((ROWS, COLUMNS), (ROWS, INNER), (INNER, COLUMNS))
    )
    with torch.no_grad(), DryRun() as run:
        PRODUCTS[name](x, a, b)
    assert run.operations.products == FLOPS


def test_decompositions_have_textbook_counts() -> None:
    square = torch.eye(6).expand(2, 6, 6)
    with DryRun() as run:
        torch.linalg.eigh(square)
        torch.linalg.cholesky(square)
    assert run.operations.decompositions == pytest.approx(2 * 6**3 * (9 + 1 / 3))
    assert run.operations.products == 0


def test_memory_is_what_lives_at_once() -> None:
    with DryRun() as run:
        first = torch.ones(100, device="meta")
        second = first * 2
        del first
        third = second.view(10, 10).add_(1)
        assert run.live == 400
    assert run.peak == 800
    assert run.operations.elementwise == 200
    assert third.shape == (10, 10)
