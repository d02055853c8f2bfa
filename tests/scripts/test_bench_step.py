"""scripts/bench_step.py: the floor, the ratios, and runs on a tiny scale."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from hf_precond import create_optimizer

OURS = "shared_basis_adagrad:update_interval=2,rank=4"
SIZES = "--batch_size 1 --block_size 8 --rounds 2 --cycle 2 --config_overrides n_embd=32,n_head=2"
TINY = [*SIZES.split(), "--preset", "gpt2-7m", "--layers", "1"]
RATES = {"flops": 1e9, "bytes": 1e6}


def contender(bench: ModuleType, optimizer: torch.optim.Optimizer) -> Any:
    model = nn.Linear(1, 1)
    return bench.Contender(name="some", model=model, optimizer=optimizer)


def stepped(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """An optimizer after two steps: bases are there, and what comes later is the rule."""
    optimizer = create_optimizer(model, name, **options)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    for _ in range(2):
        optimizer.step()
    return optimizer


def test_floor_of_adamw_is_seven_passes(bench: ModuleType) -> None:
    model = nn.Linear(64, 32, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    floor = bench.floor(contender(bench, optimizer), 3, RATES)
    # The gradient is read, weight and both moments are read and written; so is the step counter.
    assert floor.bytes == 7 * 4 * 64 * 32 + 2 * 4
    assert floor.flops == 0
    assert floor.ms == pytest.approx(floor.bytes / 1e6 * 1e3)


def test_floor_counts_the_products_of_the_two_sided_basis(bench: ModuleType) -> None:
    model = nn.Linear(64, 48, bias=False)
    optimizer = stepped("two_sided_basis", model, rank=4, update_rms=None)
    floor = bench.floor(contender(bench, optimizer), 2, RATES)
    m, n, k = 48, 64, 4
    sides = 4 * m * n * k + sum(4 * s * k**2 - 4 / 3 * k**3 for s in (m, n))
    core_in, split = 2 * n * k * k, 4 * m * n * k + 4 * m * n * k
    parts = core_in + 2 * m * k * k + 2 * n * k * k
    apply = parts + split + 2 * n * k * k + 4 * m * n * k
    assert floor.flops == pytest.approx(sides + parts + split + apply, rel=0.02)


def test_state_that_rests_is_only_read(bench: ModuleType) -> None:
    model = nn.Linear(64, 48, bias=False)
    busy, idle = (
        bench.floor(
            contender(bench, stepped("soap", model, basis_interval=interval)), 2, RATES
        ).bytes
        for interval in (1, 100)
    )
    # Both bases, written at every step in one of them.
    assert busy - idle == pytest.approx(4 * (64**2 + 48**2), rel=0.01)


def run(bench: ModuleType, folder: Path, *options: str) -> dict[str, Any]:
    output = folder / "bench.json"
    assert bench.main([*TINY, *options, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_writes_medians_and_ratios(bench: ModuleType, tmp_path: Path) -> None:
    result = run(bench, tmp_path, "--optims", "soap", OURS, "kfac")
    adamw, soap, ours, kfac = result["rows"]
    assert adamw["optimizer_ratio"] == 1.0
    assert ours["optimizer_ratio"] == pytest.approx(ours["optimizer_ms"] / adamw["optimizer_ms"])
    low, high = ours["optimizer_quartiles_ms"]
    assert low <= ours["optimizer_ms"] <= high
    assert all(row["floor"]["flops"] > 0 for row in (soap, ours, kfac))
    assert all(row["floor"]["ms"] > 0 for row in result["rows"])
    assert soap["state_bytes"] > adamw["state_bytes"] > 0
    # K-FAC looks into the layers: its passes are its own.
    assert adamw["forward_backward_ratio"] == ours["forward_backward_ratio"] == 1.0
    assert kfac["forward_backward_ratio"] != 1.0
    assert result["tokens_per_step"] == 8
    assert f"--optims soap {OURS}" in result["command"]
    table = (tmp_path / "bench.md").read_text()
    assert f"| {OURS} |" in table
    assert "whole step" in table
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_steps_alone_leave_the_gradients(bench: ModuleType, tmp_path: Path) -> None:
    result = run(bench, tmp_path, "--step_only", "--optims", "muon", "--others", "torch_muon")
    adamw, ours, theirs = result["rows"]
    assert result["forward_backward_ms"] is None
    assert "whole_step_ratio" not in ours
    # One momentum for each matrix instead of two moments, in both packages.
    assert ours["state_bytes"] == theirs["state_bytes"] < adamw["state_bytes"]
    assert "whole step" not in (tmp_path / "bench.md").read_text()


@pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None, reason="needs pytorch_optimizer"
)
def test_other_packages_run_and_their_lists_of_state_count(
    bench: ModuleType, tmp_path: Path
) -> None:
    names = ("pytorch_optimizer_soap", "pytorch_optimizer_shampoo")
    result = run(bench, tmp_path, "--step_only", "--optims", "--others", *names)
    adamw, soap, shampoo = result["rows"]
    assert [soap["name"], shampoo["name"]] == list(names)
    assert soap["state_bytes"] > adamw["state_bytes"]


def test_missing_packages_are_named(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(bench, tmp_path, "--step_only", "--optims", "--others", "heavyball_soap")
    assert result["left_out"] == {"heavyball_soap": "heavyball is not installed"}
    assert "left out: heavyball_soap, heavyball is not installed" in capsys.readouterr().out


def test_compiled_steps_are_not_counted(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "COMPILED", frozenset({"torch_muon"}))
    result = run(bench, tmp_path, "--step_only", "--optims", "--others", "torch_muon")
    floor = result["rows"][1]["floor"]
    assert floor["flops"] is None
    assert floor["ms"] > 0
    assert "| not counted |" in (tmp_path / "bench.md").read_text()


def test_profile_names_operators(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, "--profile", "shared_basis_adam:rank=4"]) == 0
    shown = capsys.readouterr().out
    assert "aten::bmm" in shown or "aten::baddbmm" in shown
    assert "Self CPU" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 9", "layers=9 must be in 1..4, the layers of gpt2-7m"),
        ("--optims shampo", "Did you mean 'shampoo'"),
        ("--optims soap:rnak=3", "unknown option 'rnak'"),
    ],
)
def test_mistakes_take_one_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--preset", "gpt2-7m", *options.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
