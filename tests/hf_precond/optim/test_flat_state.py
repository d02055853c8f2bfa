"""Loading checks everything before it changes anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_precond import PreconditionedOptimizer
from hf_precond.optim.flat_state import StateMismatchError, flat_state, load_flat_state
from tests.suite.building import assert_bit_equal, build, parameter, run, state_tensors

NAME, OTHER = "shared_basis_adagrad", "shared_basis_adam"
Damage = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


def make(name: str = NAME) -> PreconditionedOptimizer:
    return build(name, [("a.weight", parameter(4, 5)), ("a.bias", parameter(4))])


def test_keys_are_parameter_names() -> None:
    optimizer = make()
    assert flat_state(optimizer)[0] == {}
    run(optimizer, [1])
    tensors, header = flat_state(optimizer)
    assert {"state.a.weight.basis", "state.a.weight.step", "state.a.bias.exp_avg"} <= tensors.keys()
    assert header["algorithm"] == NAME
    assert header["shapes"] == {"a.weight": [4, 5], "a.bias": [4]}
    assert header["hyperparameters"]["rank"] == 3


DAMAGES: dict[str, tuple[Damage, str]] = {
    "version": (lambda t, h: h.update(format_version=99), "version: expected 1, found 99"),
    "algorithm": (lambda t, h: h.update(algorithm=OTHER), f"expected '{NAME}', found '{OTHER}'"),
    "no groups": (lambda t, h: h.pop("param_groups"), "param_groups"),
    "fewer parameters": (lambda t, h: h["param_groups"][0].update(num_params=1), r"\[2\].*\[1\]"),
    "other names": (
        lambda t, h: h["shapes"].update({"b.weight": h["shapes"].pop("a.weight")}),
        r"missing \['a\.weight'\].*unknown \['b\.weight'\]",
    ),
    "other shape": (
        lambda t, h: h["shapes"].update({"a.weight": [5, 4]}),
        r"'a\.weight': expected \[4, 5\], found \[5, 4\]",
    ),
    "other views": (lambda t, h: h["views"].update({"a.weight": []}), r"views of 'a\.weight'"),
    "a tensor is missing": (
        lambda t, h: t.pop("state.a.bias.exp_avg"),
        r"missing \['state\.a\.bias\.exp_avg'\]",
    ),
    "a tensor too many": (
        lambda t, h: t.update({"state.a.bias.more": torch.zeros(1)}),
        r"unknown \['state\.a\.bias\.more'\]",
    ),
    "a tensor of another shape": (
        lambda t, h: t.update({"state.a.weight.basis": torch.zeros(1, 5, 2)}),
        r"'state\.a\.weight\.basis': expected \[1, 5, 3\], found \[1, 5, 2\]",
    ),
    "a tensor of integers": (
        lambda t, h: t.update({"state.a.bias.exp_avg": torch.zeros(1, 1, 4, dtype=torch.int32)}),
        "floating",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_foreign_state_is_refused_and_nothing_changes(damage: str) -> None:
    source, target = make(), make()
    run(source, [1, 2])
    run(target, [1])
    tensors, header = (copy.deepcopy(part) for part in flat_state(source))
    act, message = DAMAGES[damage]
    act(tensors, header)
    before = {key: tensor.clone() for key, tensor in state_tensors(target).items()}
    with pytest.raises(StateMismatchError, match=message):
        load_flat_state(target, tensors, header)
    assert_bit_equal(state_tensors(target).values(), before.values(), "state")


def test_equal_names_are_refused() -> None:
    optimizer = build(
        NAME,
        [
            {"params": [("same", parameter(3, 3))]},
            {"params": [("same", parameter(3, 3))]},
        ],
    )
    with pytest.raises(StateMismatchError, match="same"):
        flat_state(optimizer)
