"""scripts/plot_results.py: which run counts as best, and the figures in the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trainer_ext.sweep_results import VariantResult, mean_accuracy, mean_metric


def _record(variant: str, rate: float, losses: list[float | None], seed: int = 0) -> dict[str, Any]:
    return {
        "variant": variant,
        "seed": seed,
        "options": {"learning_rate": rate},
        "eval_loss": [[100 * (n + 1), loss] for n, loss in enumerate(losses)],
        "metrics": {"train_runtime": 400.0},
    }


RECORDS = [
    _record("adamw_torch", 1e-3, [6.0, 5.0]),
    _record("adamw_torch", 2e-3, [6.0, 4.0]),
    _record("adamw_torch", 4e-3, [6.0, None]),
    _record("shared_basis_adam", 1e-3, [5.0, 3.0], seed=0),
    _record("shared_basis_adam", 1e-3, [5.0, 4.0], seed=1),
    _record("shared_basis_adam", 2e-3, [3.6, 3.6]),
]


@pytest.fixture
def results_file(tmp_path: Path) -> Path:
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_best_rate_is_chosen_by_the_mean_over_seeds(plot_results: ModuleType) -> None:
    adamw, shared = plot_results.summarise(RECORDS)
    assert (adamw.learning_rate, adamw.final_loss) == (2e-3, 4.0)
    assert (shared.learning_rate, shared.seeds, shared.final_loss) == (1e-3, 2, 3.5)
    assert shared.curve == [(100, 5.0), (200, 3.5)]


def test_table_counts_steps_to_the_loss_of_the_baseline(plot_results: ModuleType) -> None:
    table = plot_results.markdown_table(plot_results.summarise(RECORDS), baseline="adamw_torch")
    adamw, shared = table.splitlines()[2:]
    assert "| 200 (100%) |" in adamw
    # 5.0 at step 100 and 3.5 at 200 cross 4.0 at two thirds of the way.
    assert "| 167 (83%) |" in shared


def test_perplexity_is_that_of_language_models(plot_results: ModuleType) -> None:
    results = plot_results.summarise(RECORDS)
    assert "perplexity" not in plot_results.markdown_table(results, baseline="adamw_torch")
    texts = [{**run, "metrics": {"eval_perplexity": 54.6}} for run in RECORDS]
    table = plot_results.markdown_table(plot_results.summarise(texts), baseline="adamw_torch")
    header, _, adamw, _ = table.splitlines()
    assert "| perplexity |" in header
    assert "| 4.0000 | 54.6 |" in adamw


def test_costs_of_a_benchmark_become_columns(plot_results: ModuleType, tmp_path: Path) -> None:
    ratios = [("adamw_fused", 1.0, 1.0, 8), ("shared_basis_adam:rank=4", 3.0, 1.5, 10)]
    keys = ("name", "optimizer_ratio", "whole_step_ratio", "state_bytes")
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"rows": [dict(zip(keys, row, strict=True)) for row in ratios]}))
    table = plot_results.markdown_table(
        plot_results.summarise(RECORDS),
        baseline="adamw_torch",
        costs=plot_results.read_costs(bench, "adamw_torch"),
    )
    header, rule, adamw, shared = table.splitlines()
    assert header.count("|") == rule.count("|") == adamw.count("|") == shared.count("|")
    assert adamw.endswith("| 1.0 | 1.00 | 1.00 |")
    assert shared.endswith("| 3.0 | 1.50 | 1.25 |")


def _timed(variant: str, beta2: float, losses: list[float], seed: int = 0) -> dict[str, Any]:
    """A run of 10 ms a step, or 20 ms, with what it measured of itself."""
    record = _record(variant, 1e-3, [*losses], seed)
    step_ms = 10.0 if variant == "adamw_torch" else 20.0
    names = ("forward_ms", "backward_ms", "optimizer_ms")
    sizes = {"train_peak_memory_bytes": 2**21, "train_optimizer_state_bytes": 2**20}
    return {
        **record,
        "options": {**record["options"], "adam_beta2": beta2, "seed": seed, "block_size": 8}
        | {"per_device_train_batch_size": 2},
        "metrics": {f"train_{name}": step_ms / 4 for name in names}
        | sizes
        | {"train_step_ms": step_ms},
        "train_elapsed_s": [[100, 100 * step_ms / 1e3], [200, 200 * step_ms / 1e3]],
    }


TIMED = [
    _timed("adamw_torch", 0.9, [5.0, 4.5]),
    _timed("adamw_torch", 0.99, [5.0, 4.0], seed=0),
    _timed("adamw_torch", 0.99, [5.0, 4.2], seed=1),
    _timed("soap", 0.99, [4.1, 3.0]),
]


def test_best_setting_is_over_all_options_that_vary_but_the_seed(plot_results: ModuleType) -> None:
    adamw, soap = plot_results.summarise(TIMED)
    assert adamw.setting == (("learning_rate", 1e-3), ("adam_beta2", 0.99))
    assert soap.setting == (("learning_rate", 1e-3),)
    assert (adamw.seeds, adamw.final_loss) == (2, pytest.approx(4.1))
    assert adamw.spread == pytest.approx(0.2 / 2**0.5)
    table = plot_results.markdown_table([adamw, soap], baseline="adamw_torch")
    assert "| 0.001, adam_beta2=0.99 | 2 | 200 | 4.1000 ± 0.1414 |" in table
    settings = plot_results.settings_table([adamw, soap])
    assert "| adamw_torch | 0.001, adam_beta2=0.99 | **4.1000** |" in settings
    assert "| adamw_torch | 0.001, adam_beta2=0.9 | 4.5000 |" in settings


def test_times_are_the_runs_own(plot_results: ModuleType) -> None:
    results = plot_results.summarise(TIMED)
    table = plot_results.markdown_table(results, baseline="adamw_torch", times=True)
    header, rule, adamw, soap = table.splitlines()
    assert header.count("|") == rule.count("|") == adamw.count("|") == soap.count("|")
    # One of AdamW's seeds does not come to the mean of both.
    assert soap.endswith("| 5.0 | 5.0 | 5.0 | 2.00 | 2.0 | 1.0 | not reached |")
    results = plot_results.summarise([TIMED[1], TIMED[3]])
    table = plot_results.markdown_table(results, baseline="adamw_torch", times=True)
    # AdamW is at 4.0 after 200 steps of 10 ms; SOAP a little after 100 steps of 20 ms.
    assert table.splitlines()[2].endswith("| 1.00 | 2.0 | 1.0 | 2 (100%) |")
    assert table.splitlines()[3].endswith("| 2.00 | 2.0 | 1.0 | 2 (109%) |")


def test_times_of_runs_that_have_none_are_refused(
    plot_results: ModuleType, results_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot_results.main([str(results_file), "--times"]) == 2
    assert "--times: a run of variant 'adamw_torch' has no train_" in capsys.readouterr().err


def test_both_panels_are_drawn(plot_results: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "timed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in TIMED))
    assert plot_results.main([str(path), "--times"]) == 0
    wide = (tmp_path / "timed.png").read_bytes()
    assert plot_results.main([str(path)]) == 0
    narrow = (tmp_path / "timed.png").read_bytes()
    widths = [int.from_bytes(image[16:20], "big") for image in (wide, narrow)]
    assert widths[0] > 1.5 * widths[1]
    assert plot_results.tokens_per_step(plot_results.summarise(TIMED)) == 16


def test_loss_never_reached_is_said(plot_results: ModuleType) -> None:
    assert plot_results.steps_to_reach([(1, 5.0), (2, 4.5)], 4.0) is None


def test_diverged_rates_are_listed_as_such(plot_results: ModuleType) -> None:
    table = plot_results.learning_rate_table(plot_results.summarise(RECORDS))
    assert "| adamw_torch | 5.0000 | **4.0000** | diverged |" in table


def test_files_are_written_beside_the_results(
    plot_results: ModuleType, results_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot_results.main([str(results_file)]) == 0
    assert "shared_basis_adam" in results_file.with_suffix(".md").read_text()
    assert results_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], (), "holds no run"),
        ([_record("a", 0.1, [None])], (), "every learning rate diverged"),
        ([_record("a", 0.1, [1.0])], (), "--baseline 'adamw_torch' must be one of a"),
    ],
)
def test_unusable_results_are_refused(
    plot_results: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lines: list[dict[str, Any]],
    options: tuple[str, ...],
    message: str,
) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert plot_results.main([str(path), *options]) == 2
    assert message in capsys.readouterr().err


def test_classifiers_show_their_accuracy_and_language_models_their_perplexity(
    plot_results: ModuleType,
) -> None:
    runs = [{"metrics": {"eval_accuracy": 0.5}}, {"metrics": {"eval_accuracy": 0.7}}]
    assert mean_accuracy(runs) == pytest.approx(0.6)
    texts = [{"metrics": {"eval_accuracy": 0.2, "eval_perplexity": 90.0}}]
    assert mean_accuracy(texts) is None
    assert mean_accuracy([{"metrics": {}}]) is None


def test_translators_show_their_bleu(plot_results: ModuleType) -> None:
    runs = [
        {"options": {"learning_rate": 0.1}, "metrics": {"eval_bleu": bleu}, "variant": "a"}
        for bleu in (20.0, 21.0)
    ]
    result = VariantResult(
        name="a",
        setting=(("learning_rate", 0.1),),
        curve=[(10, 2.0)],
        tried={},
        runs=runs,
        bleu=mean_metric(runs, "eval_bleu"),
    )
    table = plot_results.markdown_table([result], baseline="a")
    assert "| BLEU |" in table.splitlines()[0]
    assert "| 20.5 |" in table.splitlines()[2]
