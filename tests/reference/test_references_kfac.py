"""What must hold of the references of the layer methods before anything is compared with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.columns import ReferenceColumns, gradient_columns
from tests.reference.kfac import BRAND, ROWS, KfacReference
from tests.reference.layers import (
    Case,
    capture,
    tiny_conv_net,
    tiny_gpt2_block,
    tiny_mlp,
    weight_gradient,
)
from tests.reference.ng_plus import NgPlusReference
from tests.reference.seng import SengReference

SHAPES = [(4, 9), (8, 5)]
CASES = [tiny_mlp, tiny_gpt2_block, tiny_conv_net]


def columns(shape: tuple[int, int], seed: int, samples: int = 3, positions: int = 1) -> Any:
    """Random columns [N, S, .] of a layer."""
    rng = torch.Generator().manual_seed(seed)
    outputs, inputs = (
        torch.randn(samples, positions, size, generator=rng, dtype=torch.float64) for size in shape
    )
    return ReferenceColumns(inputs=inputs, outputs=outputs)


def gradient(given: ReferenceColumns) -> Tensor:
    """The sum of g a^T."""
    inputs, outputs = given.flat
    return outputs @ inputs.T


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm()


def run(method: Any, shape: tuple[int, int], steps: int = 6) -> Tensor:
    """Directions [T, M, B] on a stream of random columns."""
    found = []
    for seed in range(steps):
        given = columns(shape, seed)
        method.update(gradient(given), given)
        found.append(method.apply(gradient(given)))
    return torch.stack(found)


@pytest.mark.parametrize("make", CASES)
def test_probes_give_the_weight_gradients(make: Callable[[], Case]) -> None:
    model, loss, batches = make()
    records = capture(model, loss, batches)
    assert all(parameter.grad is None for parameter in model.parameters())
    (sum(loss(model, batch) for batch in batches) / len(batches)).backward()
    assert len(records) >= 2
    for name, record in records.items():
        if name == "lm_head":
            continue
        assert_near(record.gradient(), weight_gradient(record.module))
        assert_near(gradient(record.columns()), weight_gradient(record.module))


@pytest.mark.parametrize("make", CASES)
def test_outputs_of_a_sample_are_its_share_of_the_gradient(make: Callable[[], Case]) -> None:
    """With the samples' own gradients, from batches of one."""
    model, loss, batches = make()
    whole = capture(model, loss, batches[:1])
    batch = batches[0]
    values = list(batch.values()) if isinstance(batch, dict) else list(batch)
    for i in range(len(values[0])):
        parts = [value[i : i + 1] for value in values]
        one = dict(zip(batch, parts, strict=True)) if isinstance(batch, dict) else tuple(parts)
        for name, record in capture(model, loss, [one]).items():
            share = whole[name].columns().sample_gradients()[i]
            assert_near(share, record.gradient(), 1e-11)


def test_columns_of_a_gradient_have_it() -> None:
    grads = gradient(columns((4, 9), 0))
    for spread in (0.0, 1.0):
        assert_near(gradient(gradient_columns(grads, spread)), grads)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_kfac(kind: str, shape: tuple[int, int]) -> None:
    """Without continuation: a form that is not yet full continues its spectrum."""
    same = {"shape": shape, "rank": 16, "continuation": False, "factor_decay": 0.8}
    other = KfacReference(kind=kind, factor_form="brand", overwrite="factor", **same)
    assert_near(run(other, shape), run(KfacReference(kind="kfac", **same), shape), 1e-10)


@pytest.mark.parametrize("interval", [1, 2])
def test_overwriting_by_the_previous_factor_is_exact_at_full_rank(interval: int) -> None:
    same = {"shape": (4, 9), "rank": 16, "continuation": False}
    other = KfacReference(
        kind="b_r_kfac",
        factor_form="brand",
        rsvd_interval=interval,
        **same,
    )
    assert_near(run(other, (4, 9)), run(KfacReference(kind="kfac", **same), (4, 9)), 1e-10)


@pytest.mark.parametrize("kind", BRAND)
def test_other_sides_of_brand_are_rs_kfac(kind: str) -> None:
    same = {"shape": (8, 9), "rank": 2, "oversampling": 1, "inverse_interval": 2}
    other = KfacReference(kind=kind, factor_form="auto", max_columns=7, **same)
    assert not other.input_side.brand
    assert torch.equal(run(other, (8, 9)), run(KfacReference(kind="rs_kfac", **same), (8, 9)))
    assert KfacReference(kind=kind, max_columns=6, **same).input_side.brand


@pytest.mark.parametrize("kind", BRAND)
def test_linear_application_is_the_plain_one(kind: str) -> None:
    method = KfacReference(
        kind=kind, shape=(8, 9), rank=2, oversampling=1, factor_form="brand", application="linear"
    )
    for seed in range(5):
        given = columns((8, 9), seed)
        method.update(gradient(given), given)
        assert_near(method.apply(gradient(given), given), method.apply(gradient(given)), 1e-11)


def test_correction_brings_the_form_nearer_to_the_factor() -> None:
    options = {"shape": (12, 12), "rank": 5, "factor_form": "brand"}
    plain = KfacReference(kind="b_kfac", **options)
    corrected = KfacReference(kind="b_kfac_c", correction_interval=8, **options)
    for seed in range(9):
        given = columns((12, 12), seed)
        for method in (plain, corrected):
            method.update(gradient(given), given)
        errors = [_error(m.input_side, corrected.input_side.factor) for m in (plain, corrected)]
        if seed < 8:
            assert errors[0] == errors[1]
    assert errors[1] < (1 - 1e-4) * errors[0]


def _error(side: Any, factor: Tensor) -> float:
    dense = side.vectors @ torch.diag(side.values) @ side.vectors.T
    return float((dense - factor).norm())


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "kfac"])
def test_forms_are_orthonormal_and_below_the_factor(kind: str) -> None:
    shape = (7, 10)
    method = KfacReference(kind=kind, shape=shape, rank=3, oversampling=1, factor_form="brand")
    method.correction_interval = 100
    exact = KfacReference(kind="kfac", shape=shape)
    for seed in range(8):
        given = columns(shape, seed, samples=2)
        for m in (method, exact):
            m.update(gradient(given), given)
        side, factor = method.input_side, exact.input_side.factor
        dense = side.vectors @ torch.diag(side.values) @ side.vectors.T
        alive = side.vectors[:, side.values > 0]
        eye = torch.eye(alive.shape[1], dtype=torch.float64)
        assert (alive.T @ alive - eye).abs().max() < 1e-12
        assert (side.values.diff() <= 0).all()
        if kind in ("b_kfac", "b_kfac_c"):  # without an RSVD, and before any correction
            assert torch.linalg.eigvalsh(factor - dense)[0] > -1e-12 * factor.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positions", [1, 2])
def test_seng_is_the_damped_fisher(shape: tuple[int, int], positions: int) -> None:
    given = columns(shape, 0, positions=positions)
    method = SengReference(shape=shape, damping=0.7)
    method.update(gradient(given), given)
    g = torch.stack([x.flatten() for x in given.sample_gradients()])
    assert_near(g.mean(0).view(shape), gradient(given))
    fisher = g.T @ g / len(g) + 0.7 * torch.eye(g.shape[1], dtype=g.dtype)
    x = columns(shape, 1).sample_gradients()[0]
    assert_near(method.apply(x), torch.linalg.solve(fisher, x.flatten()).view(shape), 1e-11)


def test_seng_with_all_rows_drawn_is_exact() -> None:
    plain = run(SengReference(shape=(4, 9)), (4, 9))
    assert_near(run(SengReference(shape=(4, 9), sample_size=9), (4, 9)), plain)
    assert (run(SengReference(shape=(4, 9), sample_size=3), (4, 9)) - plain).norm() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sample_is_the_minibatch(shape: tuple[int, int]) -> None:
    minibatch = NgPlusReference(shape=shape, beta=0.0, gamma=1.0)
    one = NgPlusReference(shape=shape, curvature="per_sample")
    for seed in range(3):
        given = columns(shape, seed, samples=1, positions=4)
        for method in (minibatch, one):
            method.update(gradient(given), given)
        assert_near(one.apply(gradient(given)), minibatch.apply(gradient(given)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping_mode", ["absolute", "relative"])
def test_ng_plus_solvers_agree(shape: tuple[int, int], damping_mode: str) -> None:
    """The sketch of all rows, and of single positions the Sherman-Morrison-Woodbury formula."""
    same = {"shape": shape, "curvature": "per_sample", "damping_mode": damping_mode}
    exact = run(NgPlusReference(**same), shape)
    assert_near(run(NgPlusReference(solver="smw", **same), shape), exact)
    assert_near(run(NgPlusReference(solver="sketched", **same), shape), exact, 1e-11)
    some = NgPlusReference(solver="sketched", draw_rows=lambda _, m: torch.arange(m)[::2], **same)
    assert (run(some, shape) - exact).norm() > 1e-3 * exact.norm()
