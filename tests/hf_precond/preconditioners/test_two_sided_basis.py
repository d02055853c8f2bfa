"""How many columns the two-sided bases have where their user does not say."""

from __future__ import annotations

import pytest
import torch

from hf_precond.preconditioners.two_sided_basis import TwoSidedBasis

Sides = tuple[int, int]


@pytest.mark.parametrize(
    ("sides", "rank"),
    [
        ((128, 512), 32),
        ((512, 512), 128),
        ((512, 2048), 128),
        ((2048, 512), 128),
        ((768, 2048), 192),
        ((64, 64), 32),
        ((8, 4096), 32),
        ((8, 16), 16),
    ],
)
def test_rank_follows_the_smaller_side(sides: Sides, rank: int) -> None:
    shape = (1, *sides)
    algorithm = TwoSidedBasis()
    assert algorithm.effective_rank(shape) == rank
    state = algorithm.init(shape, dtype=torch.float32, device=torch.device("meta"))
    for name, side in zip(("out_basis", "in_basis"), sides, strict=True):
        assert state[name].shape == (1, side, min(side, rank))


def test_a_given_rank_is_taken() -> None:
    assert TwoSidedBasis(rank=24).effective_rank((1, 2048, 512)) == 24
    assert TwoSidedBasis(rank=600).effective_rank((1, 2048, 512)) == 600
    with pytest.raises(ValueError, match="rank = 0 is not allowed: it must be >= 1, or 'auto'"):
        TwoSidedBasis(rank=0)
