"""State that each rank writes for itself, read by other numbers of ranks and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import Ranks
from tests.distributed.training import Run, Training, Weights
from trainer_ext.checkpoint import DamagedCheckpointError, load_optimizer, save_optimizer

pytestmark = pytest.mark.distributed

STEPS = 3
AUTO = {"rank": "auto", "rank_interval": 2, "state_budget": 1.7}
MODES = [
    ("shared_basis_adam", "fsdp2"),
    pytest.param("shared_basis_adam", "blocks", marks=pytest.mark.slow),
    pytest.param("block_adam", "fsdp2", marks=pytest.mark.slow),
    pytest.param("soap", "fsdp2", marks=pytest.mark.slow),
    ("soap", "owner"),
]


def written(run: Run, folder: Path) -> tuple[Weights, list[str]]:
    training = Training(run).take(range(STEPS))
    save_optimizer(training.optimizer, folder, by_rank=True)
    return training.state(), sorted(path.name for path in folder.iterdir())


def read(run: Run, folder: Path) -> Weights:
    training = Training(run)
    load_optimizer(training.optimizer, folder)
    return training.state()


def refused(run: Run, folder: Path) -> str:
    """The message with which a damaged state is refused; nothing is loaded then."""
    training = Training(run).take(range(1))
    before = training.state()
    with pytest.raises(DamagedCheckpointError) as error:
        load_optimizer(training.optimizer, folder)
    after = training.state()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(error.value)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_any_ranks_read_what_four_have_written(
    ranks: Ranks, tmp_path: Path, name: str, mode: str
) -> None:
    _check_readers(ranks, tmp_path, Run(name=name, mode=mode))


def test_any_ranks_read_views_of_other_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """Under rank='auto' the reader begins with other shapes of state than it is to read."""
    _check_readers(ranks, tmp_path, Run(name="shared_basis_adam", mode="fsdp2", options=AUTO))


def _check_readers(ranks: Ranks, tmp_path: Path, run: Run) -> None:
    (state, files), *_ = ranks.run(written, run, tmp_path)
    assert files == [
        *(f"optimizer-rank-0000{rank}-of-00004.safetensors" for rank in range(4)),
        "optimizer.ranks.json",
    ]
    readers = [(4, run.mode), (2, run.mode), (1, run.mode), (3, "owner")]
    for world, other in readers:
        found = ranks.run(read, run.on(other), tmp_path, world=world)[0]
        assert found.keys() == state.keys()
        assert [key for key in state if not torch.equal(found[key], state[key])] == []


@pytest.mark.parametrize("damage", ["flipped", "missing", "index"])
def test_a_damaged_file_is_refused_on_all_ranks(ranks: Ranks, tmp_path: Path, damage: str) -> None:
    run = Run(name="shared_basis_adam", mode="fsdp2")
    ranks.run(written, run, tmp_path, world=2)
    victim = tmp_path / "optimizer-rank-00001-of-00002.safetensors"
    if damage == "flipped":
        content = bytearray(victim.read_bytes())
        content[-3] ^= 4
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        victim = tmp_path / "optimizer.ranks.json"
        index = json.loads(victim.read_text())
        victim.write_text(json.dumps({**index, "sha256": {"../elsewhere": "0"}}))
    for message in ranks.run(refused, run, tmp_path, world=2):
        assert victim.name in message
