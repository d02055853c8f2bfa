"""One rank whose numbers are unlike the others' harms none, and what fails on it all ranks know."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_precond import list_optimizers
from tests.distributed.comparing import (
    alone,
    assert_near,
    assert_ranks_agree,
    cases,
    tolerance,
)
from tests.distributed.faulty import (
    disagreeing,
    with_failures,
    with_noise,
    with_poison,
)
from tests.distributed.ranks import Ranks
from tests.distributed.training import BLOCKWISE, FEW, STEPS, Run

pytestmark = pytest.mark.distributed

MODES = ("replicated", "owner", "blocks", "fsdp2")
# Each decomposes in another way: QR and eigh, eigh of factors, SVD, Cholesky, of columns.
DECOMPOSING = ("shared_basis_adagrad", "shampoo", "adadiag", "kfac")
CASES = cases(MODES, ("shared_basis_adagrad", "shampoo"), every=DECOMPOSING)
WORLD = 2
POISONED = "model.layers.1.mlp.up_proj.weight"
VECTOR = "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "mode"),
    [*cases(["replicated"], FEW, every=list_optimizers()), *cases(("blocks", "fsdp2"), BLOCKWISE)],
)
@pytest.mark.parametrize("noisy", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_rounding_of_one_rank_reaches_all_or_none(
    ranks: Ranks, name: str, mode: str, noisy: int
) -> None:
    """Decompositions may end in other bits on each device; weights may not drift apart."""
    assert_ranks_agree(ranks.run(with_noise, Run(name=name, mode=mode), noisy, 6, world=WORLD))


# -- gradients that are not finite --


@pytest.mark.parametrize(
    ("name", "mode", "param"),
    [
        *(pytest.param(*case.values, POISONED) for case in CASES),
        *((DECOMPOSING[0], mode, VECTOR) for mode in MODES),
    ],
)
def test_a_gradient_that_is_not_finite_leaves_one_parameter_out(
    ranks: Ranks, name: str, mode: str, param: str
) -> None:
    run = Run(name=name, mode=mode)
    found = ranks.run(with_poison, run, param, 1, {2, 5}, world=WORLD)
    expected = with_poison(run.on("replicated"), param, 0, {2, 5})
    assert not expected["error"]
    assert_ranks_agree([rank["weights"] for rank in found])
    assert [rank["health"]["skipped_nonfinite"] for rank in found] == WORLD * [2.0]
    assert_near(found[0]["weights"], expected["weights"], tolerance(name))
    others = alone(run)
    assert not found[0]["weights"][param].equal(others[param])


@pytest.mark.parametrize("mode", MODES)
def test_too_many_of_them_end_all_ranks(ranks: Ranks, mode: str) -> None:
    run = Run(name="shared_basis_adam", mode=mode, options={"max_failures": 3})
    for rank in ranks.run(with_poison, run, POISONED, 1, range(2, STEPS), world=WORLD):
        assert rank["error"].startswith("FloatingPointError")
        assert POISONED in rank["error"]


# -- decompositions that fail --


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_failed_decomposition_counts_on_all_ranks(
    ranks: Ranks, name: str, mode: str, failing: int
) -> None:
    """Two steps, of which one is due for statistics; training goes on as if it had not been."""
    run = Run(name=name, mode=mode)
    found = ranks.run(with_failures, run, failing, {4, 5}, world=WORLD, timeout=20)
    assert [rank["error"] for rank in found] == ["", ""]
    counts = [rank["health"]["failed_updates"] for rank in found]
    assert counts[0] == counts[1] > 0
    assert_ranks_agree([rank["weights"] for rank in found])


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_too_many_failures_end_all_ranks(ranks: Ranks, name: str, mode: str) -> None:
    run = Run(name=name, mode=mode, options={"max_failures": 2})
    found = ranks.run(with_failures, run, 1, range(2, STEPS), world=WORLD, timeout=20)
    for rank in found:
        assert rank["error"].startswith("DecompositionError"), rank["error"]
        assert "2 in a row" in rank["error"]


# -- ranks that disagree --

SAME = Run(name="shared_basis_adam", mode="owner")
OTHERS = {
    "rank": replace(SAME, options={"rank": 4}),
    "interval": replace(SAME, options={"update_interval": 3}),
    "sharding": SAME.on("replicated"),
    "exchange_dtype": replace(SAME, options={"exchange_dtype": "bfloat16"}),
    "views": replace(SAME, options={"attention_grouping": "kernel"}),
    "algorithm": replace(SAME, name="shared_basis_adagrad"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_ranks_that_disagree_are_told(ranks: Ranks, what: str) -> None:
    for message in ranks.run(disagreeing, SAME, OTHERS[what], 1, timeout=20, world=3):
        assert message.startswith(("ValueError", "RuntimeError"))
        assert "ranks have other parameters or options" in message
