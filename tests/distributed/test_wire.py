"""What goes over the wire: small sums for rows that are spread, each direction once for owners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_precond import create_optimizer
from tests.distributed.ranks import MOST, Ranks
from tests.distributed.wire import Traffic, Wire, table

pytestmark = pytest.mark.distributed

IN, OUT, LAYERS = 32, 512, 4
SIZE = 4  # bytes of a float32
# Everything is due at every step.
OPTIONS: dict[str, dict[str, Any]] = {
    "shared_basis_adagrad": {"rank": 2, "update_interval": 1, "root_interval": 1},
    "shared_basis_adam": {"rank": 2, "update_interval": 1, "root_interval": 1},
    "block_adam": {"root_interval": 1},
    "muon": {},
    "soap": {"basis_interval": 1},
    "shampoo": {"inverse_interval": 1},
}
SMALL_MESSAGE = 4096  # bytes of what is agreed on, whatever the sizes of the weights


# -- the count itself --


def collectives() -> dict[str, Traffic]:
    """One of each kind, as functions, functional ones and by objects."""
    x = torch.ones(8)
    world = dist.get_world_size()
    with Wire() as wire:
        dist.all_reduce(x.clone())
        functional.all_reduce(x, "sum", dist.group.WORLD).sum()
        dist.all_gather_into_tensor(torch.empty(8 * world), x)
        dist.all_gather([torch.empty(8) for _ in range(world)], x)
        dist.reduce_scatter_tensor(torch.empty(8 // world), x)
        dist.all_to_all_single(torch.empty(8), x)
        dist.broadcast(x, 0)
        dist.barrier()
    return wire.traffic


def test_every_collective_is_counted(ranks: Ranks) -> None:
    once, twice = Traffic(1, 32, 8), Traffic(2, 64, 8)
    for traffic in ranks.run(collectives, world=2):
        assert traffic == {
            "all_reduce": twice,
            "all_gather": twice,
            "reduce_scatter": once,
            "all_to_all": once,
            "broadcast": once,
        }


# -- the optimizers --


def network() -> nn.Sequential:
    """Wide and narrow layers in turn, without biases."""
    torch.manual_seed(0)
    sizes = [(IN, OUT), (OUT, IN)] * (LAYERS // 2)
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in sizes))


def traffic_of(name: str, *, fsdp: bool, **options: Any) -> dict[str, Any]:
    """What forward and backward, and what the step, hand to collectives in the second step."""
    model = network()
    if fsdp:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    optimizer = create_optimizer(model, name, lr=1e-3, **OPTIONS[name], **options)
    parallel: nn.Module = model if fsdp else DistributedDataParallel(model)
    for step in range(2):
        optimizer.zero_grad()
        # What is agreed on once, in the first step, is not counted.
        passes, steps = Wire(), Wire()
        with passes:
            parallel(torch.randn(16, IN) + step).square().mean().backward()
        with steps:
            optimizer.step()
    return {
        "passes": passes.traffic,
        "step": steps.traffic,
        "largest": steps.largest,
        "sent": steps.sent,
        "table": table(steps.traffic),
    }


GRADIENT = IN * OUT  # elements of each weight's gradient
TOTAL = LAYERS * GRADIENT * SIZE


@pytest.mark.parametrize("world", [2, MOST])
@pytest.mark.parametrize("name", ["shared_basis_adagrad", "shared_basis_adam", "block_adam"])
def test_spread_rows_send_small_sums(ranks: Ranks, name: str, world: int) -> None:
    """No gradient, no direction and no weight: they are where they are needed."""
    for rank in ranks.run(traffic_of, name, fsdp=True, world=world):
        assert rank["passes"]["reduce_scatter"].sent == TOTAL
        assert rank["largest"] < GRADIENT / 4, rank["table"]
        assert rank["sent"] < TOTAL / 10, rank["table"]


@pytest.mark.parametrize("name", ["shared_basis_adagrad", "block_adam"])
def test_blocks_send_their_directions_once(ranks: Ranks, name: str) -> None:
    """Beside the small sums; weights that all ranks have need the rows of all."""
    for rank in ranks.run(traffic_of, name, fsdp=False, sharding="blocks"):
        gathered = rank["step"]["all_gather"]
        assert gathered.calls == 1, rank["table"]
        assert TOTAL <= MOST * gathered.sent < 1.1 * TOTAL, rank["table"]
        assert rank["sent"] - gathered.sent < TOTAL / 10, rank["table"]


@pytest.mark.parametrize("name", ["muon", "soap", "shampoo", "shared_basis_adam"])
def test_owners_send_directions_once(ranks: Ranks, name: str) -> None:
    """One weight for each of four ranks: in one call, nothing but directions, each once."""
    for rank in ranks.run(traffic_of, name, fsdp=False, sharding="owner"):
        gathered = rank["step"]["all_gather"]
        assert gathered.calls == 1, rank["table"]
        assert gathered.sent == TOTAL / MOST, rank["table"]
        assert rank["sent"] - gathered.sent < SMALL_MESSAGE, rank["table"]


@pytest.mark.parametrize("name", ["muon", "shampoo"])
def test_directions_in_bf16_are_half_as_much(ranks: Ranks, name: str) -> None:
    options = {"sharding": "owner", "exchange_dtype": "bfloat16"}
    for rank in ranks.run(traffic_of, name, fsdp=False, **options):
        assert rank["step"]["all_gather"].sent == TOTAL / MOST / 2, rank["table"]


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_gathered_shards_go_to_their_owner_and_back(ranks: Ranks, name: str) -> None:
    """Each element of a gradient once, and once as a direction."""
    for rank in ranks.run(traffic_of, name, fsdp=True):
        moved = rank["step"]["all_to_all"]
        assert moved.calls == 2, rank["table"]
        assert moved.sent == 2 * TOTAL / MOST, rank["table"]
        assert rank["sent"] - moved.sent < SMALL_MESSAGE, rank["table"]


@pytest.mark.parametrize("name", ["muon", "block_adam"])
def test_replicas_send_no_directions(ranks: Ranks, name: str) -> None:
    """At most what a decomposition gives, so that all go on from the same."""
    for rank in ranks.run(traffic_of, name, fsdp=False, sharding="replicated"):
        assert "all_gather" not in rank["step"], rank["table"]
        if name == "muon":
            assert rank["sent"] < SMALL_MESSAGE, rank["table"]
