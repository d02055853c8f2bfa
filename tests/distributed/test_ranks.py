"""The harness itself: what ranks bring back, and that a failure is told and never hangs."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import MOST, RankError, Ranks

pytestmark = pytest.mark.distributed


def summed(value: int) -> tuple[int, int, torch.Tensor]:
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total


def fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} has had enough")
    dist.barrier()


def dies_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def hangs_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(100)


@pytest.mark.parametrize("world", [1, 2, 3, MOST])
def test_ranks_of_every_group_reach_each_other(ranks: Ranks, world: int) -> None:
    found = ranks.run(summed, 5, world=world)
    total = sum(5 + rank for rank in range(world))
    assert found == [(rank, world, torch.tensor([total])) for rank in range(world)]


def test_a_failure_names_the_rank_and_ends_the_others(ranks: Ranks) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 has had enough"):
        ranks.run(fails_on, 1)
    assert time.monotonic() - start < 20
    assert len(ranks.run(summed, 0)) == MOST


def test_a_dead_rank_is_told(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="rank 2: died with exit code 7"):
        ranks.run(dies_on, 2)


def test_a_hanging_rank_shows_where(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 0: was not done in time\n(.*\n)*.*hangs_on"):
        ranks.run(hangs_on, 0, world=2, timeout=5)
