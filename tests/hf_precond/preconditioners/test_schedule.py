"""Hyperparameters that change along a run: what is understood, refused, obeyed and kept."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hf_precond import PreconditionedOptimizer, option_specs, resolve
from hf_precond.optim.flat_state import flat_state, load_flat_state
from hf_precond.preconditioners.base import StepContext
from hf_precond.preconditioners.ng_plus import NgPlus
from hf_precond.preconditioners.schedule import FORMS, Schedule
from tests.suite.building import (
    assert_bit_equal,
    assert_same,
    build,
    parameter,
    params_of,
    random_grads,
    run,
)
from trainer_ext.arguments import parse_optim_args

NAME, OTHER = "ng_plus", "shared_basis_adagrad"  # with and without a schedule of its own
TOLERANCE = 1e-12
STEPS_PER_EPOCH = 4

# text -> {step: value}; the epoch of a step is (step - 1) / 4
VALUES: dict[str, dict[int, float]] = {
    "0.16": {1: 0.16, 10**6: 0.16},
    "1e-3": {1: 1e-3},
    "0.16*0.8^(step/10)": {1: 0.16, 6: 0.16 * 0.8**0.5, 11: 0.128, 21: 0.16 * 0.64},
    "0.16*0.8^(epoch/10)": {1: 0.16, 21: 0.16 * 0.8**0.5, 41: 0.128},
    "1*2^(step/1)": {1: 1.0, 4: 8.0},
    "1*1^(epoch/3)": {1: 1.0, 99: 1.0},
    "1/0.5@step3": {1: 1.0, 2: 1.0, 3: 0.5, 100: 0.5},
    "0.1/0.05@epoch2/0.01@step12": {1: 0.1, 8: 0.1, 9: 0.05, 11: 0.05, 12: 0.01},
    "1/0.5@epoch0.5": {2: 1.0, 3: 0.5},
    "1/0.5@step1": {1: 0.5},
    "0.1/1e-2@step1e1": {9: 0.1, 10: 0.01},
    "5.*.5^(step/1.)": {1: 5.0, 2: 2.5},
}
# What is written, and the text it becomes.
SPELLINGS: tuple[tuple[Any, str], ...] = (
    (0.16, "0.16"),
    (1, "1"),
    (" 0.16 * 0.8 ^ ( epoch / 10 ) ", "0.16*0.8^(epoch/10)"),
    (["0.1", "0.05@epoch25"], "0.1/0.05@epoch25"),
    ([0.1, "0.05@epoch25", "0.01 @ step9000"], "0.1/0.05@epoch25/0.01@step9000"),
    ((0.1,), "0.1"),
    (Schedule.parse("1/0.5@step3"), "1/0.5@step3"),
)
BAD: tuple[Any, ...] = (
    "",
    "fast",
    "0.1,0.05@epoch25",
    "0.1/0.05",
    "0.1/0.05@25",
    "0.1/0.05@epochs25",
    "0.1/@epoch25",
    "0.1/0.05@epoch",
    "0.05@epoch25",
    "0.1//0.05@epoch25",
    "0.16*0.8^(epoch)",
    "0.16*0.8^(epoch/10",
    "0.16*0.8^epoch/10",
    "0.16*0.8^(iteration/10)",
    "0.16*0^(epoch/10)",
    "0.16*-0.8^(epoch/10)",
    "0.16*0.8^(epoch/0)",
    "0.16*0.8^(epoch/-10)",
    "0.16*0.8^(epoch/10)/0.1@step5",
    "nan",
    "inf",
    float("nan"),
    float("inf"),
    True,
    None,
    [],
    ["0.1", 0.05],
    {"0.1": "epoch25"},
)
OUT_OF_RANGE = (0, -0.1, "0", "-1*0.8^(epoch/10)", "0.1/0@epoch25", "0.1/-1@step9", "1e999")


def value(text: Any, step: int) -> float:
    """The schedule's value at a step, with epochs of four steps."""
    return StepContext(step=step, steps_per_epoch=STEPS_PER_EPOCH).value(Schedule.parse(text))


def never() -> float:
    raise AssertionError("nobody speaks of epochs here")


# --- the three forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", VALUES)
def test_values(text: str) -> None:
    for step, expected in VALUES[text].items():
        assert value(text, step) == pytest.approx(expected, rel=TOLERANCE), step


@pytest.mark.parametrize(("given", "text"), SPELLINGS, ids=str)
def test_spellings(given: Any, text: str) -> None:
    schedule = Schedule.parse(given)
    assert str(schedule) == text
    assert schedule == Schedule.parse(text)
    assert Schedule.parse(schedule) is schedule
    assert hash(schedule) == hash(Schedule.parse(text))


def test_the_last_entry_that_has_begun_counts() -> None:
    text = "1/0.5@epoch1/0.25@step3"
    assert [value(text, step) for step in range(1, 7)] == [1, 1, 0.25, 0.25, 0.25, 0.25]
    text = "1/0.25@step3/0.5@epoch1"
    assert [value(text, step) for step in range(1, 7)] == [1, 1, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("text", ["0.16", "0.16*0.8^(step/10)", "0.1/0.05@step25"])
def test_the_epoch_is_asked_only_where_the_schedule_speaks_of_it(text: str) -> None:
    assert Schedule.parse(text).at(30, never) > 0
    with pytest.raises(AssertionError, match="epochs"):
        Schedule.parse("0.1/0.05@epoch25").at(1, never)


@pytest.mark.parametrize("name", [NAME, OTHER])
def test_a_schedule_by_epoch_needs_to_know_the_epoch(name: str) -> None:
    options = {"lr_schedule": "1*0.5^(epoch/2)"}
    with pytest.raises(ValueError, match="epoch needs steps_per_epoch"):
        run(build(name, [parameter(3, 4)], **options), [1])
    run(build(name, [parameter(3, 4)], **options, steps_per_epoch=2.0), [1, 2])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("option", ["damping", "lr_schedule"])
def test_what_is_no_schedule_is_refused(option: str, bad: Any) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(NAME, {option: bad})
    message = str(caught.value)
    assert message.startswith(f"{option} = {bad!r} is not allowed")
    assert f"must be {FORMS}" in message


@pytest.mark.parametrize("bad", [text for text in BAD if isinstance(text, str) and text], ids=str)
def test_what_is_no_schedule_is_refused_as_text(bad: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_optim_args(NAME, f"damping={bad},beta=0.9")
    message = str(caught.value)
    assert repr(bad.split(",")[0]) in message or "is not KEY=VALUE" in message
    assert FORMS in message or "is not KEY=VALUE" in message


def test_several_mistakes_are_one_error() -> None:
    text = "damping=fast,lr_schedule=0.1/0.05,betta=0.9"
    with pytest.raises(ValueError, match=r"damping = 'fast'.*lr_schedule = '0\.1/0\.05'.*'betta'"):
        parse_optim_args(NAME, text)


@pytest.mark.parametrize("bad", OUT_OF_RANGE, ids=str)
def test_every_value_of_a_schedule_must_be_allowed(bad: Any) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(NAME, {"damping": bad})
    assert str(bad) in str(caught.value)
    assert "damping = " in str(caught.value)
    assert "must be > 0" in str(caught.value)


def test_a_learning_rate_may_be_scheduled_to_zero() -> None:
    assert resolve(NAME, {"lr_schedule": "1/0@step5"}).schedules.lr_schedule.at(5, never) == 0


# --- from command lines and files -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("damping", "0.16*0.8^(epoch/10)"),
        ("damping", "0.1/0.05@epoch25/0.01@step9000"),
        ("damping", "0.3"),
        ("lr_schedule", "1/0.5@step3"),
    ],
)
def test_optim_args(option: str, text: str) -> None:
    options = parse_optim_args(NAME, f"beta=0.9, {option} = {text}").options
    assert options == {"beta": 0.9, option: Schedule.parse(text)}
    assert resolve(NAME, options).hyperparameters()[option] == text


@pytest.mark.parametrize(
    "line",
    [
        "damping: [0.1, 0.05@epoch25, 0.01@step9000]",
        "damping: 0.1/0.05@epoch25/0.01@step9000",
        "damping:\n  - 0.1\n  - 0.05@epoch25\n  - 0.01@step9000",
    ],
    ids=["list", "text", "lines"],
)
def test_yaml_says_the_same(line: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"{line}\nlr_schedule: 1*0.5^(epoch/2)\nbeta: 0.9\n")
    options = parse_optim_args(NAME, f"config={file}").options
    assert options["damping"] == Schedule.parse("0.1/0.05@epoch25/0.01@step9000")
    assert options["lr_schedule"] == Schedule.parse("1*0.5^(epoch/2)")


@pytest.mark.parametrize("given", [["0.1", "0.05@epoch25"], 0.3, "1*0.5^(step/9)"], ids=str)
def test_typed_options(given: Any) -> None:
    """What the Trainer's typed arguments hold."""
    assert parse_optim_args(NAME, None, {"damping": given}).options == {
        "damping": Schedule.parse(given)
    }


# --- what they do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("1/0.5@step3", lambda done: 0.5 if done >= 2 else 1.0),
        ("1*0.5^(step/2)", lambda done: 0.5 ** (done / 2)),
        ("1*0.5^(epoch/2)", lambda done: 0.5 ** (done / STEPS_PER_EPOCH / 2)),
        ("0.3/2@epoch1/0@step7", lambda done: 0.3 if done < 4 else 2.0 if done < 6 else 0.0),
    ],
    ids=["steps", "exponential", "epochs", "mixed"],
)
@pytest.mark.parametrize("name", [NAME, OTHER, "adadiag"])
def test_lr_schedule_equals_a_scheduler(
    name: str, text: str, factor: Callable[[int], float]
) -> None:
    """Matrices, vectors and weight decay; the scheduler counts from 0."""
    options = {"lr_schedule": text, "steps_per_epoch": float(STEPS_PER_EPOCH)}
    ours = decayed(name, **options)
    theirs = decayed(name)
    scheduler = LambdaLR(theirs, factor)
    for step in range(1, 9):
        assert_same(run(ours, [step]), run(theirs, [step]), TOLERANCE, f"step {step}")
        scheduler.step()


def test_lr_schedule_multiplies_with_a_scheduler() -> None:
    both, product = decayed(OTHER, lr_schedule="1/0.5@step3"), decayed(OTHER)
    schedulers = [
        LambdaLR(both, lambda done: 1 / (1 + done)),
        LambdaLR(product, lambda done: (0.5 if done >= 2 else 1.0) / (1 + done)),
    ]
    for step in range(1, 6):
        assert_same(run(both, [step]), run(product, [step]), TOLERANCE)
        for scheduler in schedulers:
            scheduler.step()


def test_a_parameter_that_missed_a_step_is_behind_in_its_schedule() -> None:
    """As in everything else, a missing gradient equals leaving the step out."""
    options = {"lr_schedule": "1/0.5@step3"}
    late = build(OTHER, [parameter(5, 6)], **options)
    grads = [random_grads([parameter(5, 6)], step) for step in (1, 2, 3)]
    run(late, [0], lambda params, step: [None])
    run(late, [1, 2, 3], lambda params, step: grads[step - 1])
    plain = build(OTHER, [parameter(5, 6)], **options)
    assert_bit_equal(params_of(late), run(plain, [1, 2, 3], lambda _, step: grads[step - 1]))


@pytest.mark.parametrize("text", ["0.16/0.5@step2/0.05@epoch1", "0.16*0.8^(epoch/1)"])
def test_damping_follows_its_schedule(text: str) -> None:
    """inverse (curvature + damping I) = I with the damping of the step."""
    algorithm = NgPlus(damping=Schedule.parse(text), update_interval=1)
    eye = torch.eye(3, dtype=torch.float64)
    state = algorithm.init((2, 3, 5), dtype=torch.float64, device=torch.device("cpu"))
    torch.testing.assert_close(state["curvature"], (0.16 * eye).expand(2, 3, 3))
    for step in range(1, 8):
        gradient = torch.randn(2, 3, 5, dtype=torch.float64)
        algorithm.update(
            state, gradient, StepContext(step=step, steps_per_epoch=float(STEPS_PER_EPOCH))
        )
        damped = state["curvature"] + value(text, step) * eye
        torch.testing.assert_close(
            state["inverse"] @ damped, eye.expand(2, 3, 3), rtol=TOLERANCE, atol=TOLERANCE
        )


# --- what is kept ---------------------------------------------------------------------------------


def test_hyperparameters_are_plain_and_can_be_given_again() -> None:
    options = {"damping": "0.16*0.8^(epoch/10)", "lr_schedule": ["1", "0.5@step3"]}
    recipe = resolve(NAME, options)
    plain = json.loads(json.dumps(recipe.hyperparameters()))
    assert plain["damping"] == "0.16*0.8^(epoch/10)"
    assert plain["lr_schedule"] == "1/0.5@step3"
    assert resolve(NAME, plain) == recipe


def test_defaults_are_schedules() -> None:
    specs = option_specs(NAME)
    assert specs["damping"].type is Schedule
    assert isinstance(specs["damping"].default, Schedule)
    assert str(specs["lr_schedule"].default) == "1.0"


SCHEDULED = {
    "lr_schedule": "1/0.5@step3/0.25@epoch1",
    "damping": "0.16*0.8^(epoch/1)",
    "steps_per_epoch": float(STEPS_PER_EPOCH),
}


def decayed(name: str, **options: Any) -> PreconditionedOptimizer:
    """A matrix and a vector with weight decay."""
    return build(name, [parameter(5, 6), parameter(5)], weight_decay=0.3, **options)


def through_state_dict(source: PreconditionedOptimizer) -> PreconditionedOptimizer:
    target = decayed(NAME, **SCHEDULED)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    return with_weights(target, params_of(source))


def through_flat_state(source: PreconditionedOptimizer) -> PreconditionedOptimizer:
    target = decayed(NAME, **SCHEDULED)
    tensors, header = flat_state(source)
    load_flat_state(target, copy.deepcopy(tensors), json.loads(json.dumps(header)))
    return with_weights(target, params_of(source))


def through_pickle(source: PreconditionedOptimizer) -> PreconditionedOptimizer:
    return pickle.loads(pickle.dumps(source))


def with_weights(
    optimizer: PreconditionedOptimizer, weights: Sequence[Tensor]
) -> PreconditionedOptimizer:
    for param, weight in zip(params_of(optimizer), weights, strict=True):
        param.data.copy_(weight)
    return optimizer


@pytest.mark.parametrize(
    "route", [through_state_dict, through_flat_state, through_pickle, copy.deepcopy]
)
@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_resumed_run_is_where_it_was(
    route: Callable[[PreconditionedOptimizer], PreconditionedOptimizer], done: int
) -> None:
    straight = decayed(NAME, **SCHEDULED)
    run(straight, range(1, 9))
    first = decayed(NAME, **SCHEDULED)
    run(first, range(1, done + 1))
    second = route(first)
    run(second, range(done + 1, 9))
    assert_bit_equal(params_of(second), params_of(straight), "weight")


def test_copies_keep_an_epoch_that_was_set_later() -> None:
    """The Trainer sets it on the optimizer when it knows the data."""
    optimizer = decayed(OTHER, lr_schedule="1/0.5@epoch1")
    optimizer.steps_per_epoch = 2
    run(optimizer, [1, 2])
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.steps_per_epoch == 2
        expected = copy.deepcopy(optimizer)
        assert_bit_equal(run(twin, [3, 4]), run(expected, [3, 4]))


def test_schedules_are_values() -> None:
    schedule = Schedule.parse("0.1/0.05@epoch25/0.01@step9000")
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert copy.deepcopy(schedule) == schedule
    assert schedule.values == (0.1, 0.05, 0.01)
