"""What the optimizer announces about parameters and state is what it then allocates."""

from __future__ import annotations

import pytest
from torch import nn

from hf_precond import list_optimizers, option_specs
from hf_precond.explain import explain_groups, format_table
from tests.suite.building import SMALL, build, params_of, run


def model() -> nn.Module:
    layers = {"emb": nn.Embedding(5, 6), "fc": nn.Linear(6, 4), "norm": nn.LayerNorm(4)}
    return nn.ModuleDict(layers).double()


@pytest.mark.parametrize("name", list_optimizers())
def test_announced_bytes_are_allocated(name: str) -> None:
    optimizer = build(name, model())
    rows = optimizer.plan()
    assert not optimizer.state
    run(optimizer, [1])
    allocated = sum(
        tensor.numel() * tensor.element_size()
        for param in params_of(optimizer)
        for key, tensor in optimizer.state[param].items()
        if key != "step"
    )
    assert sum(row.state_bytes for row in rows) == pytest.approx(allocated, abs=4 * 5)
    assert sum(row.num_params for row in rows) == sum(p.numel() for p in params_of(optimizer))
    assert sum(row.num_tensors for row in rows) == 5
    assert {row.algorithm for row in rows} == {name, "adam"}


@pytest.mark.parametrize("name", list_optimizers())
def test_every_parameter_is_explained(name: str) -> None:
    options = {key: value for key, value in SMALL.items() if key in option_specs(name)}
    rows = {row.parameter: row for row in explain_groups(model(), name, **options)}
    assert rows.keys() == {"emb.weight", "fc.weight", "fc.bias", "norm.weight", "norm.bias"}
    assert rows["fc.weight"].algorithm == name
    assert rows["fc.weight"].view == "1 x [4, 6]"
    assert rows["emb.weight"].algorithm == "adam"
    assert rows["emb.weight"].reason == "embedding"
    table = format_table(rows.values())
    assert len(table.splitlines()) == 6
    assert all(row.parameter in table and row.reason in table for row in rows.values())
