"""Layer inputs on two processes: each has half of the batch, both have all statistics.

All scenarios run in one start of two gloo processes; the tests compare what they brought back with
one process that has the whole batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_precond import PreconditionedOptimizer, create_optimizer
from tests.statistics.capturing import (
    assert_all_close,
    assert_close,
    assert_equal,
    capture,
    product,
    state_of,
    weights,
)

pytestmark = pytest.mark.distributed

WORLD, SAMPLES, LENGTH = 2, 8, 3
TOLERANCE = 1e-9
SEEDS = 200
COMMON = {"lr": 0.01, "graft": "none", "momentum": "none", "state_dtype": "float64"}
METHODS: dict[str, dict[str, Any]] = {
    "kfac": {"update_interval": 1, "inverse_interval": 1},
    "b_kfac": {
        "update_interval": 1,
        "inverse_interval": 1,
        "brand_interval": 1,
        "factor_form": "brand",
        "rank": 3,
        "max_columns": 64,
    },
    "seng": {"update_interval": 1, "max_columns": 64},
    "ng_plus_per_sample": {"update_interval": 1, "max_columns": 64},
}


class Net(nn.Module):
    """Three layers over positions; the middle one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.middle = nn.Linear(4, 6), nn.Linear(6, 6)
            self.last = nn.Linear(6, 3)
        self.double()

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, leave_out: bool = False
    ) -> Tensor:
        """Mean of squares over the valid positions of the batch."""
        hidden = self.first(x).tanh()
        if not leave_out:
            hidden = self.middle(hidden).tanh()
        squares = self.last(hidden).square().mean(-1)
        if attention_mask is None:
            return squares.mean()
        return (squares * attention_mask).mean()


def batch(step: int, samples: int = SAMPLES, length: int = LENGTH) -> Tensor:
    rng = torch.Generator().manual_seed(100 + step)
    return torch.randn(samples, length, 4, generator=rng, dtype=torch.float64)


def mask_of(step: int) -> Tensor:
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    mask[step, 1:] = mask[step + 3, 2:] = 0
    return mask


Part = Callable[[nn.Module, int, int], Tensor]
"""(model, step, rank) -> loss of a rank's share of the batch."""


def halves(model: nn.Module, step: int, rank: int) -> Tensor:
    return model(batch(step).chunk(WORLD)[rank])


def padded(model: nn.Module, step: int, rank: int) -> Tensor:
    mask = mask_of(step).chunk(WORLD)[rank]
    return model(batch(step).chunk(WORLD)[rank], attention_mask=mask)


def uneven(model: nn.Module, step: int, rank: int) -> Tensor:
    return model(batch(step).split([6, 2] if step == 2 else [4, 4])[rank])


def unused_on_one(model: nn.Module, step: int, rank: int) -> Tensor:
    return model(batch(step).chunk(WORLD)[rank], leave_out=rank == step % 2)


def unused_at_first(model: nn.Module, step: int, rank: int) -> Tensor:
    """With columns due every second step, the second one finds armed layers but no columns."""
    return model(batch(step).chunk(WORLD)[rank], leave_out=step < 2)


def other_lengths(model: nn.Module, step: int, rank: int) -> Tensor:
    return model(batch(step, 4, 2 + 3 * rank))


Scenario = tuple[str, Part, dict[str, Any]]  # method, loss, options

SCENARIOS: dict[str, Scenario] = {
    **{name: (name, halves, {}) for name in METHODS},
    "kfac-reduce": ("kfac", halves, {"weight_sharing": "reduce"}),
    "kfac-padded": ("kfac", padded, {}),
    "seng-padded": ("seng", padded, {}),
    "kfac-uneven": ("kfac", uneven, {}),
    "ng_plus_per_sample-uneven": ("ng_plus_per_sample", uneven, {}),
    "kfac-unused-on-one": ("kfac", unused_on_one, {}),
    "seng-unused-on-one": ("seng", unused_on_one, {}),
    "kfac-unused-at-first": (
        "kfac",
        unused_at_first,
        {"update_interval": 2, "inverse_interval": 2},
    ),
    "kfac-other-lengths": ("kfac", other_lengths, {}),
    "seng-other-lengths": ("seng", other_lengths, {}),
}
SAMPLED: dict[str, Scenario] = {
    "kfac": ("kfac", halves, {"max_columns": 10}),
    "b_kfac": ("b_kfac", halves, {"max_columns": 10}),
    "seng": ("seng", halves, {"max_columns": 12}),
    "kfac-uneven": ("kfac", uneven, {"max_columns": 10}),
    "kfac-padded": ("kfac", padded, {"max_columns": 10}),
    "ng_plus_per_sample": ("ng_plus_per_sample", halves, {"max_columns": 12}),
    # Room for two samples of five positions in all, or for one of each kind at most.
    "seng-other-lengths": ("seng", other_lengths, {"max_columns": 12}),
    # Room for one sample on two processes.
    "seng-one-sample": ("seng", halves, {"max_columns": 4}),
}
STEPS = 3


def optimizer_of(model: nn.Module, scenario: Scenario) -> PreconditionedOptimizer:
    name, _, options = scenario
    return create_optimizer(model, name, **{**COMMON, **METHODS[name], **options})


# -- the two processes --


def trained(rank: int, scenario: Scenario, *, micro: bool = False) -> dict[str, Any]:
    """Three steps of one rank: its weights and its state."""
    model = Net()
    optimizer = optimizer_of(model, scenario)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        pieces = 2 if micro else 1
        for piece in range(pieces):
            share = batch(step).chunk(WORLD * pieces)[rank * pieces + piece]
            last = piece == pieces - 1
            with nullcontext() if last else parallel.no_sync():
                loss = parallel(share) / 2 if micro else scenario[1](parallel, step, rank)
                loss.backward()
        optimizer.step()
    return {"weights": weights(model), "state": state_of(optimizer)}


def sampled_products(rank: int) -> dict[str, Tensor]:
    """The mean of sampled gradients where one rank has many positions and the other a few."""
    model = nn.Linear(4, 3).double()
    model.load_state_dict({"weight": torch.eye(3, 4), "bias": torch.ones(3)})
    x = batch(0, 12 if rank == 0 else 2, 1)
    found = torch.stack(
        [
            product(capture(model, [lambda: model(x).sin().sum()], max_columns=8, seed=s)["weight"])
            for s in range(SEEDS)
        ]
    )
    model.zero_grad()
    model(x).sin().sum().backward()
    assert model.weight.grad is not None
    gradient = model.weight.grad
    dist.all_reduce(gradient)
    return {
        "mean": found.mean(0),
        "error": found.std(0) / SEEDS**0.5,
        "gradient": gradient / WORLD,
    }


def work(rank: int, folder: str) -> None:
    """All scenarios on one rank; an error is a result, too."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"{key}": lambda s=s: trained(rank, s) for key, s in SCENARIOS.items()},
        **{f"sampled {key}": lambda s=s: trained(rank, s) for key, s in SAMPLED.items()},
        "micro": lambda: trained(rank, SCENARIOS["kfac"], micro=True),
        "products": lambda: sampled_products(rank),
    }
    results: dict[str, dict[str, Any]] = {}
    for key, job in jobs.items():
        try:
            results[key] = job()
        except (ValueError, RuntimeError) as error:
            results[key] = {"failure": f"{type(error).__name__}: {error}"}
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Results]:
    """What each rank brought back."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(folder,), nprocs=WORLD)
        yield [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


# -- against one process --


def alone(scenario: Scenario) -> tuple[list[Tensor], list[Tensor]]:
    """The same on one process, whose loss is the mean of the ranks' losses."""
    model = Net()
    optimizer = optimizer_of(model, scenario)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([scenario[1](model, step, rank) for rank in range(WORLD)]).mean().backward()
        optimizer.step()
    return weights(model), state_of(optimizer)


def of(results: Results, key: str) -> list[dict[str, Any]]:
    found = [rank[key] for rank in results]
    assert not any("failure" in result for result in found), found[0].get("failure")
    return found


ALL = [*SCENARIOS, *(f"sampled {key}" for key in SAMPLED), "micro"]


@pytest.mark.parametrize("key", ALL)
def test_ranks_are_equal_bit_for_bit(ranks: Results, key: str) -> None:
    first, second = of(ranks, key)
    assert_equal(first["weights"], second["weights"])
    assert_equal(first["state"], second["state"])
    assert all(value.isfinite().all() for value in first["state"])


@pytest.mark.parametrize("key", SCENARIOS)
def test_two_ranks_are_one_process(ranks: Results, key: str) -> None:
    found = of(ranks, key)[0]
    expected, _ = alone(SCENARIOS[key])
    assert_all_close(found["weights"], expected, TOLERANCE)
    assert not torch.equal(expected[0], weights(Net())[0])


@pytest.mark.parametrize("key", ["kfac", "kfac-uneven", "kfac-unused-on-one"])
def test_factors_are_those_of_one_process(ranks: Results, key: str) -> None:
    model = Net()
    optimizer = optimizer_of(model, SCENARIOS[key])
    _, expected = alone(SCENARIOS[key])
    found = of(ranks, key)[0]["state"]
    names = [name for _, name, _ in sorted_layout(optimizer)]
    factors = [index for index, name in enumerate(names) if name.endswith("_factor")]
    assert len(factors) == 6
    for index in factors:
        assert_close(found[index], expected[index], TOLERANCE)


def sorted_layout(optimizer: PreconditionedOptimizer) -> list[tuple[int, str, Tensor]]:
    """Names of the state in the order of :func:`state_of`."""
    return sorted(optimizer.state_layout(), key=lambda item: item[:2])


def test_micro_batches_on_two_ranks_are_one_batch(ranks: Results) -> None:
    """Without synchronisation between them."""
    found = of(ranks, "micro")[0]
    expected, _ = alone(SCENARIOS["kfac"])
    assert_all_close(found["weights"], expected, TOLERANCE)


def test_samples_of_uneven_ranks_are_unbiased(ranks: Results) -> None:
    """Both ranks may keep equally many positions; one of them has six times as many."""
    found = of(ranks, "products")[0]
    error = (found["mean"] - found["gradient"]) / (found["error"] + 1e-12)
    assert error.abs().max() < 5, "five standard errors"
