"""scripts/bench_kfac_width.py: exponents, the budget, the parts, and a run on a tiny scale."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.scripts.conftest import load_script
from trainer_ext.timing import estimate

CPU = torch.device("cpu")
TINY = ("--columns", "4", "--rank", "3", "--oversampling", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/bench_kfac_width.py"""
    return load_script("bench_kfac_width")


def cell(script: ModuleType, width: int = 16, **fields: Any) -> Any:
    return script.StepCell(**{"method": "kfac", "width": width, "estimate_s": None, **fields})


def arguments(script: ModuleType, *options: str) -> Any:
    return script.parse_arguments([*TINY, *options])


def test_exponents_are_slopes_of_the_upper_half(script: ModuleType) -> None:
    widths = [16, 32, 64, 128]
    assert script.exponent(widths, [5.0, 5.0, 2.0, 16.0]) == pytest.approx(3.0)
    assert script.exponent([16, 32, 64], [9.0, 1.0, 4.0]) == pytest.approx(2.0)
    assert script.exponent([16, 32], [1.0, 2.0]) == pytest.approx(1.0)
    assert script.exponent([16], [1.0]) is None
    assert script.exponent([16, 32], [0.0, 0.0]) is None


def test_a_cell_stays_within_its_budget(script: ModuleType) -> None:
    assert cell(script).has_time(10.0)
    assert not cell(script, estimate_s=11.0).has_time(10.0)
    assert cell(script, estimate_s=99.0, times_s={"total": [4.0]}).has_time(10.0)
    assert not cell(script, times_s={"total": [4.0, 4.0]}).has_time(10.0)
    last = cell(script, times_s={"total": [1.0, 3.0, 2.0]})
    assert estimate(last, 32) == pytest.approx(20.0)
    assert estimate(None, 32) is None


def test_methods_are_the_algorithms_they_are_called(script: ModuleType) -> None:
    args = arguments(script, "--widths", "16")
    found = {method: script.algorithm_of(method, args) for method in script.METHODS}
    assert [type(each).__name__ for each in found.values()] == [
        "KFac",
        "RandomizedKFac",
        "RandomizedKFac",
        "BrandKFac",
        "BrandKFac",
    ]
    assert (found["rs_kfac"].decomposition, found["sre_kfac"].decomposition) == ("rsvd", "srevd")
    assert (found["b_kfac"].application, found[script.LINEAR].application) == ("plain", "linear")
    assert "input_factor" not in found["b_kfac"].init((1, 16, 16), dtype=torch.float32, device=CPU)


def test_everything_is_due_in_a_step_and_then_the_factors_alone(script: ModuleType) -> None:
    args = arguments(script, "--widths", "16")
    layer = script.Layer("rs_kfac", 16, args, CPU)
    inputs = script.Inputs.draw(16, 4, 0, CPU)
    torch.testing.assert_close(
        inputs.gradient, inputs.columns.outputs[:, :, 0].mT @ inputs.columns.inputs[:, :, 0]
    )
    times = layer.step(inputs)
    assert float(layer.state["input_updates"]) == 2
    form = layer.state["input_vectors"].clone()
    other = script.Inputs.draw(16, 4, 1, CPU)
    layer.step(other)
    assert not torch.equal(form, layer.state["input_vectors"])
    assert times["total"] >= times["refresh"] + times["application"]
    assert set(times) == set(script.parts_of("rs_kfac"))


def test_the_linear_application_is_its_columns_and_their_product(script: ModuleType) -> None:
    layer = script.Layer(script.LINEAR, 16, arguments(script, "--widths", "16"), CPU)
    inputs = script.Inputs.draw(16, 4, 0, CPU)
    times = layer.step(inputs)
    assert times["without_product"] == pytest.approx(times["refresh"] + times["columns"], rel=1e-6)
    assert times["statistics"] == 0.0
    ctx = script.StepContext(step=1, phases=[0.0], columns=inputs.columns)
    right, left = layer._columns(inputs, ctx)
    torch.testing.assert_close(
        left @ right.mT, layer.algorithm.apply(layer.state, inputs.gradient, ctx)
    )


def test_writes_tables_and_a_plot(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deeper" / "width"
    options = ["--widths", "32", "16", "--rounds", "2", "--seed", "3", "--output", str(output)]
    assert script.main([*TINY, *options]) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    assert [(row["method"], row["width"]) for row in result["rows"]] == [
        (method, width) for width in (16, 32) for method in script.METHODS
    ]
    for row in result["rows"]:
        assert all(len(times) == 2 for times in row["rounds_ms"].values())
        assert row["median_ms"]["total"] > 0
        assert set(row["median_ms"]) == set(script.parts_of(row["method"]))
    assert set(result["exponents"]) == set(script.METHODS)
    assert "--widths 32 16" in result["command"]
    assert str(tmp_path) not in output.with_suffix(".json").read_text()
    printed = capsys.readouterr().out
    assert output.with_suffix(".md").read_text() in printed
    assert "| B-KFAC, linear application | total without that product |" in printed
    assert "| B-KFAC, plain application | factor updates |" not in printed
    assert output.with_suffix(".png").stat().st_size > 1000


def test_slow_cells_are_left_out_and_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that each update of K-FAC moves by its width in seconds."""
    clock = [0.0]
    monkeypatch.setattr(script, "now", lambda device: clock[0])
    step = script.Layer.step

    def slow(layer: Any, inputs: Any) -> dict[str, float]:
        times = step(layer, inputs)
        is_slow = layer.algorithm.__class__.__name__ == "KFac"
        return times | {"total": float(layer.state["input_vectors"].shape[-1] if is_slow else 1)}

    monkeypatch.setattr(script.Layer, "step", slow)
    options = ("--widths", "16", "32", "64", "--max_seconds", "200", "--rounds", "3")
    args = arguments(script, *options, "--methods", "kfac", "b_kfac")
    cells = script.time_widths(args, CPU)
    times = {(each.method, each.width): each.times_s.get("total", []) for each in cells}
    assert times["kfac", 16] == [16.0] * 3
    assert times["kfac", 32] == [32.0] * 3
    assert times["kfac", 64] == []
    assert all(times["b_kfac", width] == [1.0] * 3 for width in (16, 32, 64))
    result = script.report([each.as_row() for each in cells], args, CPU)
    lines = script.format_report(result).splitlines()
    assert lines[-1] == "Left out, a step estimated above 200 s: K-FAC (exact EVD) at 64 (320 s)"


@pytest.mark.parametrize(
    "options",
    [("--rounds", "0"), ("--columns", "0"), ("--widths", "16", "7")],
)
def test_options_that_measure_something_else_are_refused(
    script: ModuleType, options: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit):
        arguments(script, *options)
