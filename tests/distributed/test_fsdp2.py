"""FSDP2 and its relatives: PyTorch's checkpoints, other meshes, and the Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hf_precond import list_optimizers
from tests.distributed.comparing import (
    alone,
    assert_equal,
    assert_near,
    assert_ranks_agree,
    cases,
    tolerance,
)
from tests.distributed.hf_trainer import optim_args, run_trainer
from tests.distributed.ranks import MOST, Ranks
from tests.distributed.training import FEW, STEPS, Run, Training, Weights, trained

pytestmark = pytest.mark.distributed

HALF = 5
REST = range(HALF, STEPS)


# -- torch.distributed.checkpoint --


def dcp_state(training: Training) -> dict[str, Any]:
    """Model and optimizer as torch.distributed.checkpoint wants them."""
    return {
        "model": get_model_state_dict(training.model),
        "optimizer": get_optimizer_state_dict(training.model, training.optimizer),
    }


def dcp_saved(run: Run, folder: Path, steps: int) -> Weights:
    """Takes some steps, saves, and goes on to the end."""
    training = Training(run).take(range(steps))
    dcp.save(dcp_state(training), checkpoint_id=folder)
    return training.take(range(steps, STEPS)).weights()


def dcp_resumed(run: Run, folder: Path, steps: Iterable[int]) -> Weights:
    """Goes on from there, on as many ranks as there are now."""
    training = Training(run)
    state = dcp_state(training)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(training.model, state["model"])
    set_optimizer_state_dict(
        training.model, training.optimizer, optim_state_dict=state["optimizer"]
    )
    return training.take(steps).weights()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *cases(["fsdp2"], ["shared_basis_adagrad"], every=list_optimizers()),
        *cases(["fsdp2-owner"], (), every=list_optimizers()),
    ],
)
def test_dcp_takes_state_to_another_number_of_ranks(
    ranks: Ranks, tmp_path: Path, name: str, mode: str
) -> None:
    run = Run(name=name, mode=mode)
    straight = ranks.run(dcp_saved, run, tmp_path, HALF)
    assert_near(straight[0], alone(run), tolerance(name))
    again = ranks.run(dcp_resumed, run, tmp_path, REST)
    assert_ranks_agree(again)
    assert_equal(again[0], straight[0])
    found = ranks.run(dcp_resumed, run, tmp_path, REST, world=3)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run), tolerance(name))


@pytest.mark.parametrize("mode", [pytest.param("fsdp2", marks=pytest.mark.slow), "fsdp2-owner"])
def test_dcp_takes_state_to_more_ranks(ranks: Ranks, tmp_path: Path, mode: str) -> None:
    run = Run(name="soap", mode=mode)
    ranks.run(dcp_saved, run, tmp_path, HALF, world=2)
    found = ranks.run(dcp_resumed, run, tmp_path, REST, world=3)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run), tolerance(run.name))


def dcp_keys(run: Run, steps: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Keys of a state dict by parameter name, and the parameters of its groups."""
    training = Training(run).take(range(steps))
    state = get_optimizer_state_dict(training.model, training.optimizer)
    keys = sorted((name, key) for name, of in state["state"].items() for key in of)
    return keys, sorted(name for group in state["param_groups"] for name in group["params"])


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", ["shared_basis_adagrad", "kfac"])
def test_dcp_keys_are_the_same_on_all_ranks(ranks: Ranks, name: str, steps: int) -> None:
    """Although one module never had a gradient, and the last rank has no row of it."""
    run = Run(name=name, mode="fsdp2", gaps=tuple(range(STEPS)))
    found = ranks.run(dcp_keys, run, steps)
    assert found == MOST * [found[0]]
    keys, params = found[0]
    assert {param for param, _ in keys} == set(params)
    assert "scores.weight" in params


# -- other meshes --


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *cases(["hsdp"], FEW, every=list_optimizers()),
        *cases(["hsdp-owner"], ["soap"], every=list_optimizers()),
    ],
)
def test_copies_of_shards_train_as_one_process(ranks: Ranks, name: str, mode: str) -> None:
    """HSDP: two copies of the model, each in two shards."""
    run = Run(name=name, mode=mode)
    found = ranks.run(trained, run)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run), tolerance(name))


@pytest.mark.parametrize("mode", ["tp", "tp-owner"])
@pytest.mark.parametrize("name", ["shared_basis_adagrad", "soap", "muon"])
def test_tensor_parallel_kernels_train_as_one_process(ranks: Ranks, name: str, mode: str) -> None:
    """Kernels cut by inputs or outputs, beside weights that every rank has."""
    run = Run(name=name, mode=mode)
    found = ranks.run(trained, run, world=2)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run), tolerance(name))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hsdp", "tp"])
def test_dcp_on_other_meshes(ranks: Ranks, tmp_path: Path, mode: str) -> None:
    run = Run(name="shared_basis_adam", mode=mode)
    world = 2 if mode == "tp" else MOST
    straight = ranks.run(dcp_saved, run, tmp_path, HALF, world=world)
    again = ranks.run(dcp_resumed, run, tmp_path, REST, world=world)
    assert_near(straight[0], alone(run), tolerance(run.name))
    assert_equal(again[0], straight[0])
    if mode == "hsdp":
        found = ranks.run(dcp_resumed, run.on("fsdp2"), tmp_path, REST, world=3)
        assert_near(found[0], alone(run), tolerance(run.name))


# -- the Trainer --

# Under FSDP2 rows that are spread, gathered matrices, and layers that are hooked.
BY_TRAINER = ("shared_basis_adagrad", "soap", "kfac", "seng")
EVERY_DAY = ("shared_basis_adagrad", "kfac")
FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def options(name: str, **changes: Any) -> dict[str, Any]:
    """Training arguments of an optimizer of ours; in float64 statistics."""
    return {"optim": name, "optim_args": optim_args(name, state_dtype="float64", **changes)}


def trained_alone(name: str, folder: Path) -> dict[str, Any]:
    return run_trainer(folder / "alone", fsdp=False, **options(name))


def assert_same_run(
    found: list[dict[str, Any]], expected: dict[str, Any], tolerance: float
) -> None:
    """Weights, losses and gradient norms, of a run in float32."""
    assert_ranks_agree([rank["weights"] for rank in found])
    assert_near(found[0]["weights"], expected["weights"], tolerance)
    for key in ("loss", "grad_norm"):
        actual, wanted = ([log[key] for log in run["logs"]] for run in (found[0], expected))
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=0.0)


def test_the_harness_itself_with_a_stock_optimizer(ranks: Ranks, tmp_path: Path) -> None:
    stock = {"optim": "adamw_torch"}
    found = ranks.run(run_trainer, tmp_path / "ranks", fsdp=True, world=2, **stock)
    assert [rank["sharded"] for rank in found] == [True, True]
    assert_same_run(found, run_trainer(tmp_path / "alone", fsdp=False, **stock), 1e-5)


@pytest.mark.parametrize(
    ("name", "fsdp"),
    [
        pytest.param(name, fsdp, marks=() if fsdp and name in EVERY_DAY else pytest.mark.slow)
        for fsdp, names in ((True, (*BY_TRAINER, "b_kfac")), (False, BY_TRAINER))
        for name in names
    ],
)
def test_the_trainer_on_ranks_is_the_trainer_on_one(
    ranks: Ranks, tmp_path: Path, name: str, fsdp: bool
) -> None:
    """With gradient clipping, and an interruption after three steps."""
    folder = tmp_path / "ranks"
    found = ranks.run(run_trainer, folder, fsdp=fsdp, world=2, **options(name))
    assert [rank["optimizer"] for rank in found] == [name, name]
    assert [rank["sharded"] for rank in found] == [fsdp, fsdp]
    assert_same_run(found, trained_alone(name, tmp_path), 1e-3)
    again = ranks.run(
        run_trainer,
        tmp_path / "again",
        fsdp=fsdp,
        world=2,
        resume_from=folder / "checkpoint-3",
        **options(name),
    )
    assert_ranks_agree([rank["weights"] for rank in again])
    assert_equal(again[0]["weights"], found[0]["weights"])


@pytest.mark.parametrize("kind", [pytest.param(FULL, marks=pytest.mark.slow), SHARDED])
@pytest.mark.parametrize(
    "name", ["shared_basis_adam", pytest.param("shampoo", marks=pytest.mark.slow)]
)
def test_the_trainer_goes_on_with_another_number_of_ranks(
    ranks: Ranks, tmp_path: Path, name: str, kind: str
) -> None:
    folder = tmp_path / "ranks"
    kinds = {"fsdp": True, "state_dict_type": kind}
    found = ranks.run(run_trainer, folder, **kinds, **options(name))
    assert any(file.startswith("optimizer") for file in found[0]["files"])
    again = ranks.run(
        run_trainer,
        tmp_path / "again",
        world=2,
        resume_from=folder / "checkpoint-3",
        # The data are drawn for each rank, so other ranks see them in the same order.
        **kinds,
        **options(name),
    )
    assert_ranks_agree([rank["weights"] for rank in again])
    assert_near(again[0]["weights"], found[0]["weights"], 1e-3)


@pytest.mark.parametrize("sharding", ["owner", pytest.param("replicated", marks=pytest.mark.slow)])
def test_optim_args_say_how_the_work_is_spread(ranks: Ranks, tmp_path: Path, sharding: str) -> None:
    spread = options("shared_basis_adam", sharding=sharding)
    for fsdp in (True, False):
        found = ranks.run(run_trainer, tmp_path / f"{fsdp}", fsdp=fsdp, world=2, **spread)
        assert_same_run(found, trained_alone("shared_basis_adam", tmp_path / f"{fsdp}"), 1e-3)
