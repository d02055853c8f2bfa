"""Brand's update, and what the forms kept by it promise of their factors (Puiu 2022, 3.2 to 4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.linalg.lowrank import add_gram
from hf_precond.preconditioners.brand_kfac import BrandCKFac, BrandKFac, BrandRKFac
from hf_precond.preconditioners.kfac import KFac
from hf_precond.preconditioners.schedule import Schedule
from tests.driving import assert_apart, assert_near, random_matrices
from tests.theory import loewner
from tests.theory.columns import LayerDriver, Seen, directions, form, seen

# --- the update in float32 ------------------------------------------------------------------------

UPDATES = 1000
WIDTH, RANK, EXTRA, RHO = 64, 8, 6, 0.95
FLOAT32_TOL = 1e-4


def _incoming(kind: str, vectors: Tensor, step: int) -> Tensor:
    """Six columns [64, 6] beside a form with vectors [64, 8]."""
    fresh = random_matrices(WIDTH, EXTRA, seed=step)
    inside = vectors.double() @ random_matrices(vectors.shape[1], EXTRA, seed=step + UPDATES)
    if kind == "fresh":
        return fresh
    if kind == "half_inside":
        return inside + fresh
    if kind == "nearly_inside":
        return inside + 1e-5 * fresh
    if kind == "inside":
        return inside if step % 3 else fresh
    if kind == "dependent":
        return fresh[:, :1].expand(-1, EXTRA) * torch.arange(1, EXTRA + 1)
    if kind == "falling":
        return fresh * 10.0 ** -torch.arange(EXTRA)
    assert kind == "some_inside"
    return torch.where(torch.arange(EXTRA) % 2 == 0, fresh, inside)


_KINDS = ["fresh", "half_inside", "nearly_inside", "inside", "some_inside", "dependent", "falling"]


@pytest.mark.parametrize("kind", _KINDS)
def test_a_thousand_updates_in_float32(kind: str) -> None:
    """Each is the dense eigendecomposition of rho U_r D_r U_r^T + (1 - rho) C C^T, and the columns
    of U stay orthonormal, as :class:`BrandKFac` goes on: cut off at r, decay, add."""
    vectors, values = torch.zeros(1, WIDTH, RANK + EXTRA), torch.zeros(1, RANK + EXTRA)
    scale, skew, worst = 0.0, 0.0, 0.0
    for step in range(UPDATES):
        columns = _incoming(kind, vectors[0, :, :RANK], step).float()
        kept, decayed = vectors[..., :RANK], RHO * values[..., :RANK]
        weighted = (1 - RHO) ** 0.5 * columns.unsqueeze(0)
        expected = loewner.low_rank(kept.double(), decayed.double())
        expected = expected + weighted.double() @ weighted.double().mT
        vectors, values = add_gram(kept, decayed, weighted, keep=RANK + EXTRA)
        found = loewner.low_rank(vectors.double(), values.double())
        scale = torch.linalg.matrix_norm(expected).item()
        worst = max(worst, torch.linalg.matrix_norm(found - expected).item() / scale)
        if step % 50 == 49:
            spectrum = torch.linalg.eigvalsh(expected).flip(-1)[..., : RANK + EXTRA]
            assert (values - spectrum).abs().max() <= FLOAT32_TOL * spectrum.max(), f"step {step}"
        alive = torch.diag_embed((values > 0).float())
        skew = max(skew, torch.linalg.matrix_norm(vectors.mT @ vectors - alive, ord=2).item())
    assert scale > 0
    assert skew < FLOAT32_TOL
    assert worst < FLOAT32_TOL


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_thousand_updates_in_float32_follow_those_in_float64(noise: float) -> None:
    """Where the spectrum says which directions stay: eight strong ones, and rounding does not
    add up over the updates."""
    directions_ = torch.linalg.qr(random_matrices(WIDTH, RANK, seed=1)).Q
    strong = directions_ * torch.linspace(2.0, 1.0, RANK, dtype=torch.float64)
    forms = [
        (torch.zeros(1, WIDTH, RANK, dtype=dtype), torch.zeros(1, RANK, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    ]
    for step in range(UPDATES):
        columns = strong @ random_matrices(RANK, EXTRA, seed=step)
        columns = columns + noise * random_matrices(WIDTH, EXTRA, seed=step + UPDATES)
        updated = []
        for vectors, values in forms:
            weighted = ((1 - RHO) ** 0.5 * columns).to(values.dtype).unsqueeze(0)
            updated.append(
                add_gram(vectors[..., :RANK], RHO * values[..., :RANK], weighted, keep=RANK + EXTRA)
            )
        forms = updated
    found, expected = (loewner.low_rank(u.double(), s.double()) for u, s in forms)
    difference = torch.linalg.matrix_norm(found - expected)
    assert difference <= FLOAT32_TOL * torch.linalg.matrix_norm(expected)


@pytest.mark.parametrize("kind", ["fresh", "inside", "dependent"])
def test_the_algorithm_itself_in_float32(kind: str) -> None:
    """Through the state of B-KFAC; factors, forms and their widths."""
    algorithm = BrandKFac(
        brand_interval=1, rank=Schedule.parse(RANK), max_columns=EXTRA, factor_form="brand"
    )
    driver = LayerDriver(algorithm, (3, WIDTH))
    driver.state = {name: tensor.float() for name, tensor in driver.state.items()}
    for step in range(200):
        before = driver.state["input_vectors"][0, :, :RANK].clone()
        values = driver.state["input_values"][0, :RANK].clone()
        columns = _incoming(kind, before, step)
        outputs = random_matrices(EXTRA, 1, 3, seed=step)
        driver.step((columns.T.unsqueeze(1).float(), outputs.float()))
        decay, weight = (RHO, 1 - RHO) if step else (0.0, 1.0)
        expected = decay * loewner.low_rank(before.double(), values.double())
        expected = expected + weight * columns @ columns.T / EXTRA
        found = form(driver, "input")
        assert torch.linalg.matrix_norm(found - expected) <= FLOAT32_TOL * expected.norm()
        assert driver.state["input_width"].item() == min(EXTRA * (step + 1), RANK + EXTRA)


# --- the processes of the paper -------------------------------------------------------------------
# M_k: the factor. Mt_k: the form in use, of rank r + n. B_k: Mt_k cut off at r. MR_k: M_k cut off.
# Steps of the optimizer are k + 1.

SIZE, OUTPUTS, R, N, STEPS = 20, 3, 4, 3, 14
DECAY = 0.9
NORMS: list[Any] = ["fro", "nuc", 2]
IDENTITY_TOL = 1e-11

per_decay = pytest.mark.parametrize("spectrum", [1.0, 0.7])
per_norm = pytest.mark.parametrize("norm", NORMS)


def _stream(spectrum: float, steps: int = STEPS) -> list[Seen]:
    return [seen(N, SIZE, OUTPUTS, seed=seed, decay=spectrum) for seed in range(steps)]


def _brand(cls: type[BrandKFac] = BrandKFac, **options: Any) -> LayerDriver:
    settings = {"update_interval": 1, "brand_interval": 1, "factor_decay": DECAY, **options}
    rank = settings.pop("rank", R)
    algorithm = cls(
        **settings, rank=Schedule.parse(rank), max_columns=N, factor_form="brand", damping=_DAMPING
    )
    return LayerDriver(algorithm, (OUTPUTS, SIZE))


_DAMPING = Schedule.parse(0.1)


def _grams(stream: list[Seen]) -> list[Tensor]:
    """M_i M_i^T of the incoming columns."""
    return [batch[0].flatten(0, 1).T @ batch[0].flatten(0, 1) / N for batch in stream]


def _factors(stream: list[Seen]) -> list[Tensor]:
    """M_k, as K-FAC keeps it."""
    driver = LayerDriver(
        KFac(update_interval=1, inverse_interval=1, factor_decay=DECAY), (OUTPUTS, SIZE)
    )
    return [_after(driver, batch, driver.state["input_factor"])[0] for batch in stream]


def _after(driver: LayerDriver, batch: Seen, tensor: Tensor) -> Tensor:
    driver.step(batch)
    return tensor.clone()


def _forms(driver: LayerDriver, stream: list[Seen]) -> list[Tensor]:
    """Mt_k."""
    found = []
    for batch in stream:
        driver.step(batch)
        found.append(form(driver, "input"))
    return found


def _cut(matrix: Tensor, rank: int = R) -> Tensor:
    """The best approximation of a rank."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    return (vectors * values) @ vectors.T


def _kappa(i: int) -> float:
    return 1.0 if i == 0 else 1 - DECAY


@per_decay
def test_form_follows_its_process(spectrum: float) -> None:
    """Equation (10)."""
    stream = _stream(spectrum)
    forms, grams = _forms(_brand(), stream), _grams(stream)
    assert_near(forms[0], grams[0], IDENTITY_TOL)
    for k in range(1, STEPS):
        expected = DECAY * _cut(forms[k - 1]) + (1 - DECAY) * grams[k]
        assert_near(forms[k], expected, IDENTITY_TOL, f"k = {k}")


@per_norm
@per_decay
def test_no_form_beats_the_factors_own_of_its_rank(spectrum: float, norm: Any) -> None:
    """Proposition 3.1, in unitarily invariant norms."""
    stream = _stream(spectrum)
    for factor, approximation in zip(_factors(stream), _forms(_brand(), stream), strict=True):
        room = 1e-12 * torch.linalg.matrix_norm(factor, ord=norm)
        for found, rank in ((_cut(approximation), R), (approximation, R + N)):
            best = torch.linalg.matrix_norm(factor - _cut(factor, rank), ord=norm)
            assert torch.linalg.matrix_norm(factor - found, ord=norm) >= best - room


@per_norm
@per_decay
def test_the_form_in_use_is_better_than_its_truncation(spectrum: float, norm: Any) -> None:
    """|M - Mt| <= |M - B|: why the r + n form is applied."""
    stream = _stream(spectrum)
    for factor, approximation in zip(_factors(stream), _forms(_brand(), stream), strict=True):
        whole = torch.linalg.matrix_norm(factor - approximation, ord=norm)
        cut = torch.linalg.matrix_norm(factor - _cut(approximation), ord=norm)
        assert whole <= cut + 1e-12 * torch.linalg.matrix_norm(factor, ord=norm)


@per_decay
def test_errors_are_sums_of_what_was_cut_off(spectrum: float) -> None:
    """Equation (13): M_(i+q) - Mt_(i+q) = rho^q (M_i - B_i) + sum_j rho^(q-j) (Mt - B)_(i+j)."""
    stream = _stream(spectrum)
    factors, forms = _factors(stream), _forms(_brand(), stream)
    for i in range(STEPS - 1):
        for q in range(1, STEPS - i):
            expected = DECAY**q * (factors[i] - _cut(forms[i])) + sum(
                DECAY ** (q - j) * (forms[i + j] - _cut(forms[i + j])) for j in range(1, q)
            )
            _assert_close(factors[i + q] - forms[i + q], expected, factors[i + q], f"{i} + {q}")


@pytest.mark.parametrize("i", [2, 5])
@per_decay
def test_errors_after_an_overwriting(spectrum: float, i: int) -> None:
    """Equation (12): the same from MR_i in place of B_i, as B-R-KFAC goes on at step i + 2."""
    stream = _stream(spectrum, 2 * i + 2)
    driver = _brand(BrandRKFac, rsvd_interval=i + 1, oversampling=Schedule.parse(SIZE))
    factors, forms = _factors(stream), _forms(driver, stream)
    pure = _forms(_brand(), stream)
    for k in range(i + 1):
        assert_near(forms[k], pure[k], IDENTITY_TOL)
    for q in range(1, i + 2):
        expected = DECAY**q * (factors[i] - _cut(factors[i])) + sum(
            DECAY ** (q - j) * (forms[i + j] - _cut(forms[i + j])) for j in range(1, q)
        )
        _assert_close(factors[i + q] - forms[i + q], expected, factors[i + q], f"q = {q}")
    for norm in NORMS:  # better than none for one step
        errors = [
            torch.linalg.matrix_norm(factors[i + 1] - m[i + 1], ord=norm) for m in (forms, pure)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-12)
    assert_apart(forms[i + 1], pure[i + 1], 1e-4)


@per_decay
def test_all_parts_of_the_errors_are_positive_semidefinite(spectrum: float) -> None:
    """Proposition 3.2: nothing is overestimated."""
    stream = _stream(spectrum)
    zero = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for factor, approximation in zip(_factors(stream), _forms(_brand(), stream), strict=True):
        truncated = _cut(approximation)
        for part in (factor - truncated, approximation - truncated, factor - _cut(factor)):
            loewner.assert_below(zero, part + 1e-12 * factor.norm() * torch.eye(SIZE), "part")


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("cls", [BrandKFac, BrandCKFac])
@per_decay
def test_estimates_are_below_the_factor(spectrum: float, cls: type[BrandKFac], side: str) -> None:
    """In Loewner's order, at every step before a correction."""
    stream = _stream(spectrum)
    own = {} if cls is BrandKFac else {"correction_interval": STEPS}
    driver = _brand(cls, rank=2, **own)
    exact = LayerDriver(
        KFac(update_interval=1, inverse_interval=1, factor_decay=DECAY), (OUTPUTS, SIZE)
    )
    for k, batch in enumerate(stream):
        driver.step(batch)
        exact.step(batch)
        loewner.assert_below(form(driver, side), exact.state[f"{side}_factor"][0], f"k = {k}")


@per_decay
def test_decomposition_of_the_error(spectrum: float) -> None:
    """Equations (14) with (15) and (16): after the RSVD at k = 0 no update, or Brand's."""
    stream = _stream(spectrum)
    factors, forms, grams = _factors(stream), _forms(_brand(), stream), _grams(stream)
    start = _cut(factors[0])
    cut_off = [(approximation - _cut(approximation)) / (1 - DECAY) for approximation in forms]
    for k in range(1, STEPS):
        first = [factors[0] - start]
        idle = first + [grams[i] - start for i in range(1, k + 1)]
        brand = [*first, *cut_off[1:k], torch.zeros_like(start)]
        for parts, approximation in ((idle, start), (brand, forms[k])):
            total = sum(_kappa(i) * DECAY ** (k - i) * parts[i] for i in range(k + 1))
            _assert_close(factors[k] - approximation, total, factors[k], f"k = {k}")


def test_bounds_of_the_parts() -> None:
    """Equations (17) and (18): (17) is reached where new columns are orthogonal to the old form."""
    for spectrum in (1.0, 0.7):
        stream = _stream(spectrum)
        forms, grams = _forms(_brand(), stream), _grams(stream)
        start = _cut(grams[0])
        for j in range(1, STEPS):
            idle = (grams[j] - start).norm()
            assert idle <= (grams[j].norm() ** 2 + start.norm() ** 2).sqrt() * (1 + 1e-12)
            brand = (forms[j] - _cut(forms[j])).norm() / (1 - DECAY)
            assert brand <= grams[j].norm() * (1 + 1e-12)
    apart = [torch.zeros(N, 1, SIZE, dtype=torch.float64) for _ in range(2)]
    apart[0][..., : SIZE // 2] = random_matrices(N, 1, SIZE // 2, seed=1)
    apart[1][..., SIZE // 2 :] = random_matrices(N, 1, SIZE - SIZE // 2, seed=2)
    old, new = (x.flatten(0, 1).T @ x.flatten(0, 1) / N for x in apart)
    bound = (new.norm() ** 2 + _cut(old).norm() ** 2).sqrt()
    assert abs((new - _cut(old)).norm() - bound) <= 1e-12 * bound


@pytest.mark.parametrize("seed", range(10))
def test_one_update_is_better_than_none(seed: int) -> None:
    """At k = 1, in the Frobenius norm; later it need not be."""
    stream = [seen(2 * N, SIZE, OUTPUTS, seed=seed + i) for i in (0, 100)]
    algorithm = BrandKFac(
        brand_interval=1,
        rank=Schedule.parse(R),
        max_columns=2 * N,
        factor_form="brand",
        factor_decay=DECAY,
    )
    forms = _forms(LayerDriver(algorithm, (OUTPUTS, SIZE)), stream)
    factors = _factors(stream)
    updated, idle = (factors[1] - forms[1]).norm(), (factors[1] - _cut(factors[0])).norm()
    assert 1e-3 < updated < idle


# --- corrections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("side", ["input", "output"])
@per_decay
def test_corrections_never_increase_the_error(spectrum: float, side: str, share: float) -> None:
    """In the Frobenius norm: from the form that B-KFAC would have, at every correction of many."""
    driver, errors = _corrections(spectrum, side, share, interval=2)
    for before, after in errors:
        assert after <= before * (1 + 1e-12)
    assert any(after < before * (1 - 1e-6) for before, after in errors)
    vectors, values = (driver.state[f"{side}_{name}"][0] for name in ("vectors", "values"))
    assert (values.diff() <= 0).all()
    alive = torch.diag((values > 0).double())
    assert (vectors.T @ vectors - alive).abs().max() < 1e-12


def _corrections(
    spectrum: float, side: str, share: float, interval: int
) -> tuple[LayerDriver, list[tuple[Tensor, Tensor]]]:
    """A corrected run, and the errors before and after each of its corrections."""
    options = {"rank": R if side == "input" else 2}
    driver = _brand(BrandCKFac, correction_interval=interval, correction_share=share, **options)
    plain = _brand(**options)
    errors = []
    for k, batch in enumerate(_stream(spectrum)):
        plain.state = {name: driver.state[name].clone() for name in plain.state}
        plain.steps = driver.steps
        plain.step(batch)
        driver.step(batch)
        factor = driver.state[f"{side}_factor"][0]
        before, after = ((factor - form(run, side)).norm() for run in (plain, driver))
        if k and k % interval == 0:
            errors.append((before, after))
        else:
            assert torch.equal(before, after)
    return driver, errors


def test_a_correction_takes_the_factors_own_part_of_the_span() -> None:
    """Uc^T (M - Mt) Uc = 0 for the directions drawn, here all of the first r."""
    stream = _stream(0.9, 3)
    driver = _brand(BrandCKFac, correction_interval=2, correction_share=1.0)
    plain = _brand()
    for batch in stream[:2]:
        driver.step(batch)
        plain.step(batch)
    plain.step(stream[2])
    span = plain.state["input_vectors"][0, :, :R].clone()
    driver.step(stream[2])
    factor = driver.state["input_factor"][0]
    inner = span.T @ (factor - form(driver, "input")) @ span
    assert inner.abs().max() <= 1e-12 * factor.norm()
    assert (span.T @ (factor - form(plain, "input")) @ span).abs().max() > 1e-6 * factor.norm()


def test_estimates_may_be_above_the_factor_after_a_correction() -> None:
    """What was corrected and what was not have common terms in the factor."""
    lowest = []
    for seed in range(10):
        driver = _brand(BrandCKFac, correction_interval=2)
        for i in range(5):
            driver.step(seen(N, SIZE, OUTPUTS, seed=100 * seed + i))
        factor = driver.state["input_factor"][0]
        lowest.append(torch.linalg.eigvalsh(factor - form(driver, "input"))[0] / factor.norm())
    assert min(lowest) < -1e-4


# --- application ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [BrandKFac, BrandRKFac, BrandCKFac])
def test_linear_application_is_the_plain_one(cls: type[BrandKFac]) -> None:
    stream = _stream(0.8)
    settings: dict[str, Any] = {
        "update_interval": 2,
        "brand_interval": 2,
        "rank": Schedule.parse(R),
        "max_columns": N,
        "factor_form": "brand",
    }
    plain = directions(cls(**settings), stream)
    assert_near(directions(cls(**settings, application="linear"), stream), plain, 1e-11)


def _assert_close(found: Tensor, expected: Tensor, scale: Tensor, what: str) -> None:
    """Of differences of matrices, relative to the matrices themselves."""
    assert (found - expected).norm() <= IDENTITY_TOL * scale.norm(), what
