"""The plan of a mesh against ranks that are there: state, traffic, temporaries, operations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from hf_precond import resolve
from hf_precond.linalg import eigen
from hf_precond.optim.work import plan_work
from tests.distributed.ranks import MOST, Ranks
from tests.distributed.tiny_llama import TinyLlama, share
from tests.distributed.training import MODES, Run, Training, options_of, rank_and_world, shard
from tests.distributed.wire import Wire
from trainer_ext import build_optimizer
from trainer_ext.dry_run import DryRun
from trainer_ext.memory_plan import (
    Mesh,
    SharedWork,
    passes_traffic,
    plan_adamw,
    rehearse,
    window,
)
from trainer_ext.planned_rank import Traffic

pytestmark = pytest.mark.distributed

DTYPE = torch.float32
CASES = [
    pytest.param("shared_basis_adam", "replicated", 1, marks=pytest.mark.slow),
    ("shared_basis_adam", "replicated", 2),
    pytest.param("shared_basis_adam", "blocks", 2, marks=pytest.mark.slow),
    ("shared_basis_adam", "blocks", MOST),
    ("shared_basis_adam", "fsdp2", 2),
    pytest.param("shared_basis_adam", "fsdp2", MOST, marks=pytest.mark.slow),
    pytest.param("shared_basis_adam", "hsdp", MOST, marks=pytest.mark.slow),
    pytest.param("block_adam", "blocks", MOST, marks=pytest.mark.slow),
    ("soap", "replicated", 2),
    pytest.param("soap", "owner", 2, marks=pytest.mark.slow),
    ("soap", "owner", MOST),
    ("soap", "fsdp2-owner", 2),
    pytest.param("soap", "fsdp2-owner", MOST, marks=pytest.mark.slow),
    pytest.param("soap", "fsdp2-replicated", 2, marks=pytest.mark.slow),
    pytest.param("soap", "hsdp", MOST, marks=pytest.mark.slow),
    ("kfac", "fsdp2-owner", 2),
]
# K-FAC: of the tiny model's layers not all see as many positions.
TOLERANCE = {"shared_basis_adam": 1e-9, "block_adam": 1e-9, "soap": 1e-9, "muon": 1e-9, "kfac": 0.1}

IN_PLACE = {
    torch.ops.aten.baddbmm_: lambda self, a, b, out_shape=None, **_: 2 * a[0] * a[1] * a[2] * b[2]
}

Sums = dict[str, tuple[float, float]]
"""Kind of collective -> (calls, bytes this rank puts in)."""


# -- what ranks do --


def measured(run: Run) -> dict[str, Any]:
    """State, and what the steps of one window send and allocate."""
    training = Training(run)
    steps = window(training.optimizer.recipe)
    for step in range(1, steps[0]):
        training.backward(step)
        training.step()
    wire, peak = Wire(), 0
    for step in steps:
        training.backward(step)
        with wire, DryRun() as dry:
            training.step()
        peak = max(peak, dry.peak)
    return {
        "state": state_bytes(training.optimizer),
        "sent": {kind: (x.calls, x.sent) for kind, x in wire.traffic.items()},
        "peak": peak,
    }


def adamw(parallel: str) -> dict[str, Any]:
    """The same of AdamW, and what forward and backward send."""
    model = TinyLlama(DTYPE)
    if parallel == "fsdp2":
        shard(model)
    trained: nn.Module = model if parallel == "fsdp2" else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        passes, steps = Wire(), Wire()
        with passes:
            trained(*share(step, *rank_and_world())).backward()
        with steps:
            optimizer.step()
    return {
        "state": state_bytes(optimizer),
        "passes": {kind: (x.calls, x.sent) for kind, x in passes.traffic.items()},
        "sent": steps.traffic,
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state that a rank has."""
    tensors = [x for entry in optimizer.state.values() for x in entry.values()]
    local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    return sum(x.numel() * x.element_size() for x in local)


# -- what is planned --


@cache
def meta_model() -> TinyLlama:
    """The model without memory."""
    with torch.device("meta"):
        return TinyLlama(DTYPE)


def shared_work(name: str, mode: str, world: int) -> SharedWork:
    """The plan of a run's optimizer on a mesh."""
    optimizer = build_optimizer(
        meta_model(), name, lr=1e-3, **options_of(Run(name=name, mode=mode))
    )
    return SharedWork(optimizer, mesh_of(mode, world))


def mesh_of(mode: str, world: int) -> Mesh:
    parallel = MODES[mode][0]
    return Mesh(ranks=world, parallel=parallel, replicas=2 if parallel == "hsdp" else 1)


def by_kind(traffic: Traffic, times: int, *, without: str = "") -> Sums:
    """What is sent by the kinds of collectives, of several steps."""
    found: Sums = {}
    for (purpose, kind), sent in traffic.items():
        if purpose != without:
            calls, handed = found.get(kind, (0.0, 0.0))
            found[kind] = calls + times * sent.calls, handed + times * sent.handed
    return found


def approx(sums: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Means times the number of steps are whole but for rounding."""
    return {kind: pytest.approx(pair, rel=1e-9) for kind, pair in sums.items()}


# -- both --


@pytest.mark.parametrize(("name", "mode", "world"), CASES)
def test_state_traffic_and_temporaries_are_as_planned(
    ranks: Ranks, name: str, mode: str, world: int
) -> None:
    run = Run(name=name, mode=mode, dtype=DTYPE)
    found = ranks.run(measured, run, world=world)
    shared = shared_work(name, mode, world)
    planned_state = shared.state_bytes()
    count = len(window(resolve(name, options_of(run))))
    for number, real in enumerate(found):
        rank = shared.planned_rank(number % len(planned_state))
        assert rank.state_bytes() == planned_state[number % len(planned_state)] == real["state"]
        peak, traffic = rehearse(rank)
        if name == "kfac":
            # How many columns a layer has is the model's business: here one layer sees the last
            # positions only, another all but these. What else is gathered is compared.
            columns = by_kind({k: v for k, v in traffic.items() if k[0] == "columns"}, count)
            real["sent"].pop("all_gather")
            assert set(columns) == {"all_gather"}
            traffic = {key: sent for key, sent in traffic.items() if key[0] != "columns"}
        assert real["sent"] == approx(by_kind(traffic, count))
        if name != "kfac":
            assert real["peak"] == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stacks_are_as_on_the_device(device: str) -> None:
    """In `replicated` ranks agree on the results stack by stack: smaller stacks, more calls."""
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    optimizer = build_optimizer(model, "shared_basis_adam", lr=1e-3, sharding="replicated")
    shared = SharedWork(optimizer, Mesh(ranks=2, device=device))
    planned = shared.planned_rank(0)
    limit = {"cpu": 2**21, "cuda": 2**26}[device]
    assert planned.recipe.numerics.stack_limit([]) == limit
    sizes = [bucket.shape for bucket in planned._plan_buckets()]
    assert [groups for groups, _, _ in sizes] == {"cpu": [2, 2], "cuda": [4]}[device]


@pytest.mark.parametrize("world", [2, MOST])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_adamw_is_as_planned(ranks: Ranks, parallel: str, world: int) -> None:
    mesh = Mesh(ranks=world, parallel=parallel)
    plan, passes = plan_adamw(meta_model(), mesh), by_kind(passes_traffic(meta_model(), mesh), 1)
    for number, real in enumerate(ranks.run(adamw, parallel, world=world)):
        assert real["state"] == plan.state_bytes[number]
        assert real["sent"] == {}
        if parallel == "ddp":
            # Buffers are sent as well, of which there are none in a plan.
            assert real["passes"]["all_reduce"][1] == passes["all_reduce"][1]
        else:
            assert real["passes"]["reduce_scatter"][1] == passes["reduce_scatter"][1]
            # What belongs to no layer is gathered once: FSDP2 keeps it for the backward pass.
            gathered = real["passes"]["all_gather"][1]
            assert passes["all_gather"][1] / 2 < gathered < passes["all_gather"][1]


@pytest.mark.parametrize("name", TOLERANCE)
def test_products_are_as_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own counter; without the check of eigenvectors, which CPUs do not need.

    Products in place, which that counter passes over, are added to it; see test_dry_run.py.
    """
    # Tensors of the meta device hold nothing that could be looked at.
    monkeypatch.setattr(eigen, "_RIGHT_IF_FINITE", frozenset({"cpu", "meta"}))
    monkeypatch.setattr(eigen, "_is_right", lambda found: True)
    run = Run(name=name, dtype=DTYPE)
    training = Training(run)
    steps = window(training.optimizer.recipe)
    training.take(range(1, steps[0]))
    counted = 0
    for step in steps:
        training.backward(step)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            training.step()
        counted += counter.get_total_flops()
    (operations,) = shared_work(name, "replicated", 1).operations()
    assert operations.products * len(steps) == pytest.approx(counted, rel=TOLERANCE[name])


@pytest.mark.parametrize("name", ["shared_basis_adam", "block_adam"])
def test_one_of_equal_parameters_stands_for_all(name: str) -> None:
    """The plan of one of each kind, moved to the others, is the plan of all."""
    shared = shared_work(name, "fsdp2", MOST)
    assert len(shared._members) < len(shared._params)
    whole = plan_work(
        *(shared._pieces, shared._params, shared._homes, shared._recipe.algorithm),
        mode="auto",
        size=MOST,
    )
    for rank in range(MOST):
        found = shared.work_of(rank)
        assert found.of_rank(rank) == whole.of_rank(rank)
        assert (found.routes, found.sums, found.leaders) == (
            whole.routes,
            whole.sums,
            whole.leaders,
        )
        assert found.places == whole.places


@pytest.mark.parametrize("name", ["shared_basis_adam", "soap"])
def test_operations_of_a_rank_are_those_of_its_groups(name: str) -> None:
    """What a rank's step computes beside them is small."""
    shared = shared_work(name, "fsdp2", 2)
    rank = shared.planned_rank(0)
    steps = window(rank.recipe)
    rank.begin_at(steps[0])
    with DryRun() as dry:
        for _ in steps:
            rank.step()
    planned = shared.operations()[0]
    assert dry.operations.products / len(steps) == pytest.approx(planned.products, rel=1e-9)
    # A step makes the state of stacks without groups, whose first basis is drawn all the same.
    found = dry.operations.decompositions / len(steps)
    assert planned.decompositions <= found + 1e-6 <= 1.1 * planned.decompositions
