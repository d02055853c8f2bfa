"""scripts/bench_step.py: the floor, the ratios, and a run on a tiny scale."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from hf_precond import create_optimizer

OURS = "shared_basis_adagrad:update_interval=10,rank=8"


def test_floor_counts_operations_and_bytes(bench: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    options = {"rank": 4, "update_interval": 2, "tail": "isotropic", "escaped_norm": "block"}
    optimizer = create_optimizer(model, "shared_basis_adagrad", **options)
    rates = {"flops": 1e9, "bytes": 1e9}
    floor = bench.floor(optimizer, rates, torch.device("cpu"))
    assert floor.products_ms == pytest.approx(64 * 32 * 4 * (4 + 12 / 2) / 1e6)
    numbers = 64 * 32 * 7 + 32 * 16 * (1 + 4 / 2) + 32 * 7
    assert floor.bytes_ms == pytest.approx(4 * numbers / 1e6)
    assert floor.eigh_ms > 0


def test_writes_medians_and_ratios(bench: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    sizes = ["--batch_size", "1", "--block_size", "8", "--rounds", "1", "--cycle", "1"]
    assert bench.main([*sizes, "--optims", "soap", OURS, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    adamw, soap, ours = result["rows"]
    assert adamw["optimizer_ratio"] == 1.0
    assert ours["optimizer_ratio"] == pytest.approx(ours["optimizer_ms"] / adamw["optimizer_ms"])
    assert ours["floor"]["products_ms"] > 0
    assert "floor" not in soap
    assert soap["state_bytes"] > adamw["state_bytes"] > 0
    assert result["tokens_per_step"] == 8
    assert f"--optims soap {OURS}" in result["command"]
