"""scripts/bench_decompositions.py: the budget, the tables, and both parts on a tiny scale."""

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
TINY_MODEL = (
    *("--config_overrides", "n_embd=16,n_layer=1,n_head=2,vocab_size=32,n_positions=16"),
    *("--batch_size", "1", "--block_size", "8"),
)
TINY_STEPS = (*TINY_MODEL, "--interval", "2", "--intervals", "2")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/bench_decompositions.py"""
    return load_script("bench_decompositions")


def cell(script: ModuleType, width: int = 8, **fields: Any) -> Any:
    return script.CallCell(**{"method": "svd", "width": width, "estimate_s": None, **fields})


# --- decompositions -------------------------------------------------------------------------------


def test_inputs_do_not_depend_on_the_device(script: ModuleType) -> None:
    inputs, again = (script.Inputs.draw(6, 3, CPU) for _ in range(2))
    assert torch.equal(inputs.gradient, again.gradient)
    assert not torch.equal(inputs.gradient, script.Inputs.draw(6, 4, CPU).gradient)
    assert {x.dtype for x in (inputs.gradient, inputs.factor, inputs.basis)} == {torch.float32}
    torch.testing.assert_close(inputs.basis.mT @ inputs.basis, torch.eye(6).unsqueeze(0))
    torch.testing.assert_close(torch.trace(inputs.factor[0]), torch.tensor(1.0))


def test_methods_compute_what_they_are_called(script: ModuleType) -> None:
    inputs = script.Inputs.draw(6, 0, CPU)
    eye = torch.eye(6).unsqueeze(0)
    left, values, right = script.METHODS["svd"](inputs)
    torch.testing.assert_close((left * values) @ right.mT, inputs.gradient)
    inverse = script.METHODS["cholesky"](inputs)
    torch.testing.assert_close(inverse @ inputs.damped, eye, rtol=0.0, atol=1e-3)
    roots = [script.METHODS[f"root_{method}"](inputs) for method in ("eigh", "newton")]
    torch.testing.assert_close(*roots, rtol=1e-3, atol=1e-3)
    damped = inputs.factor + inputs.ridge * eye
    power = torch.linalg.matrix_power(roots[0], 4)
    torch.testing.assert_close(power @ damped, eye, rtol=0.0, atol=1e-2)


def test_times_grow_tenfold_per_doubling(script: ModuleType) -> None:
    last = cell(script, 256, calls_s=[1.0, 3.0, 2.0])
    assert estimate(last, 512) == pytest.approx(20.0)
    assert estimate(last, 1024) == pytest.approx(200.0)
    assert estimate(None, 1024) is None


@pytest.mark.parametrize(
    ("estimate_s", "calls_s", "expected"),
    [
        (None, [], True),
        (9.0, [], True),
        (11.0, [], False),
        (99.0, [4.0], True),
        (1.0, [4.0, 4.0], False),
    ],
)
def test_a_cell_stays_within_its_budget(
    script: ModuleType, estimate_s: float | None, calls_s: list[float], expected: bool
) -> None:
    found = cell(script, estimate_s=estimate_s, calls_s=calls_s)
    assert found.has_time(10.0) is expected


def test_the_table_says_what_was_left_out(script: ModuleType) -> None:
    rows = [
        cell(script, 8, calls_s=[0.001, 0.003, 0.002]).as_row(),
        cell(script, 16, calls_s=[0.5], estimate_s=0.02).as_row(),
        cell(script, 32, estimate_s=12.0).as_row(),
    ]
    lines = script.format_widths(rows, 10.0).splitlines()
    assert lines[0] == "Milliseconds in float32, medians of 3 calls (of fewer in brackets)"
    assert lines[2] == "| method | 8 | 16 | 32 |"
    assert lines[4] == "| SVD | 2.0 | 500.0 (1) | left out |"
    assert lines[-1] == "Left out, estimated above 10 s: svd at 32 (12 s)"


def test_slow_cells_are_left_out_and_fast_ones_are_not(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of seconds that each call of the SVD moves by its width."""
    clock = [0.0]
    methods = {
        "svd": lambda x: clock.__setitem__(0, clock[0] + x.gradient.shape[-1]),
        "qr": lambda x: clock.__setitem__(0, clock[0] + 1e-6),
    }
    monkeypatch.setattr(script, "METHODS", methods)
    monkeypatch.setattr(script, "now", lambda device: clock[0])
    args = script.parse_arguments(
        ["--widths", "16", "8", "4", "--methods", *methods, "--max_seconds", "50"]
    )
    found = {(c.method, c.width): c for c in script.time_widths(args, CPU)}
    assert list(found)[::2] == [("svd", 4), ("svd", 8), ("svd", 16)]
    assert found["svd", 4].calls_s == [4.0] * 5
    assert found["svd", 8].calls_s == [8.0] * 5
    assert found["svd", 16].calls_s == []
    assert found["svd", 16].estimate_s == pytest.approx(80.0)
    assert all(len(found["qr", width].calls_s) == 5 for width in (4, 8, 16))


def test_writes_a_table_of_all_methods(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deeper" / "bench.json"
    arguments = ["--widths", "8", "16", "--repetitions", "2", "--seed", "3", "--device", "cpu"]
    assert script.main([*arguments, "--output", str(output)]) == 0
    part = json.loads(output.read_text())["decompositions"]
    assert [(row["method"], row["width"]) for row in part["rows"]] == [
        (method, width) for width in (8, 16) for method in script.METHODS
    ]
    assert all(len(row["calls_ms"]) == 2 and row["median_ms"] > 0 for row in part["rows"])
    assert (part["seed"], part["device"]) == (3, "cpu")
    assert {"torch", "python"} <= part["packages"].keys()
    assert "cores" in part["hardware"]
    assert "--widths 8 16" in part["command"]
    printed = capsys.readouterr().out
    assert all(f"| {words} |" in printed for words in script.WORDS.values())


# --- whole steps ----------------------------------------------------------------------------------


def test_spread(script: ModuleType) -> None:
    assert script.spread([0.001, 0.002, 0.008]) == pytest.approx(
        {"median_ms": 2.0, "max_ms": 8.0, "max_over_median": 4.0}
    )


def test_the_warm_up_covers_an_interval_and_a_late_start(script: ModuleType) -> None:
    args = script.parse_arguments(["--step_times", "adadiag", "shampoo", *TINY_STEPS])
    contenders = [
        script.build_contender(label, args, CPU, stagger=True) for label in args.step_times
    ]
    assert [contender.interval for contender in contenders] == [2, 2]
    start = contenders[1].optimizer.recipe.stages.start_step
    assert script.step_counts(contenders, 3) == (max(4, start), 6)
    assert script.step_counts(contenders[:1], 3) == (4, 6)


def test_own_options_come_before_the_common_interval(script: ModuleType) -> None:
    args = script.parse_arguments(["--step_times", "adadiag", *TINY_STEPS])
    label = "adadiag:projection_interval=5,basis_method=qr"
    contender = script.build_contender(label, args, CPU, stagger=False)
    assert contender.interval == 5
    algorithm = contender.optimizer.recipe.algorithm
    assert (algorithm.projection_interval, algorithm.basis_method) == (5, "qr")
    assert algorithm.stagger is False


def test_optimizers_that_cannot_stagger_are_refused(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="muon has no option 'stagger'"):
        script.main(["--step_times", "muon", *TINY_STEPS])


@pytest.mark.parametrize("option", ["--repetitions", "--interval", "--intervals"])
def test_counts_that_measure_nothing_are_refused(script: ModuleType, option: str) -> None:
    with pytest.raises(SystemExit):
        script.parse_arguments([option, "0"])


def test_writes_step_times_beside_the_decompositions(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bench.json"
    output.write_text(json.dumps({"decompositions": {"rows": []}}))
    arguments = ["--step_times", "adadiag", "shampoo", *TINY_STEPS, "--device", "cpu"]
    assert script.main([*arguments, "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert content["decompositions"] == {"rows": []}
    part = content["step_times"]
    assert [(row["name"], row["stagger"]) for row in part["rows"]] == [
        (name, stagger) for name in ("adadiag", "shampoo") for stagger in (True, False)
    ]
    for row in part["rows"]:
        assert len(row["whole_step_ms"]) == len(row["optimizer_step_ms"]) == 4
        whole, own = row["whole_step"], row["optimizer_step"]
        assert whole["max_ms"] >= whole["median_ms"] >= own["median_ms"] > 0
        assert whole["max_over_median"] == pytest.approx(whole["max_ms"] / whole["median_ms"])
    assert "--step_times adadiag shampoo" in part["command"]
    assert "| adadiag | 2 | yes |" in capsys.readouterr().out
