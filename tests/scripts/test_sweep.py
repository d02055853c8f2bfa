"""scripts/sweep.py: which runs a file means, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CONFIG = {
    "base": {"max_steps": 3, "label_names": ["a", "b"]},
    "grid": {"seed": [0, 1], "learning_rate": [0.1, 0.2]},
    "variants": {
        "adamw_torch": {"optim": "adamw_torch"},
        "sgd": {"optim": "sgd", "learning_rate": [1.0]},
    },
}


def test_grid_is_crossed_and_a_variant_may_replace_it(sweep: ModuleType) -> None:
    runs = sweep.expand(CONFIG)
    seen = [(run.variant, run.options["seed"], run.options["learning_rate"]) for run in runs]
    assert seen == [
        ("adamw_torch", 0, 0.1),
        ("adamw_torch", 0, 0.2),
        ("adamw_torch", 1, 0.1),
        ("adamw_torch", 1, 0.2),
        ("sgd", 0, 1.0),
        ("sgd", 1, 1.0),
    ]
    assert all(run.options["label_names"] == ["a", "b"] for run in runs)


def test_overrides_win_over_everything(sweep: ModuleType) -> None:
    runs = sweep.expand(CONFIG, {"max_steps": 1, "seed": 7, "learning_rate": [0.5]})
    assert [(run.options["seed"], run.options["learning_rate"]) for run in runs] == [(7, 0.5)] * 2
    assert {run.options["max_steps"] for run in runs} == {1}


def test_keys_tell_runs_apart_and_ignore_the_notation(sweep: ModuleType) -> None:
    keys = [run.key for run in sweep.expand(CONFIG)]
    assert len(set(keys)) == len(keys)
    plain, notation = (
        sweep.expand(CONFIG, sweep.parse_overrides([f"learning_rate={text}"]))[0]
        for text in ("0.001", "1e-3")
    )
    assert plain.key == notation.key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: {}\ngird: {}\n", "unknown key 'gird' in the config file; did you mean grid?"),
        ("variants: [adamw_torch]\n", "variants in .* must be a mapping"),
        ("base: {max_steps: 1}\n", "must name at least one variant"),
        (
            "script: scripts/train_mlm.py\n",
            "'scripts/train_mlm.py' .* must be one of scripts/train",
        ),
        ("variants: {a: {}}\nrandom: {trials: 0}\n", "trials = 0 in .* whole number from 1 on"),
        ("variants: {a: {}}\nrandom: {trials: 2}\n", "log_uniform in .* must map options to"),
        (
            "variants: {a: {}}\nrandom: {trials: 2, log_uniform: {learning_rate: [1, 0.1]}}\n",
            "learning_rate: .* must be .low, high., 0 < low < high",
        ),
    ],
)
def test_malformed_sweep_files_are_refused(
    sweep: ModuleType, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        sweep.read_sweep(path)


SEARCH = {
    "base": {"max_steps": 3},
    "grid": {"seed": [0, 1]},
    "variants": {"adamw_torch": {}, "sgd": {"learning_rate": 1.0}},
    "random": {
        "trials": 200,
        "log_uniform": {"learning_rate": ["1e-4", 1e-2], "weight_decay": [1e-3, 1e-1]},
    },
}


def test_random_search_draws_log_uniformly_the_same_for_all(sweep: ModuleType) -> None:
    runs = sweep.expand(SEARCH)
    assert len(runs) == 2 * 2 * 200
    rates = [run.options["learning_rate"] for run in runs[:200]]
    assert 1e-4 <= min(rates) < 2e-4
    assert 5e-3 < max(rates) <= 1e-2
    # Half of the draws lie below the geometric mean.
    assert 80 < sum(rate < 1e-3 for rate in rates) < 120
    assert rates == [run.options["learning_rate"] for run in runs[200:400]]
    sgd = runs[400:]
    assert {run.options["learning_rate"] for run in sgd} == {1.0}
    assert [run.options["weight_decay"] for run in sgd] == [
        run.options["weight_decay"] for run in runs[:400]
    ]


def test_a_file_may_extend_another(sweep: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(json.dumps({**CONFIG, "script": "scripts/train_classifier.py"}))
    second.write_text(json.dumps({"extends": "first.yaml", "grid": {"seed": [5]}}))
    script, config = sweep.read_sweep(second)
    assert script == "scripts/train_classifier.py"
    assert config["base"] == CONFIG["base"]
    assert [run.options["seed"] for run in sweep.expand(config)] == [5, 5]


def test_options_of_base_are_added_to_those_of_the_extended_file(
    sweep: ModuleType, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(json.dumps({**CONFIG, "base": {"max_steps": 5, "weight_decay": 0.1}}))
    second.write_text(json.dumps({"extends": "first.yaml", "base": {"max_steps": 7}}))
    _, config = sweep.read_sweep(second)
    assert config["base"] == {"max_steps": 7, "weight_decay": 0.1}


def test_what_lacks_to_one_is_drawn_as_a_power(sweep: ModuleType) -> None:
    ranges = {"one_minus": {"adam_beta2": [1e-4, 1e-1]}}
    runs = sweep.expand({**SEARCH, "random": {"trials": 200, **ranges}})
    betas = [run.options["adam_beta2"] for run in runs[:200]]
    assert 0.9 <= min(betas) < 0.92
    assert 0.9998 < max(betas) <= 0.9999
    assert 75 < sum(beta > 1 - 10**-2.5 for beta in betas) < 125


def test_a_longer_search_continues_a_shorter_one(sweep: ModuleType) -> None:
    short = {**SEARCH, "random": {**SEARCH["random"], "trials": 3}}
    few, many = ({run.key for run in sweep.expand(config)} for config in (short, SEARCH))
    assert few < many


def test_overrides_win_over_draws(sweep: ModuleType) -> None:
    runs = sweep.expand(SEARCH, {"weight_decay": 0.0})
    assert {run.options["weight_decay"] for run in runs} == {0.0}


def test_a_line_that_a_killed_sweep_left_is_replaced(sweep: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    sweep.append_record(results, {"key": "first"})
    with results.open("a") as stream:
        stream.write('{"key": "seco')
    assert sweep.finished_keys(results) == {"first"}
    sweep.append_record(results, {"key": "third"})
    assert [json.loads(line)["key"] for line in results.read_text().splitlines()] == [
        "first",
        "third",
    ]


def test_a_broken_line_in_the_middle_is_an_error(
    sweep: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, config = tmp_path / "results.jsonl", tmp_path / "sweep.yaml"
    results.write_text('{"key": "fi\n{"key": "second"}\n')
    config.write_text(json.dumps(CONFIG))
    assert sweep.main([str(config), "--results", str(results)]) == 2
    assert "line 1 of" in capsys.readouterr().err


def test_jobs_share_the_cores(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert "OMP_NUM_THREADS" not in sweep.environment(1)
    assert sweep.environment(3)["OMP_NUM_THREADS"] == "2"
    assert sweep.environment(20)["OMP_NUM_THREADS"] == "1"
    with pytest.raises(SystemExit):
        sweep.parse_arguments(["sweep.yaml", "--jobs", "0"])


def test_unknown_variant_and_malformed_override_are_refused(sweep: ModuleType) -> None:
    with pytest.raises(ValueError, match="--only 'lion' must be one of adamw_torch, sgd"):
        sweep.select(sweep.expand(CONFIG), ["lion"])
    with pytest.raises(ValueError, match="--set 'max_steps' must be KEY=VALUE"):
        sweep.parse_overrides(["max_steps"])


def test_curve_keeps_the_last_value_of_a_step_and_marks_divergence(sweep: ModuleType) -> None:
    history = [
        {"step": 2, "eval_loss": float("nan")},
        {"step": 1, "eval_loss": 3.0},
        {"step": 1, "eval_loss": 2.5},
        {"step": 1, "loss": 9.0},
    ]
    assert sweep.curve(history, "eval_loss") == [[1, 2.5], [2, None]]


def _write_config(path: Path, text: Path, cache: Path) -> None:
    base: dict[str, Any] = {
        "config_overrides": "n_layer=1,n_embd=16,n_head=2,n_positions=32",
        "train_file": str(text),
        "tokenizer_cache_dir": str(cache),
        "vocab_size": 300,
        "block_size": 16,
        "per_device_train_batch_size": 2,
        "max_eval_samples": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "max_steps": 2,
        "save_strategy": "no",
        "save_final_model": False,
        "report_to": "none",
    }
    variants = {"adamw_torch": {"optim": "adamw_torch"}, "wrong": {"optim": "no_such_optimizer"}}
    path.write_text(json.dumps({"base": base, "grid": {"seed": [0]}, "variants": variants}))


def test_a_second_sweep_of_the_same_folder_is_refused(
    sweep: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, results = tmp_path / "sweep.yaml", tmp_path / "results.jsonl"
    _write_config(config, tmp_path / "text.txt", tmp_path / "tokenizers")
    argv = [str(config), "--results", str(results), "--work_dir", str(tmp_path / "work")]
    first = sweep.alone_in(tmp_path / "work" / "sweep")
    assert sweep.main(argv) == 2
    assert "another sweep works in" in capsys.readouterr().err
    assert sweep.main([*argv, "--dry_run"]) == 0
    first.release()
    sweep.alone_in(tmp_path / "work" / "sweep").release()


@pytest.mark.slow
def test_sweep_records_runs_reports_failures_and_resumes(
    sweep: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} says {n % 7}\n" for n in range(400)))
    config, results = tmp_path / "sweep.yaml", tmp_path / "results.jsonl"
    _write_config(config, text, tmp_path / "tokenizers")
    argv = [str(config), "--results", str(results), "--work_dir", str(tmp_path / "work"), "-j2"]
    assert sweep.main(argv) == 1
    assert "invalid choice: 'no_such_optimizer'" in capsys.readouterr().out
    (record,) = [json.loads(line) for line in results.read_text().splitlines()]
    assert record["variant"] == "adamw_torch"
    assert [step for step, _ in record["eval_loss"]] == [1, 2]
    assert [step for step, _ in record["train_loss"]] == [1, 2]
    assert record["metrics"]["eval_loss"] == record["eval_loss"][-1][1]
    assert [step for step, _ in record["train_elapsed_s"]] == [1, 2]
    assert record["metrics"]["train_optimizer_ms"] > 0
    assert record["jobs"] == 2
    assert record["seed"] == 0
    assert record["packages"].keys() >= {"python", "torch", "transformers"}
    assert record["hardware"]["cores"] >= 1
    assert record["wall_time_s"] > 0
    assert sweep.main([*argv, "--only", "adamw_torch"]) == 0
    assert "1 runs, 1 of them in" in capsys.readouterr().out
    assert len(results.read_text().splitlines()) == 1
