"""Optimizer states that were damaged or forged: one clear error and nothing changed, or no harm.

Every mutation (``mutations.py``) is drawn often, from seeds, so that a failure can be repeated. A
load either raises one of the two errors and leaves the optimizer bit for bit as it was, or what it
loads is the state that was saved.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_precond import PreconditionedOptimizer, create_optimizer
from hf_precond.optim.flat_state import StateMismatchError
from tests.faults.mutations import (
    PAYLOAD_NAME,
    SHARDED,
    SINGLE,
    Mutation,
    forged_tensor,
    on_the_file,
    rewrite,
    swap_equal_tensors,
)
from tests.suite.building import random_grads, state_tensors
from trainer_ext import checkpoint
from trainer_ext.checkpoint import (
    FILE_NAME,
    INDEX_NAME,
    DamagedCheckpointError,
    check_files,
    load_optimizer,
    save_optimizer,
)

DRAWS = 20
NAME = "shared_basis_adagrad"
OPTIONS: dict[str, Any] = {"rank": 2, "update_interval": 1, "root_interval": 1, "start_step": 1}
ERRORS = (DamagedCheckpointError, StateMismatchError)

Snapshot = tuple[dict[str, Tensor], Any]


def make(
    name: str = NAME, steps: int = 3, seed: int = 0, **options: Any
) -> PreconditionedOptimizer:
    """An optimizer of two equal layers and one more after a few steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    optimizer = create_optimizer(model, name, lr=0.1, weight_decay=0.2, **{**OPTIONS, **options})
    params = list(model.parameters())
    for step in range(steps):
        for param, grad in zip(params, random_grads(params, step), strict=True):
            param.grad = grad
        optimizer.step()
    return optimizer


def snapshot(optimizer: PreconditionedOptimizer) -> Snapshot:
    """Copies of all state tensors and of the values of the param groups."""
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    tensors = {
        key: tensor.clone() for key, tensor in state_tensors(optimizer).items() if optimizer.state
    }
    return tensors, copy.deepcopy(groups)


def same(one: Snapshot, two: Snapshot) -> bool:
    """Equal bit for bit."""
    return (
        one[1] == two[1]
        and one[0].keys() == two[0].keys()
        and all(
            a.dtype == two[0][key].dtype and torch.equal(a, two[0][key])
            for key, a in one[0].items()
        )
    )


class Bench:
    """A saved state, one file and in shards, and an optimizer to load its mutants into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        saved = make()
        self.saved = snapshot(saved)
        save_optimizer(saved, folder / "single")
        save_optimizer(saved, folder / "sharded", max_shard_size=600)
        assert len(list((folder / "sharded").iterdir())) > 3
        self._renew_target()

    def _renew_target(self) -> None:
        self.target = make(steps=5, seed=1)
        self.before = snapshot(self.target)

    def load_mutant(self, kind: str, mutation: Mutation, seed: int) -> Exception | None:
        """Loads one mutant, checks the outcome and returns the error."""
        mutant = self.folder / "mutant"
        shutil.rmtree(mutant, ignore_errors=True)
        shutil.copytree(self.folder / kind, mutant)
        mutation(mutant, Random(seed))
        error = self._load(mutant)
        now = snapshot(self.target)
        assert not (mutant / PAYLOAD_NAME).exists(), f"seed {seed}: code was executed"
        if error is None:
            assert same(now, self.saved), f"seed {seed}: something else was loaded"
            self._renew_target()
        else:
            assert same(now, self.before), f"seed {seed}: partly loaded"
            assert 20 < len(str(error)) < 2000
        return error

    def _load(self, folder: Path) -> Exception | None:
        try:
            load_optimizer(self.target, folder)
        except ERRORS as error:
            return error
        return None


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The saved state, once; options that mutants change need no line in the log each."""
    logging.getLogger("trainer_ext").setLevel(logging.ERROR)
    yield Bench(tmp_path_factory.mktemp("states"))
    logging.getLogger("trainer_ext").setLevel(logging.INFO)


def test_what_was_saved_is_what_is_loaded(bench: Bench) -> None:
    for kind in ("single", "sharded"):
        assert bench.load_mutant(kind, lambda folder, rng: None, 0) is None


@pytest.mark.parametrize("mutation", SINGLE, ids=lambda mutation: mutation.__name__)
def test_a_mutated_file_is_refused_or_harmless(mutation: Mutation, bench: Bench) -> None:
    outcomes = [bench.load_mutant("single", on_the_file(mutation), seed) for seed in range(DRAWS)]
    assert any(outcomes)
    if mutation in (swap_equal_tensors, forged_tensor):
        assert all(outcomes)


@pytest.mark.parametrize("mutation", SHARDED, ids=lambda mutation: mutation.__name__)
def test_mutated_shards_are_refused_or_harmless(mutation: Mutation, bench: Bench) -> None:
    assert any(bench.load_mutant("sharded", mutation, seed) for seed in range(DRAWS))


def test_enough_mutants_are_drawn() -> None:
    assert DRAWS * (len(SINGLE) + len(SHARDED)) >= 300


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_files_are_checked_without_an_optimizer(kind: str, bench: Bench) -> None:
    check_files(bench.folder / kind)
    broken = bench.folder / f"broken {kind}"
    shutil.copytree(bench.folder / kind, broken)
    last = sorted(broken.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedCheckpointError, match="sha256 does not match"):
        check_files(broken)


# --- states of others -----------------------------------------------------------------------------

FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"name": "shared_basis_adam"}, "optimizer: expected"),
    "rank": ({"rank": 3}, r"shape of '.*expected \[.*\], found \[.*\]"),
    "graft": ({"graft": "none"}, "do not fit: missing .*unknown .*hyperparameters changed"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_state_of_another_layout_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = FOREIGN[case]
    save_optimizer(make(**changes), tmp_path)
    target = make(steps=5, seed=1)
    before = snapshot(target)
    with pytest.raises(StateMismatchError, match=message):
        load_optimizer(target, tmp_path)
    assert same(snapshot(target), before)


@pytest.fixture
def warnings_of_ours(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The lines of the package logger, which does not propagate to the root."""
    logger = logging.getLogger("trainer_ext")
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


CHANGED: dict[str, tuple[Any, str]] = {
    "betas": ((0.8, 0.95), "betas was [0.9, 0.999] and is [0.8, 0.95]"),
    "eps": (1e-6, "eps was 1e-12 and is 1e-06"),
    "update_interval": (3, "update_interval was 1 and is 3"),
    "start_step": (7, "start_step was 1 and is 7"),
    "escaped_norm": ("block", "escaped_norm was 'mean' and is 'block'"),
    "lr_schedule": ("1/0.5@step3", "lr_schedule was '1.0' and is '1/0.5@step3'"),
}


@pytest.mark.parametrize("option", CHANGED)
def test_other_options_are_named_in_a_warning(
    option: str, tmp_path: Path, warnings_of_ours: pytest.LogCaptureFixture
) -> None:
    """The state fits and is taken over; the options are those of the run, not of the file."""
    value, message = CHANGED[option]
    saved = make()
    save_optimizer(saved, tmp_path)
    target = make(steps=0, **{option: value})
    load_optimizer(target, tmp_path)
    assert same(snapshot(target), snapshot(saved))
    lines = [r.getMessage() for r in warnings_of_ours.records if r.levelno == logging.WARNING]
    assert len(lines) == 1
    assert message in lines[0]
    assert "ARE NOT THOSE OF THE CHECKPOINT" in lines[0]


def test_equal_options_warn_of_nothing(
    tmp_path: Path, warnings_of_ours: pytest.LogCaptureFixture
) -> None:
    save_optimizer(make(), tmp_path)
    load_optimizer(make(steps=0), tmp_path)
    assert not warnings_of_ours.records


def test_rates_come_from_the_file(tmp_path: Path) -> None:
    saved, target = make(), make(steps=0)
    saved.param_groups[0].update(lr=0.3, weight_decay=0.4)
    save_optimizer(saved, tmp_path)
    load_optimizer(target, tmp_path)
    assert target.param_groups[0]["lr"] == 0.3
    assert target.param_groups[0]["weight_decay"] == 0.4


def test_another_state_dtype_is_converted_with_a_warning(
    tmp_path: Path, warnings_of_ours: pytest.LogCaptureFixture
) -> None:
    saved = make(state_dtype="float32")
    save_optimizer(saved, tmp_path)
    target = make(steps=0, state_dtype="float64")
    load_optimizer(target, tmp_path)
    expected, found = snapshot(saved)[0], snapshot(target)[0]
    assert all(torch.equal(found[key], expected[key].to(found[key].dtype)) for key in found)
    assert found["0.basis"].dtype == torch.float64
    assert "state_dtype was 'float32' and is 'float64'" in warnings_of_ours.text


FORGED: dict[str, tuple[str, Any, str]] = {
    "rate as text": ("lr", "0.1", "lr = '0.1' of a param group is not a rate"),
    "negative rate": ("lr", -0.1, "lr = -0.1 of a param group is not a rate"),
    "truth as decay": ("weight_decay", True, "weight_decay = True of a param group is not a rate"),
    "other state version": ("state_version", 7, "state_version of a param group: expected 1"),
    "other algorithm": ("algorithm", "muon", "algorithm of a param group: expected"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_groups_are_refused_by_name(case: str, tmp_path: Path) -> None:
    key, value, message = FORGED[case]

    def change(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        header = json.loads(metadata["header"])
        header["param_groups"][0][key] = value
        metadata["header"] = json.dumps(header)

    save_optimizer(make(), tmp_path)
    rewrite(tmp_path / FILE_NAME, change, forge=True)
    target = make(steps=1)
    before = snapshot(target)
    with pytest.raises(StateMismatchError, match=message):
        load_optimizer(target, tmp_path)
    assert same(snapshot(target), before)


# --- what crashes leave behind --------------------------------------------------------------------


def test_leftovers_of_a_crash_are_removed_by_the_next_save(tmp_path: Path) -> None:
    leftover = tmp_path / f".{FILE_NAME}.4711.tmp"
    leftover.write_bytes(b"half")
    save_optimizer(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_crash_between_shards_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New shards beside an old index: of two saves."""
    save_optimizer(make(), tmp_path, max_shard_size=600)
    real, calls = checkpoint.os.replace, []

    def crash(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save_optimizer(make(steps=4), tmp_path, max_shard_size=600)
    target = make(steps=1)
    with pytest.raises(DamagedCheckpointError, match=f"belongs to another save than {INDEX_NAME}"):
        load_optimizer(target, tmp_path)
