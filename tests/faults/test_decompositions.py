"""Factorisations that fail: the old one stays in use, the event is counted and logged by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond import PreconditionedOptimizer
from hf_precond.linalg import eigen
from hf_precond.linalg.eigen import DecompositionError, eigh
from hf_precond.linalg.roots import positive_inverse
from hf_precond.linalg.subspace import orthonormal, positive_qr, top_ritz_basis
from hf_precond.linalg.svd import thin_svd
from tests.faults.solvers import RAISING, REPORTING, Solvers
from tests.suite.building import (
    assert_bit_equal,
    assert_same,
    build,
    parameter,
    params_of,
    run,
    state_tensors,
)

TOLERANCE = 1e-11
MATRICES = {"first.weight": (12, 10), "second.weight": (12, 10), "third.weight": (9, 8)}
# Everything is due at every second step, and low ranks are low ones.
EAGER: dict[str, Any] = {
    "rank": 4,
    "oversampling": 1,
    "basis_interval": 2,
    "projection_interval": 2,
    "start_step": 1,
}
WITHOUT_SOLVERS = {"muon"}

# Paths that no row takes by itself: optimizer and options.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("shared_basis_adagrad", {"escaped_norm": "exact"}),
    ("shared_basis_adam", {"oversample": 1}),
    ("adadiag_pp", {"basis_method": "eigh"}),
    ("adafacdiag", {"basis_method": "qr"}),
    ("soap", {"basis_method": "eigh"}),
    ("ng_plus_per_sample", {"solver": "smw"}),
    ("b_kfac", {"factor_form": "brand"}),
    ("b_r_kfac", {"factor_form": "brand"}),
    ("b_kfac_c", {"factor_form": "brand"}),
]
VARIANT = pytest.mark.parametrize(
    ("row", "options"), VARIANTS, ids=[f"{row}-{next(iter(o.values()))}" for row, o in VARIANTS]
)


def three_matrices(name: str, **options: Any) -> PreconditionedOptimizer:
    """Two stacked matrices, another one and a vector."""
    shapes = {**MATRICES, "bias": (5,)}
    params = [(key, parameter(*shape, seed=i)) for i, (key, shape) in enumerate(shapes.items())]
    return build(name, params, **{**EAGER, **options})


def used_solvers(name: str, solvers: Solvers, **options: Any) -> list[str]:
    """The solvers that an optimizer calls once it runs, from the fourth step on."""
    optimizer = three_matrices(name, **options)
    run(optimizer, range(1, 4))
    solvers.mend()
    run(optimizer, range(4, 8))
    return sorted(solvers.calls)


def factorisation_keys(name: str, **options: Any) -> set[str]:
    """State of the matrices that a step on which nothing is due leaves alone.

    Of an algorithm that refreshes at every step it is all its state.
    """
    optimizer = three_matrices(name, **options)
    run(optimizer, range(1, 4))
    lazy: set[str] = set()
    for step in (4, 5):
        before = {key: tensor.clone() for key, tensor in state_tensors(optimizer).items()}
        run(optimizer, [step])
        after = state_tensors(optimizer)
        lazy |= {key for key in before if torch.equal(before[key], after[key])}
    algorithm = optimizer.recipe.algorithm
    own = algorithm.init((1, 4, 4), dtype=torch.float64, device=torch.device("meta"))
    of_matrices = {key for key in state_tensors(optimizer) if key.rpartition(".")[2] in own}
    return of_matrices & lazy or of_matrices


# --- the shell, with every optimizer --------------------------------------------------------------


def check_one_failing_call(name: str, solvers: Solvers, **options: Any) -> None:
    for solver in used_solvers(name, solvers, **options):
        healthy, faulty = (three_matrices(name, **options) for _ in range(2))
        for optimizer in (healthy, faulty):
            run(optimizer, range(1, 5))
        faulty.health()
        solvers.fail(solver, times=1)
        run(faulty, range(5, 9))
        solvers.mend()
        run(healthy, range(5, 9))
        assert_same(params_of(faulty), params_of(healthy), TOLERANCE, f"{solver}: weight")
        assert faulty.health()["failed_updates"] == 0


def test_one_failing_call_is_repeated(name: str, solvers: Solvers) -> None:
    """In float64, or matrix by matrix: nothing is lost and nothing counts twice."""
    check_one_failing_call(name, solvers)


@VARIANT
def test_one_failing_call_is_repeated_in(
    row: str, options: dict[str, Any], solvers: Solvers
) -> None:
    check_one_failing_call(row, solvers, **options)


def check_a_failing_stack(name: str, solvers: Solvers, **options: Any) -> None:
    for solver in used_solvers(name, solvers, **options):
        healthy, faulty = (three_matrices(name, **options) for _ in range(2))
        for optimizer in (healthy, faulty):
            run(optimizer, range(1, 5))
        faulty.health()
        # The call and, for what is retried even in float64, its repetition.
        solvers.fail(solver, times=2 if solver in ("eigh", "eigvalsh") else 1)
        run(faulty, range(5, 9))
        solvers.mend()
        run(healthy, range(5, 9))
        assert_same(params_of(faulty), params_of(healthy), TOLERANCE, f"{solver}: weight")
        assert faulty.health()["failed_updates"] == 0


def test_a_failing_stack_is_worked_on_matrix_by_matrix(name: str, solvers: Solvers) -> None:
    """The whole stack fails, each of its matrices alone goes well: as if nothing had happened."""
    check_a_failing_stack(name, solvers)


@VARIANT
def test_a_failing_stack_is_worked_on_matrix_by_matrix_in(
    row: str, options: dict[str, Any], solvers: Solvers
) -> None:
    check_a_failing_stack(row, solvers, **options)


def check_failing_steps(
    name: str, solvers: Solvers, logs: pytest.LogCaptureFixture, **options: Any
) -> None:
    options = {**options, "momentum": "none", "rotated_momentum": False}
    used = used_solvers(name, solvers, **options)
    assert bool(used) != (name in WITHOUT_SOLVERS)
    kept = sorted(factorisation_keys(name, **options))
    for solver in used:
        optimizer = three_matrices(name, **options)
        weights = run(optimizer, range(1, 5))
        old_state = [state_tensors(optimizer)[key].clone() for key in kept]
        optimizer.health()
        logs.clear()
        solvers.fail(solver)
        after = run(optimizer, [5, 6])
        solvers.mend()
        counted = int(optimizer.health()["failed_updates"])
        assert counted >= len(MATRICES), solver
        assert len(logs.records) == counted
        for key in MATRICES:
            assert f"{key}: " in logs.text
        assert "in a row" in logs.text
        for old, new in zip(weights, after, strict=True):
            assert new.isfinite().all()
            assert not torch.equal(old, new)
        state = state_tensors(optimizer)
        assert_bit_equal([state[key] for key in kept], old_state, f"{solver}: state")
        assert all(weight.isfinite().all() for weight in run(optimizer, range(7, 11)))
        assert optimizer.health()["failed_updates"] == 0


def test_failing_steps_keep_the_old_factorisation(
    name: str, solvers: Solvers, caplog: pytest.LogCaptureFixture
) -> None:
    """All calls fail for two steps; every matrix is counted and named, and training goes on."""
    check_failing_steps(name, solvers, caplog)


@VARIANT
def test_failing_steps_keep_the_old_factorisation_in(
    row: str, options: dict[str, Any], solvers: Solvers, caplog: pytest.LogCaptureFixture
) -> None:
    check_failing_steps(row, solvers, caplog, **options)


def test_lasting_failures_end_in_an_error_with_the_name(name: str, solvers: Solvers) -> None:
    """At ``max_failures`` in a row, and not before."""
    for solver in used_solvers(name, solvers):
        optimizer = three_matrices(name, max_failures=3)
        run(optimizer, range(1, 5))
        optimizer.health()
        solvers.fail(solver)
        with pytest.raises(DecompositionError, match=r"'first\.weight'.*3 in a row.*max_failures"):
            run(optimizer, range(5, 40))
        solvers.mend()
        assert 3 <= optimizer.health()["failed_updates"] <= 9
        assert all(param.isfinite().all() for param in params_of(optimizer))


@pytest.mark.parametrize("size", [8, 2])
def test_a_lasting_failure_of_one_tile_is_an_error(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of ten are tiles of eight and of two columns; those of one size always fail."""
    real = torch.linalg.eigh

    def picky(a: Tensor) -> Any:
        if a.shape[-1] == size:
            raise torch.linalg.LinAlgError("did not converge")
        return real(a)

    optimizer = three_matrices("block_adam", max_failures=3)
    run(optimizer, range(1, 3))
    monkeypatch.setattr(torch.linalg, "eigh", picky)
    with pytest.raises(DecompositionError, match=r"first\.weight"):
        run(optimizer, range(3, 20))


# --- the solvers themselves -----------------------------------------------------------------------


def positive(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    root = torch.randn(*shape, shape[-1], dtype=dtype)
    return root @ root.mT + torch.eye(shape[-1], dtype=dtype)


SOLVER_CALLS = {
    "eigh": lambda a: eigh(a)[1],
    "svd": lambda a: thin_svd(a)[0],
    "qr": orthonormal,
    "qr with signs": lambda a: positive_qr(a)[0],
    "Ritz": lambda a: top_ritz_basis(torch.eye(4, dtype=a.dtype).expand_as(a), a),
    "Cholesky": positive_inverse,
}


@pytest.mark.parametrize("call", SOLVER_CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solvers_fail_with_one_kind_of_error(
    call: str, dtype: torch.dtype, solvers: Solvers
) -> None:
    solvers.fail()
    with pytest.raises(DecompositionError, match=r"\(3, 4, 4\).* failed in float64"):
        SOLVER_CALLS[call](positive(3, 4, dtype=dtype))
    assert set(solvers.calls) <= {*RAISING, *REPORTING}


@pytest.mark.parametrize("call", SOLVER_CALLS)
def test_solvers_repeat_a_float32_failure_in_float64(call: str, solvers: Solvers) -> None:
    a = positive(3, 4, dtype=torch.float32)
    expected = SOLVER_CALLS[call](a)
    solvers.fail(times=1)
    found = SOLVER_CALLS[call](a)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.fixture
def suspicious(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is treated as a device whose solvers may return wrong vectors without an error."""
    monkeypatch.setattr(eigen, "_RIGHT_IF_FINITE", frozenset())


def spoil(monkeypatch: pytest.MonkeyPatch, solver: str, dtypes: Iterable[torch.dtype]) -> None:
    """Lets a solver return a repeated column for some dtypes, and no error."""
    real = getattr(torch.linalg, solver)

    def wrong(a: Tensor, **kwargs: Any) -> Any:
        parts = [part.clone() for part in real(a, **kwargs)]
        if a.dtype in dtypes:
            vectors = parts[1] if solver == "eigh" else parts[0]
            vectors[-1, :, 0] = vectors[-1, :, 1]
        return parts

    monkeypatch.setattr(torch.linalg, solver, wrong)


@pytest.mark.usefixtures("suspicious")
@pytest.mark.parametrize("solver", ["eigh", "svd"])
def test_vectors_that_are_not_orthonormal_are_found_again_in_float64(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = positive(3, 4, dtype=torch.float32)
    expected = SOLVER_CALLS[solver](a)
    spoil(monkeypatch, solver, {torch.float32})
    torch.testing.assert_close(SOLVER_CALLS[solver](a).abs(), expected.abs())


@pytest.mark.usefixtures("suspicious")
@pytest.mark.parametrize("solver", ["eigh", "svd"])
def test_vectors_that_are_never_orthonormal_are_an_error(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, solver, {torch.float32, torch.float64})
    with pytest.raises(DecompositionError, match=r"\(3, 4, 4\)"):
        SOLVER_CALLS[solver](positive(3, 4, dtype=torch.float32))


@pytest.mark.usefixtures("suspicious")
def test_an_optimizer_counts_wrong_vectors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = three_matrices("shampoo", state_dtype="float32")
    run(optimizer, range(1, 5))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        spoil(patch, "eigh", {torch.float32, torch.float64})
        weights = run(optimizer, [5, 6])
    assert optimizer.health()["failed_updates"] == len(MATRICES)
    assert "first.weight: eigh of" in caplog.text
    assert all(weight.isfinite().all() for weight in weights)
