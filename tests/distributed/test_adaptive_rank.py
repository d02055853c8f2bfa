"""Ranks of views chosen while training are the same on all ranks (processes), however the work is
spread, and those that one process chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_precond.optim.adaptive_rank import ViewRanks
from tests.distributed.comparing import (
    alone,
    assert_equal,
    assert_near,
    assert_ranks_agree,
    cases,
    tolerance,
)
from tests.distributed.ranks import MOST, Ranks
from tests.distributed.training import STEPS, Run, Training, Weights, resumed, saved

pytestmark = pytest.mark.distributed

BLOCKS, TWO = NAMES = ("shared_basis_adam", "two_sided_basis")
HALF = 5


def run_of(name: str, mode: str, **options: Any) -> Run:
    options = {"rank": "auto", "rank_interval": 2, "state_budget": 1.7} | options
    return Run(name=name, mode=mode, options=options)


def chosen(run: Run) -> tuple[Weights, list[ViewRanks | None]]:
    """Weights at the end, and the ranks after every step."""
    training = Training(run)
    ranks = [training.take([step]).optimizer.view_ranks for step in range(STEPS)]
    return training.weights(), ranks


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *cases(["fsdp2"], [BLOCKS], every=NAMES),
        *cases(["owner"], [TWO], every=NAMES),
        *cases(("replicated", "blocks", "hsdp"), (), every=NAMES),
    ],
)
def test_all_choose_what_one_process_chooses(ranks: Ranks, name: str, mode: str) -> None:
    run = run_of(name, mode)
    found = ranks.run(chosen, run, world=MOST if mode == "hsdp" else 2)
    expected, steps = chosen(run.on("replicated"))
    assert_ranks_agree([weights for weights, _ in found])
    assert [of_rank for _, of_rank in found] == len(found) * [steps]
    assert len({str(ranks) for ranks in steps}) > 2
    assert_near(found[0][0], expected, tolerance(name))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *cases(["fsdp2"], [TWO], every=NAMES),
        *cases(("blocks", "owner"), (), every=NAMES),
    ],
)
def test_written_on_some_ranks_and_read_on_others(
    ranks: Ranks, tmp_path: Path, name: str, mode: str
) -> None:
    run = run_of(name, mode)
    straight = ranks.run(saved, run, tmp_path, HALF)
    rest = range(HALF, STEPS)
    again = ranks.run(resumed, run, tmp_path, rest)
    assert_ranks_agree(again)
    assert_equal(again[0], straight[0])
    expected = alone(run)
    assert_near(resumed(run, tmp_path, rest), expected, tolerance(name))
    for world, other in ((2, "owner"), (3, "fsdp2")):
        found = ranks.run(resumed, run.on(other), tmp_path, rest, world=world)
        assert_ranks_agree(found)
        assert_near(found[0], expected, tolerance(name))
