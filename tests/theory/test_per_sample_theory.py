"""SENG and per-sample NG+: what holds of natural gradients from samples, checked in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.ng_plus import NgPlus
from hf_precond.preconditioners.sample_grams import inner_products, sum_of_grams
from hf_precond.preconditioners.schedule import Schedule
from hf_precond.preconditioners.seng import Seng
from tests.driving import assert_apart, assert_near, random_matrices
from tests.theory.columns import LayerDriver, Seen, directions, gradient, seen, transformed

EXACT_TOL = 1e-10
DAMPING = 0.3
STEPS = 4
SHAPES = [(4, 7), (7, 4), (5, 5), (1, 6)]

Shape = tuple[int, int]

per_shape = pytest.mark.parametrize("shape", SHAPES)
per_mode = pytest.mark.parametrize("mode", ["absolute", "relative"])


def stream(shape: Shape, samples: int = 6, *, positions: int = 1, steps: int = STEPS) -> list[Seen]:
    rows, columns = shape
    return [seen(samples, columns, rows, positions=positions, seed=seed) for seed in range(steps)]


def ng_plus(**options: Any) -> NgPlus:
    settings = {"curvature": "per_sample", "update_interval": 1, "damping": Schedule.parse(DAMPING)}
    return NgPlus(**{**settings, **options})


def seng(**options: Any) -> Seng:
    settings = {"sample_size": None, "update_interval": 1, "damping": Schedule.parse(DAMPING)}
    return Seng(**{**settings, "max_columns": 64, **options})


def per_sample(batch: Seen) -> Tensor:
    """The gradient of each sample's own mean loss, [N, M, B]."""
    return torch.stack([gradient((a[None], g[None])) for a, g in zip(*batch, strict=True)])


def every() -> list[tuple[str, Any]]:
    """Members whose damping is relative."""
    relative = {"damping_mode": "relative"}
    found: list[tuple[str, Any]] = [
        ("per_sample", ng_plus(**relative)),
        ("ema", ng_plus(curvature="per_sample_ema", beta=0.7, **relative)),
        ("smw", ng_plus(solver="smw", max_columns=64, **relative)),
        ("sketched", ng_plus(solver="sketched", max_columns=64, sketch_rows=3, **relative)),
        ("seng", seng(**relative)),
        ("seng_sampled", seng(sample_size=3, **relative)),
    ]
    return found


per_member = pytest.mark.parametrize(("name", "algorithm"), every(), ids=lambda x: str(x)[:12])


# --- Gram matrices that need no per-sample gradient -----------------------------------------------


@pytest.mark.parametrize("positions", [1, 4])
def test_grams_of_gradients_that_are_not_formed(positions: int) -> None:
    inputs, outputs = (x.unsqueeze(0) for x in seen(5, 7, 4, positions=positions))
    each = outputs.mT @ inputs  # [1, N, M, B]
    assert_near(sum_of_grams(outputs, inputs), (each @ each.mT).sum(1), EXACT_TOL)
    flat = outputs.flatten(1, 2), inputs.flatten(1, 2)
    single = (flat[0].unsqueeze(-1) * flat[1].unsqueeze(-2)).flatten(2)
    assert_near(inner_products(*flat), single @ single.mT, EXACT_TOL)


# --- NG+ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [1, 3])
@per_mode
@per_shape
def test_direction_is_that_of_the_samples_second_moment(
    shape: Shape, mode: str, positions: int
) -> None:
    """(1/N sum_i G_i G_i^T + lam I)^(-1) G on the smaller side, dense."""
    for batch in stream(shape, positions=positions):
        found = LayerDriver(ng_plus(damping_mode=mode), shape).step(batch)
        each, g = per_sample(batch), gradient(batch)
        if shape[0] > shape[1]:
            each, g, found = each.mT, g.T, found.T
        curvature = (each @ each.mT).mean(0)
        lam = DAMPING * (torch.linalg.eigvalsh(curvature)[-1] if mode == "relative" else 1.0)
        damped = curvature + lam * torch.eye(len(g), dtype=g.dtype)
        assert_near(found, torch.linalg.solve(damped, g), EXACT_TOL)


@per_mode
@pytest.mark.parametrize("samples", [1, 3, 20])
@per_shape
def test_sherman_morrison_woodbury_is_dense(shape: Shape, samples: int, mode: str) -> None:
    """Fewer and more samples than the curvature is wide."""
    batches = stream(shape, samples)
    found = directions(ng_plus(solver="smw", max_columns=32, damping_mode=mode), batches)
    assert_near(found, directions(ng_plus(damping_mode=mode), batches), EXACT_TOL)


@per_mode
@per_shape
def test_sherman_morrison_woodbury_takes_each_position_for_a_sample(
    shape: Shape, mode: str
) -> None:
    batches = stream(shape, positions=3)
    single = transformed(batches, lambda batch: tuple(x.flatten(0, 1).unsqueeze(1) for x in batch))
    options = {"solver": "smw", "max_columns": 64, "damping_mode": mode}
    found = directions(ng_plus(**options), batches)
    assert_near(found, directions(ng_plus(damping_mode=mode), single), EXACT_TOL)
    assert_apart(found, directions(ng_plus(damping_mode=mode), batches), 1e-2)


@per_mode
@per_shape
def test_sketch_of_all_rows_is_exact(shape: Shape, mode: str) -> None:
    """Om a permutation: C = (U^T U + lam I)^(-1) U^T G."""
    options = {"max_columns": 32, "damping_mode": mode}
    batches = stream(shape)
    whole = directions(ng_plus(solver="smw", **options), batches)
    for rows in (None, min(shape), 64):
        found = directions(ng_plus(solver="sketched", sketch_rows=rows, **options), batches)
        assert_near(found, whole, EXACT_TOL)
    if min(shape) > 2:
        some = directions(ng_plus(solver="sketched", sketch_rows=2, **options), batches)
        assert_apart(some, whole, 1e-2)


@pytest.mark.parametrize("positions", [1, 4])
@per_mode
@per_shape
def test_one_sample_is_the_minibatch(shape: Shape, mode: str, positions: int) -> None:
    """At beta 0 and gamma 1: one sample's gradient is the batch's."""
    batches = stream(shape, 1, positions=positions)
    options = {"curvature": "minibatch", "beta": 0.0, "gamma": 1.0, "damping_mode": mode}
    found = directions(ng_plus(damping_mode=mode), batches)
    assert_near(found, directions(ng_plus(**options), batches), EXACT_TOL)


@per_shape
def test_running_average_with_the_first_one_in_full(shape: Shape) -> None:
    """L_t = beta L_(t-1) + (1 - beta) new (Eq. 11); at beta 0 the newest alone."""
    batches, x = stream(shape), random_matrices(*shape)
    ema = directions(ng_plus(curvature="per_sample_ema", beta=0.7), batches, x)
    left = shape[0] <= shape[1]
    curvature: Tensor | None = None
    for batch, found in zip(batches, ema, strict=True):
        each = per_sample(batch) if left else per_sample(batch).mT
        new = (each @ each.mT).mean(0)
        curvature = new if curvature is None else 0.7 * curvature + 0.3 * new
        damped = curvature + DAMPING * torch.eye(len(curvature), dtype=curvature.dtype)
        expected = torch.linalg.solve(damped, x if left else x.T)
        assert_near(found if left else found.T, expected, EXACT_TOL)
    newest = directions(ng_plus(curvature="per_sample_ema", beta=0.0), batches)
    assert_near(newest, directions(ng_plus(), batches), EXACT_TOL)


@pytest.mark.parametrize("curvature", ["per_sample", "per_sample_ema"])
@per_shape
def test_sketch_of_all_columns_is_exact(shape: Shape, curvature: str) -> None:
    """q = n, drawn without replacement: bit for bit."""
    batches = stream(shape, positions=3)
    whole = directions(ng_plus(curvature=curvature), batches)
    for size in (max(shape), 64):
        sketched = directions(ng_plus(curvature=curvature, sketch_size=size), batches)
        assert torch.equal(sketched, whole)
    some = directions(ng_plus(curvature=curvature, sketch_size=2), batches)
    assert_apart(some, whole, 1e-3)


def _blocks(shape: Shape, size: int) -> list[tuple[slice, slice]]:
    """Rows or columns of the smaller side."""
    whole, small = slice(None), min(shape)
    parts = [slice(start, min(start + size, small)) for start in range(0, small, size)]
    left = shape[0] <= shape[1]
    return [(part, whole) if left else (whole, part) for part in parts]


@per_mode
@pytest.mark.parametrize("curvature", ["per_sample", "per_sample_ema"])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_blocks_never_mix(shape: Shape, curvature: str, mode: str) -> None:
    """A tile of the weight has the rows and columns of its own, and knows of no other: the
    diagonal blocks of the curvature of all (Eq. 18)."""
    options = {"curvature": curvature, "damping_mode": mode}
    batches, x = stream(shape, positions=2), random_matrices(*shape)
    assert ng_plus(block_size=2).place((1, *shape)).tile == (
        (2, shape[1]) if shape[0] < shape[1] else (shape[0], 2)
    )
    driver = LayerDriver(ng_plus(**options), shape)
    for batch in batches:
        driver.step(batch, x)
    whole = driver.state["curvature"][0]
    left = shape[0] < shape[1]
    for block in _blocks(shape, 2):
        rows, columns = block
        part = [(inputs[..., columns], outputs[..., rows]) for inputs, outputs in batches]
        alone = directions(ng_plus(**options), part, x[block])[-1]
        index = rows if left else columns
        own = whole[index, index]
        lam = DAMPING * (torch.linalg.eigvalsh(own)[-1] if mode == "relative" else 1.0)
        damped = own + lam * torch.eye(len(own), dtype=own.dtype)
        expected = torch.linalg.solve(damped, x[block] if left else x[block].T)
        assert_near(alone if left else alone.T, expected, EXACT_TOL)


@per_shape
def test_one_block_of_all_rows_is_no_block(shape: Shape) -> None:
    """p = m: one tile."""
    for size in (min(shape), 64):
        tile = ng_plus(block_size=size).place((1, *shape)).tile
        assert tile is not None
        assert all(cut >= whole for cut, whole in zip(tile, shape, strict=True))


@per_mode
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"curvature": "per_sample_ema"},
        {"solver": "smw", "max_columns": 64},
        {"solver": "sketched", "max_columns": 64, "sketch_rows": 2},
        {"sketch_size": 3},
    ],
    ids=["per_sample", "ema", "smw", "sketched", "sketch_size"],
)
def test_transposed_weight_takes_the_transposed_step(options: dict[str, Any], mode: str) -> None:
    """Inputs and output gradients change places."""
    batches = stream((4, 7), positions=3)
    turned = transformed(batches, lambda batch: (batch[1], batch[0]))
    algorithm = ng_plus(damping_mode=mode, **options)
    assert_near(directions(algorithm, turned).mT, directions(algorithm, batches), EXACT_TOL)


# --- SENG -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("samples", [1, 6, 16])
@per_mode
@per_shape
def test_seng_is_the_damped_empirical_fisher(
    shape: Shape, mode: str, samples: int, positions: int
) -> None:
    """(1/N sum_i vec(G_i) vec(G_i)^T + lam I)^(-1) of the gradient and of anything else."""
    batch = stream(shape, samples, positions=positions, steps=1)[0]
    flat = per_sample(batch).flatten(1)
    fisher = flat.T @ flat / samples
    lam = DAMPING * (torch.linalg.eigvalsh(fisher)[-1] if mode == "relative" else 1.0)
    damped = fisher + lam * torch.eye(len(fisher), dtype=fisher.dtype)
    for x in (gradient(batch), random_matrices(*shape)):
        found = LayerDriver(seng(damping_mode=mode), shape).step(batch, x)
        assert_near(found.flatten(), torch.linalg.solve(damped, x.flatten()), EXACT_TOL)


@per_shape
def test_seng_between_refreshes_keeps_its_samples(shape: Shape) -> None:
    batches, x = stream(shape), random_matrices(*shape)
    found = directions(seng(update_interval=3), batches, x)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    assert_near(found[3], directions(seng(), batches, x)[3], EXACT_TOL)


def test_seng_with_all_rows_drawn_is_exact() -> None:
    batches = stream((4, 7), positions=2)
    whole = directions(seng(), batches)
    assert_near(directions(seng(sample_size=7), batches), whole, EXACT_TOL)
    assert_apart(directions(seng(sample_size=3), batches), whole, 1e-2)


def test_sampled_inner_products_are_unbiased() -> None:
    """Over all draws of 2 of 3 rows and 2 of 3 columns U_s^T U_s averages to U^T U."""
    batch = stream((3, 3), 4, steps=1)[0]
    found: list[Tensor] = []
    for seed in range(150):
        driver = LayerDriver(seng(sample_size=2, seed=seed, max_columns=4), (3, 3))
        driver.step(batch)
        inner = torch.linalg.inv(driver.state["inverse"][0])
        inner = inner - DAMPING * torch.eye(4, dtype=inner.dtype)
        if not any(torch.allclose(inner, other) for other in found):
            found.append(inner)
    assert len(found) == 9
    flat = per_sample(batch).flatten(1) / 2  # N = 4
    assert_near(torch.stack(found).mean(0), flat @ flat.T, EXACT_TOL)


# --- what holds of all ----------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [1, 3])
@per_member
def test_a_batch_repeated_is_the_same_step(name: str, algorithm: Any, positions: int) -> None:
    """Nothing depends on the number of samples."""
    batches = stream((4, 7), positions=positions)
    twice = transformed(batches, lambda batch: tuple(torch.cat([x, x]) for x in batch))
    assert_near(directions(algorithm, twice), directions(algorithm, batches), EXACT_TOL)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@per_member
def test_scaling_the_loss_scales_the_step_inversely(
    name: str, algorithm: Any, scale: float
) -> None:
    batches = stream((4, 7), positions=2)
    louder = transformed(batches, lambda batch: (batch[0], scale * batch[1]))
    assert_near(scale * directions(algorithm, louder), directions(algorithm, batches), 1e-9)


@pytest.mark.parametrize("make", [ng_plus, seng])
def test_an_absolute_damping_goes_with_the_square_of_the_loss(make: Any) -> None:
    batches = stream((4, 7), positions=2)
    louder = transformed(batches, lambda batch: (batch[0], 3.0 * batch[1]))
    found = directions(make(damping=Schedule.parse(9 * DAMPING)), louder)
    assert_near(3.0 * found, directions(make(), batches), EXACT_TOL)


@pytest.mark.parametrize("name", ["per_sample", "ema", "smw", "seng"])
def test_directions_descend(name: str) -> None:
    algorithm = dict(every())[name]
    batches = stream((4, 7), positions=2, steps=10)
    for batch, direction in zip(batches, directions(algorithm, batches), strict=True):
        assert (direction * gradient(batch)).sum() > 0


@per_member
def test_order_of_the_samples_does_not_matter(name: str, algorithm: Any) -> None:
    batches = stream((4, 7), positions=2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    mixed = transformed(batches, lambda batch: (batch[0][order], batch[1][order]))
    assert_near(directions(algorithm, mixed), directions(algorithm, batches), EXACT_TOL)


@per_mode
@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "smw", "max_columns": 64}, {"solver": "sketched", "max_columns": 64}],
    ids=["inverse", "smw", "sketched"],
)
def test_padded_positions_count_for_nothing(options: dict[str, Any], mode: str) -> None:
    """Zero columns at the end of every sample, T being what it was."""
    batch = stream((4, 7), positions=3, steps=1)[0]
    padded = tuple(torch.cat([x, torch.zeros_like(x[:, :2])], dim=1) for x in batch)
    padded = tuple(x * (5 / 3) ** 0.5 for x in padded)  # the helper divides by all positions
    algorithm = ng_plus(damping_mode=mode, **options)
    found = LayerDriver(algorithm, (4, 7)).step(padded, gradient(batch))
    assert_near(found, LayerDriver(algorithm, (4, 7)).step(batch), EXACT_TOL)
