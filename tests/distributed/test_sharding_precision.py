"""Weights and state of 16 bits on several ranks: noise made of numbers is the same on all."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.comparing import alone, assert_ranks_agree, cases
from tests.distributed.ranks import Ranks
from tests.distributed.training import FEW, Run, Weights, trained

pytestmark = pytest.mark.distributed

OPTIONS = {
    "state_dtype": "float32",
    "state_storage": "bfloat16",
    "stochastic_rounding": True,
}


@pytest.mark.parametrize(("name", "mode"), cases(("replicated", "owner", "fsdp2"), FEW))
def test_ranks_round_alike(ranks: Ranks, name: str, mode: str) -> None:
    """One process sums bf16 gradients in another order, which may turn noise over."""
    run = Run(name=name, mode=mode, dtype=torch.bfloat16, options=OPTIONS)
    found = ranks.run(trained, run, world=2)
    assert_ranks_agree(found)
    assert {weight.dtype for weight in found[0].values()} == {torch.bfloat16}
    start, expected = alone(run, steps=0), alone(run)
    assert distance(found[0], expected) < 0.5 * distance(expected, start)


def distance(one: Weights, other: Weights) -> float:
    """Norm of the difference of all weights together."""
    return (
        sum(float((one[n].double() - w.double()).square().sum()) for n, w in other.items()) ** 0.5
    )
