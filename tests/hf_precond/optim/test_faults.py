"""A factorisation that fails costs its own parameter an update, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.eigen import DecompositionError
from hf_precond.preconditioners import shared_basis
from tests.suite.building import assert_bit_equal, assert_same, build, parameter, run

NAME = "shared_basis_adagrad"
TOLERANCE = 1e-11


def fail_for_first_slot(monkeypatch: pytest.MonkeyPatch, first_failing_step: int) -> None:
    """From a step on, ``eigh`` fails for stacks that contain the first of two parameters."""
    solver, calls = shared_basis.eigh, [0]

    def failing(a: Tensor) -> tuple[Tensor, Tensor]:
        stacked = a.shape[0] == 2
        calls[0] += stacked
        failing.alone = 0 if stacked else failing.alone + 1
        if calls[0] >= first_failing_step and (stacked or failing.alone == 1):
            raise DecompositionError("did not converge")
        return solver(a)

    failing.alone = 0
    monkeypatch.setattr(shared_basis, "eigh", failing)


@pytest.mark.parametrize(
    "intervals",
    [
        {"update_interval": 1, "root_interval": 1},
        {"update_interval": 4, "coef_interval": 1, "root_interval": 1},
    ],
    ids=["with the basis", "with the coefficients"],
)
def test_the_previous_factor_is_kept_and_others_go_on(
    intervals: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> object:
        return build(NAME, [parameter(5, 6, seed=i) for i in range(2)], **intervals)

    healthy, faulty = fresh(), fresh()
    run(healthy, range(1, 6))
    fail_for_first_slot(monkeypatch, first_failing_step=4)
    bad, _ = before = run(faulty, range(1, 4))
    basis = faulty.state[faulty.param_groups[0]["params"][0]]["basis"].clone()
    after = run(faulty, range(4, 6))
    param = faulty.param_groups[0]["params"][0]
    assert_bit_equal([faulty.state[param]["basis"]], [basis], "basis")
    assert not torch.equal(after[0], bad)
    assert_same(after[1:], healthy.param_groups[0]["params"][1:], TOLERANCE)
    assert faulty.health()["failed_updates"] == 2
    assert len(before) == 2


def test_lasting_failures_raise_with_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    named = [("bad.weight", parameter(5, 6)), ("good.weight", parameter(5, 6))]
    optimizer = build(NAME, named, update_interval=1, root_interval=1, max_failures=3)
    fail_for_first_slot(monkeypatch, first_failing_step=2)
    run(optimizer, range(1, 4))
    with pytest.raises(DecompositionError, match=r"bad\.weight.*3"):
        run(optimizer, [4])
