"""State written on some ranks is read on any other number of them, in any other mode."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from hf_precond import list_optimizers
from tests.distributed.comparing import (
    alone,
    assert_equal,
    assert_near,
    assert_ranks_agree,
    cases,
    tolerance,
)
from tests.distributed.ranks import MOST, Ranks
from tests.distributed.training import FEW, STEPS, Run, Training, Weights, resumed, saved
from trainer_ext.checkpoint import read_state, save_optimizer

pytestmark = pytest.mark.distributed

# Odd, so that what is due every other step is in the middle of an interval.
HALF = 5
REST = range(HALF, STEPS)
WRITERS = cases(("owner", "blocks", "fsdp2"), FEW)
READERS = ((2, "owner"), (3, "fsdp2"))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *cases(["fsdp2"], ["shared_basis_adagrad"], every=list_optimizers()),
        *cases(["owner"], ["kfac"], every=list_optimizers()),
        *cases(["blocks"], (), every=list_optimizers()),
        *cases(("replicated", "fsdp2-owner"), (), every=list_optimizers()),
    ],
)
def test_written_on_four_ranks_and_read_on_others(
    ranks: Ranks, tmp_path: Path, name: str, mode: str
) -> None:
    run = Run(name=name, mode=mode)
    straight = ranks.run(saved, run, tmp_path, HALF)
    again = ranks.run(resumed, run, tmp_path, REST)
    assert_ranks_agree(again)
    assert_equal(again[0], straight[0])
    assert_near(resumed(run, tmp_path, REST), alone(run), tolerance(name))
    for world, other in READERS:
        found = ranks.run(resumed, run.on(other), tmp_path, REST, world=world)
        assert_ranks_agree(found)
        assert_near(found[0], alone(run), tolerance(name))


@pytest.mark.parametrize(("name", "mode"), WRITERS)
def test_written_on_one_rank_and_read_on_four(
    ranks: Ranks, tmp_path: Path, name: str, mode: str
) -> None:
    run = Run(name=name, mode=mode)
    saved(run, tmp_path, HALF)
    found = ranks.run(resumed, run, tmp_path, REST)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run), tolerance(name))


def files_of(run: Run, folder: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What lies in the folder as soon as a rank has saved, and the whole state."""
    training = Training(run).take(range(2))
    save_optimizer(training.optimizer, folder)
    return sorted(path.name for path in folder.iterdir()), training.state()


@pytest.mark.parametrize("mode", ["owner", "blocks", "fsdp2"])
def test_one_rank_writes_and_none_goes_on_before(ranks: Ranks, tmp_path: Path, mode: str) -> None:
    found = ranks.run(files_of, Run(name="shared_basis_adam", mode=mode), tmp_path)
    assert [names for names, _ in found] == MOST * [["optimizer.safetensors"]]
    tensors, _ = read_state(tmp_path)
    for _, state in found:
        assert_equal(state, tensors)


# -- state dicts --


def reloaded(run: Run, half: int, *, through_file: bool) -> tuple[Weights, Weights]:
    """Uninterrupted, and through a state dict into an optimizer that has done other steps."""
    training = Training(run).take(range(half))
    state = training.optimizer.state_dict()
    weights = training.weights()
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=False)
    other = Training(run).take(range(20, 23))
    other.optimizer.load_state_dict(state)
    other.load_weights(weights)
    rest = range(half, STEPS)
    return training.take(rest).weights(), other.take(rest).weights()


@pytest.mark.parametrize(
    ("name", "mode", "through_file"),
    [
        *(pytest.param(*case.values, False, marks=case.marks) for case in WRITERS),
        ("kfac", "owner", True),
        ("shared_basis_adagrad", "fsdp2", True),
    ],
)
def test_a_state_dict_is_taken_back_bit_for_bit(
    ranks: Ranks, name: str, mode: str, through_file: bool
) -> None:
    found = ranks.run(reloaded, Run(name=name, mode=mode), HALF, through_file=through_file, world=2)
    for straight, again in found:
        assert_equal(again, straight)


def sizes_in_dict(run: Run) -> dict[int, dict[str, int]]:
    """Elements of every tensor of the state dict; of the whole where it is spread."""
    state = Training(run).take(range(2)).optimizer.state_dict()["state"]
    return {index: {key: t.numel() for key, t in of.items()} for index, of in state.items()}


@pytest.mark.parametrize(("name", "mode"), cases(("owner", "fsdp2"), FEW, every=list_optimizers()))
def test_a_state_dict_has_whole_tensors(ranks: Ranks, name: str, mode: str) -> None:
    """Where a DTensor can say how they are spread, in the shape of the parameter."""
    run = Run(name=name, mode=mode)
    expected = sizes_in_dict(run)
    for found in ranks.run(sizes_in_dict, run, world=2):
        assert found == expected


@pytest.mark.parametrize("mode", ["owner", "fsdp2"])
def test_a_state_dict_before_the_first_step_is_empty(ranks: Ranks, mode: str) -> None:
    assert ranks.run(empty_state, Run(name="soap", mode=mode), world=2) == [True, True]


def empty_state(run: Run) -> bool:
    """Whether an optimizer that has done nothing has no state, and can take that back."""
    optimizer = Training(run).optimizer
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    return not state["state"]
