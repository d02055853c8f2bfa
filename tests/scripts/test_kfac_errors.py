"""scripts/kfac_errors.py: the metrics, who rests when, and a run on a tiny scale."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond.preconditioners.base import Columns, StepContext
from tests.driving import random_matrices, random_rotation
from tests.scripts.conftest import load_script
from trainer_ext import kfac_observers as observers
from trainer_ext.provenance import shown_options

TINY_DATA = ("--image_size", "4", "--max_train_samples", "40", "--batch_size", "10")
TINY = (
    *("--preset", "mlp", "--config_overrides", "hidden_sizes=[24]", *TINY_DATA),
    *("--update_interval", "1", "--common", "rank=3,oversampling=2,power_iterations=6"),
    *("--optim", "adadiag", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/kfac_errors.py"""
    return load_script("kfac_errors")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_ext.data.image_sources.SHAPES_COUNTS", (60, 20))


def run(script: ModuleType, tmp_path: Path, *options: str) -> dict[str, Any]:
    """The JSON file of a tiny run."""
    assert script.main([*TINY, *options, "--output", str(tmp_path / "out" / "errors")]) == 0
    return json.loads((tmp_path / "out" / "errors.json").read_text())


def row_of(result: dict[str, Any], label: str, window: int = 0) -> dict[str, Any]:
    return next(r for r in result["rows"] if (r["variant"], r["window"]) == (label, window))


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_of_known_matrices(script: ModuleType) -> None:
    exact = random_matrices(2, 4, 6)
    assert observers.relative_error(1.5 * exact, exact) == pytest.approx(0.5)
    assert observers.angle_error(1.5 * exact, exact) == pytest.approx(0.0, abs=1e-15)
    assert observers.angle_error(-exact, exact) == pytest.approx(2.0)
    a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    assert observers.angle_error(a, b) == pytest.approx(1 - math.sqrt(0.5))


def test_small_angles_do_not_cancel(script: ModuleType) -> None:
    turn = 1e-6
    a = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    b = torch.tensor([[[math.cos(turn), math.sin(turn)]]], dtype=torch.float64)
    assert observers.angle_error(a, b) == pytest.approx(turn**2 / 2, rel=1e-6)


def test_inverse_is_that_of_the_damped_factor(script: ModuleType) -> None:
    algorithm = observers.to_algorithm("kfac:damping=0.1,continuation=false", "", {})
    state = algorithm.init((1, 4, 6), dtype=torch.float64, device=torch.device("cpu"))
    watcher = observers.Watcher(algorithm=algorithm, state=state, device=torch.device("cpu"))
    inputs, outputs = random_matrices(1, 9, 1, 6), random_matrices(1, 9, 1, 4, seed=1)
    ctx = StepContext(step=1, phases=[0.0], columns=Columns(inputs=inputs, outputs=outputs))
    watcher.update(random_matrices(1, 4, 6), ctx)
    for side, columns in (("input", inputs), ("output", outputs)):
        expected = damped_inverse(columns[0, :, 0], 0.1)
        torch.testing.assert_close(watcher.inverse(side, ctx)[0], expected)


def damped_inverse(columns: Tensor, share: float) -> Tensor:
    """(C^T C + share * its largest eigenvalue)^-1."""
    gram = columns.T @ columns
    damping = share * torch.linalg.eigvalsh(gram)[-1]
    return torch.linalg.inv(gram + damping * torch.eye(len(gram), dtype=gram.dtype))


def test_means_of_parts(script: ModuleType) -> None:
    assert script.means_of([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]
    assert script.means_of([1.0, 2.0, 6.0, 8.0], 2) == [1.5, 7.0]


# --- who looks on ---------------------------------------------------------------------------------


def arguments(script: ModuleType, *options: str) -> Any:
    return script.parse_arguments([*TINY, *options])


def test_the_default_variants_are_table_1_in_proportion(script: ModuleType) -> None:
    args = arguments(script, "--update_interval", "10")
    assert args.window_steps == 300
    observer = script.new_observer(args)
    intervals = [
        (type(each).__name__, each.update_interval, each.inverse_interval)
        for each in observer.algorithms.values()
    ]
    assert intervals == [
        ("KFac", 10, 10),
        ("KFac", 10, 50),
        ("RandomizedKFac", 10, 50),
        ("RandomizedKFac", 10, 10),
        ("RandomizedKFac", 10, 300),
        ("BrandKFac", 10, 50),
        ("BrandCKFac", 10, 50),
        ("BrandRKFac", 10, 50),
    ]
    brand, corrected, overwritten = list(observer.algorithms.values())[-3:]
    assert {brand.brand_interval, corrected.brand_interval, overwritten.brand_interval} == {10}
    assert (corrected.correction_interval, overwritten.rsvd_interval) == (50, 50)
    assert observer.alignment() == 300


def test_common_options_go_where_they_fit(script: ModuleType) -> None:
    args = arguments(script, "--variants", "kfac", "rs_kfac:rank=2", "--common", "rank=5,damping=1")
    reference, exact, randomized = script.new_observer(args).algorithms.values()
    assert reference.damping.initial == exact.damping.initial == randomized.damping.initial == 1
    assert randomized.rank.initial == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "shampoo"], "shampoo is none of the K-FAC family"),
        (["--variants", "kfac:max_columns=3"], "all see the same columns"),
        (["--variants", "kfac:rank=3"], "unknown option 'rank'"),
        (["--layers", "layers.7"], "must be all or one of layers.0, classifier"),
        (["--start_steps", "1", "20", "--window_steps", "60"], "windows of 60 steps overlap"),
        (["--batch_size", "41"], "--batch_size 41 is more than the 40 images"),
    ],
)
def test_bad_options_are_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert script.main([*TINY, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--update_interval", "0"),
        ("--update_interval", "4", "--step_interval", "3"),
        ("--update_interval", "4", "--window_steps", "6"),
        ("--windows", "1", "--start_steps", "1"),
    ],
)
def test_counts_that_measure_nothing_are_refused(
    script: ModuleType, options: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit):
        script.parse_arguments([*TINY, *options])


def test_windows_begin_where_all_is_due(script: ModuleType) -> None:
    args = arguments(script, "--windows", "15", "30", "--window_steps", "4")
    observer = script.new_observer(args)
    starts = [(each.start, each.stop) for each in script.to_windows(args, observer, 7)]
    assert starts == [(121, 125), (211, 215)]  # steps 106 and 211, moved to 1 + 30 k
    args = arguments(script, "--start_steps", "31", "1", "--window_steps", "4")
    assert [each.start for each in script.to_windows(args, observer, 7)] == [1, 31]


# --- a run ----------------------------------------------------------------------------------------


def test_writes_curves_averages_and_times(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(script, tmp_path, "--start_steps", "31", "--seeds", "0", "1")
    labels = [row["variant"] for row in result["rows"]]
    assert labels == [observers.REFERENCE, *script.table_1(1)]
    (window,) = result["windows"]
    assert (window["start_step"], window["steps"], window["epoch"]) == (31, 30, 7.5)
    assert result["layers"] == {"layers.0": [1, 24, 49]}
    for row in result["rows"]:
        assert set(row["curves"]) == set(script.METRICS)
        for metric, values in row["curves"].items():
            assert len(values) == 30
            assert all(map(math.isfinite, values))
            assert row["averages"][metric] == pytest.approx(sum(values) / 30)
        assert min(row["times_ms"].values()) > 0
    assert set(row_of(result, observers.REFERENCE)["averages"].values()) == {0.0}
    exact = row_of(result, "kfac:inverse_interval=5")["curves"]
    assert all(
        (value == 0) == (i % 5 == 0) for each in exact.values() for i, value in enumerate(each)
    )
    assert {"torch", "python"} <= result["packages"].keys()
    printed = capsys.readouterr().out
    assert "| rs_kfac:inverse_interval=5 |" in printed
    assert (tmp_path / "out" / "errors.png").stat().st_size > 1000
    assert (tmp_path / "out" / "errors.md").read_text() in printed


def test_the_more_often_refreshed_are_nearer(script: ModuleType, tmp_path: Path) -> None:
    variants = [f"kfac:inverse_interval={interval}" for interval in (1, 2, 10)]
    options = ["--variants", *variants, "--start_steps", "11", "--window_steps", "20"]
    result = run(script, tmp_path, *options)
    for metric in script.METRICS:
        always, sometimes, seldom = (
            row_of(result, label)["averages"][metric] for label in variants
        )
        assert always == 0 < sometimes < seldom


def test_resting_outside_the_windows_changes_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--start_steps", "16", "46", "--window_steps", "10"]
    options += ["--variants", "kfac:inverse_interval=5", "rs_kfac:inverse_interval=15"]
    rested = run(script, tmp_path, *options)
    monkeypatch.setattr(observers, "rests", lambda algorithm: False)
    kept_up = run(script, tmp_path, *options)
    for ours, theirs in zip(rested["rows"], kept_up["rows"], strict=True):
        for metric in script.METRICS:
            assert ours["curves"][metric] == pytest.approx(
                theirs["curves"][metric], rel=1e-3, abs=1e-6
            )


def test_steps_between_measured_ones_are_averaged(script: ModuleType, tmp_path: Path) -> None:
    options = ["--variants", "kfac:inverse_interval=8", "--update_interval", "4"]
    options += ["--start_steps", "9", "--window_steps", "16"]
    every = row_of(run(script, tmp_path, *options), "kfac:inverse_interval=8")["curves"]
    options += ["--step_interval", "2"]
    second = row_of(run(script, tmp_path, *options), "kfac:inverse_interval=8")["curves"]
    assert len(every["step"]) == len(second["step"]) == 4
    assert every["input"] == second["input"]
    assert every["step"][1] != second["step"][1]


@pytest.mark.slow
def test_all_layers_convolutions_too(script: ModuleType, tmp_path: Path) -> None:
    options = ["--preset", "wide-cnn", "--config_overrides"]
    options += ["conv_channels=[4],num_pools=1,hidden_sizes=[12]", "--layers", "all"]
    options += ["--max_columns", "8", "--variants", "rs_kfac:inverse_interval=2"]
    result = run(script, tmp_path, *options, "--start_steps", "3", "--window_steps", "2")
    assert result["layers"] == {
        "convolutions.0": [1, 4, 28],
        "layers.0": [1, 12, 17],
        "classifier": [1, 10, 13],
    }
    assert len(result["rows"]) == 6


def test_no_path_of_this_machine_is_written(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    args = arguments(script, "--data_dir", str(folder), "--output", str(tmp_path / "x"))
    assert script.data_name(args) == "images"
    shown = " ".join(shown_options(args))
    assert "--data_dir images" in shown
    assert str(tmp_path) not in shown


def test_a_form_that_leaves_nothing_out_has_no_error(script: ModuleType) -> None:
    args = arguments(script, "--variants", "rs_kfac:rank=64,inverse_interval=1")
    observer = script.new_observer(args)
    layer = toy_layer(script, observer)
    for step in range(1, 6):
        ctx = StepContext(step=step, phases=[0.0], columns=toy_columns(step))
        found = layer.measure(random_matrices(1, 5, 7).float(), ctx, inverses=True, directions=True)
    (label,) = args.variants
    assert found[observers.REFERENCE] == dict.fromkeys(script.METRICS, 0.0)
    assert max(found[label].values()) < 1e-4


def toy_columns(step: int) -> Columns:
    return Columns(
        inputs=random_matrices(1, 9, 1, 7, seed=step).float(),
        outputs=random_matrices(1, 9, 1, 5, seed=100 + step).float(),
    )


def toy_layer(script: ModuleType, observer: Any) -> Any:
    class View:
        shape = (1, 5, 7)

    class ToySlot:
        view = View()

    return observers.ObservedLayer("toy", ToySlot(), observer, torch.device("cpu"))


def test_errors_do_not_depend_on_the_basis_of_the_layer(script: ModuleType) -> None:
    turn = random_rotation(7).float()
    observer = script.new_observer(arguments(script, "--variants", "kfac:inverse_interval=3"))
    gradient = random_matrices(1, 5, 7).float()
    found = []
    for rotation in (torch.eye(7), turn):
        layer = toy_layer(script, observer)
        for step in (1, 2):
            columns = toy_columns(step)
            columns = Columns(inputs=columns.inputs @ rotation, outputs=columns.outputs)
            ctx = StepContext(step=step, phases=[0.0], columns=columns)
            errors = layer.measure(gradient @ rotation, ctx, inverses=True, directions=True)
        found.append(errors["kfac:inverse_interval=3"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0]["step"] > 0.01
