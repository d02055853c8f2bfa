"""Law: a bad argument raises one ValueError that names it, its value and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_precond import create_optimizer, list_optimizers, optimizer_info, option_specs, resolve
from hf_precond.preconditioners.schedule import Schedule
from hf_precond.views.view import rows
from tests.suite.building import group, parameter

NAN = float("nan")

BAD_VALUES: list[tuple[str, Any]] = [
    # the shell's and the stages', which every optimizer has
    ("betas", (0.9,)),
    ("betas", (0.9, 0.99, 0.999)),
    ("betas", (-0.1, 0.9)),
    ("betas", (0.9, 1.0)),
    ("betas", (0.9, NAN)),
    ("betas", ("a", "b")),
    ("betas", 0.9),
    ("betas", None),
    ("momentum", "nesterov"),
    ("momentum", 0.9),
    ("momentum_site", "weight"),
    ("start_step", 0),
    ("start_step", 2.5),
    ("start_step", True),
    ("graft", "lamb"),
    ("graft", None),
    ("graft_scope", "layer"),
    ("graft_beta2", -0.1),
    ("graft_beta2", 1.1),
    ("graft_beta2", NAN),
    ("graft_beta2", "0.9"),
    ("attention_grouping", "heads"),
    ("fallback", "lion"),
    ("fallback_eps", -1e-8),
    ("fallback_eps", NAN),
    ("fallback_momentum", 1.0),
    ("fallback_lr_ratio", 0.0),
    ("fallback_lr_ratio", float("inf")),
    ("state_dtype", "int8"),
    ("state_dtype", torch.float32),
    ("state_storage", "float16"),
    ("state_storage", None),
    ("stochastic_rounding", "yes"),
    ("stochastic_rounding", 1),
    ("compile", "inductor"),
    ("compile", None),
    ("skip_nonfinite", "yes"),
    ("skip_nonfinite", 1),
    ("max_failures", 0),
    ("bucket_size", 0),
    ("bucket_size", -1.0),
    # those of low-rank algorithms
    ("rank", 0),
    ("rank", -3),
    ("rank", 2.0),
    ("rank", "32"),
    ("rank", None),
    ("rank", True),
    ("num_iters", 0),
    ("oversample", -1),
    ("warm_start", 1),
    ("deflate", "false"),
    ("escaped_norm", "frobenius"),
    ("update_interval", 0),
    ("update_interval", 0.5),
    ("coef_interval", 0),
    ("root_interval", -1),
    ("packed", "true"),
    ("pool", -0.1),
    ("pool", 1.1),
    ("max_rank_ratio", 0.0),
    ("max_rank_ratio", -1.0),
    ("max_rank_ratio", NAN),
    ("eps", 0.0),
    ("eps", -1e-8),
    ("eps", NAN),
    ("eps", float("inf")),
    ("eps", "small"),
    ("seed", -1),
    ("seed", 0.5),
    # schedules and the stages' later ones
    ("lr_schedule", "soon"),
    ("lr_schedule", "1*0.5^(epoch)"),
    ("lr_schedule", "1/0.5"),
    ("lr_schedule", True),
    ("lr_schedule", -1.0),
    ("lr_schedule", NAN),
    ("steps_per_epoch", 0.0),
    ("nesterov", "yes"),
    ("fallback_beta1", 1.0),
    # those of factored, rotated and natural-gradient methods
    ("block_size", 0),
    ("block_size", 2.5),
    ("max_dim", 0),
    ("large_dim", "both"),
    ("merge_dims", "no"),
    ("exponent", 0.0),
    ("exponent", -0.25),
    ("accumulate", "max"),
    ("inverse_interval", 0),
    ("eps_mode", "mean"),
    ("root_method", "svd"),
    ("stagger", 1),
    ("tail_decay", 1.5),
    ("max_elements", 0),
    ("projection_interval", 0),
    ("basis_interval", 0),
    ("basis_method", "lu"),
    ("first_svd", "never"),
    ("rotated_momentum", "on"),
    ("reproject_moments", 0),
    ("clip_threshold", 0.0),
    ("shampoo_beta", 1.0),
    ("beta", 1.5),
    ("gamma", -0.1),
    ("damping", "fast"),
    ("damping", -0.1),
    ("damping", 0.0),
    ("damping", "0.1/0@epoch3"),
    ("damping_decay", 0.0),
    ("damping_mode", "trace"),
    ("sketch_size", 0),
    ("factor_decay", 1.0),
    ("brand_interval", 0),
    ("rsvd_interval", 0),
    ("correction_interval", 0),
    ("correction_share", 0.0),
    ("correction_share", 1.5),
    ("factor_form", "svd"),
    ("application", "fast"),
    ("overwrite", "always"),
    ("weight_sharing", "sum"),
    ("max_columns", 0),
    ("max_dim", 0),
    ("power_iterations", -1),
    ("oversampling", -1),
    ("rank_target", 0.0),
    ("rank_step", 0),
    ("sample_size", 0),
    ("curvature", "hessian"),
    ("solver", "lu"),
    ("sketch_rows", 0),
    ("clip_mode", "norm"),
    ("clip_value", 0.0),
    ("ns_steps", 0),
    ("ns_steps", 100),
    ("ns_coefficients", (1.0, 2.0)),
    ("ns_coefficients", ("a", "b", "c")),
    ("ns_coefficients", (1.0, 2.0, NAN)),
    ("ns_dtype", "float16"),
    ("adjust_lr_fn", "sqrt"),
]


@pytest.mark.parametrize(
    ("row", "option", "value"),
    [
        (row, option, value)
        for row in list_optimizers()
        for option, value in BAD_VALUES
        if option in option_specs(row)
        # A schedule may be written as text, and where none is allowed it is no bad value.
        and not (option_specs(row)[option].type is Schedule and value in ("32", 2.0))
        and not (option_specs(row)[option].optional and value is None)
    ],
    ids=str,
)
def test_bad_values_are_refused(row: str, option: str, value: Any) -> None:
    specs = option_specs(row)
    with pytest.raises(ValueError) as caught:
        resolve(row, {option: value})
    message = str(caught.value)
    assert option in message
    assert repr(value) in message or str(value) in message
    assert re.search(r"must be \S+", message)
    allowed = specs[option].allowed
    assert all(word in message for word in re.findall(r"[-\d.]+|'\w+'", allowed))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("shampoo", {"root_method": "newton", "exponent": 0.3}, ["exponent = 0.3", "whole number"]),
        ("sketchy", {"tail_decay": 0.9}, ["tail_decay = 0.9", "beta2 = 0.999"]),
    ],
    ids=["exponent that newton cannot reach", "escaped mass that decays faster"],
)
def test_values_that_do_not_go_together_are_refused(
    name: str, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(name, options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, NAN, float("inf")], ids=str)
def test_bad_rates_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option} = {value!r}.*>= 0"):
        create_optimizer([parameter(3, 3)], name, **{option: value})


def test_every_bad_value_is_of_some_optimizer() -> None:
    known = {option for row in list_optimizers() for option in option_specs(row)}
    assert {option for option, _ in BAD_VALUES} <= known


def test_unknown_options_are_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=r"'momentun'.*Did you mean 'momentum'") as caught:
        resolve(name, {"momentun": "ema"})
    assert all(option in str(caught.value) for option in option_specs(name))


def test_unknown_names_are_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Did you mean '{name}'") as caught:
        create_optimizer([parameter(3, 3)], name + "x")
    assert all(known in str(caught.value) for known in list_optimizers())


def test_no_parameters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        create_optimizer([], name)


def test_doubled_parameters_are_refused(name: str) -> None:
    param = parameter(3, 3)
    with pytest.raises(ValueError, match="more than one"):
        create_optimizer([{"params": [param]}, {"params": [param]}], name)


@pytest.mark.parametrize(
    "views",
    [
        [[rows((2, 3))]],
        [[rows((3, 3)), rows((3, 3))]],
        [[rows((3, 3))], [rows((3, 3))]],
    ],
    ids=["uncovered", "covered twice", "too many"],
)
def test_views_that_do_not_fit_are_refused(name: str, views: list[Any]) -> None:
    with pytest.raises(ValueError, match="view"):
        create_optimizer([group([parameter(3, 3)], views)], name)


def test_state_of_another_optimizer_is_refused(name: str) -> None:
    foreign = torch.optim.AdamW([parameter(3, 3)])
    optimizer = create_optimizer([parameter(3, 3)], name)
    with pytest.raises(ValueError, match=name):
        optimizer.load_state_dict(foreign.state_dict())


def test_sparse_gradients_are_refused(name: str) -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = create_optimizer(embedding, name)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_exemptions_name_a_law_and_give_a_reason() -> None:
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    laws = set(re.findall(r"def test_(\w+)\(\s*name: str", sources))
    assert "descends_on_an_mlp" in laws
    for name in list_optimizers():
        for law, reason in optimizer_info(name).exemptions.items():
            assert law in laws, f"{name}: there is no law {law!r}"
            assert len(reason.split()) > 2, f"{name}: {law} is exempt without a reason"
