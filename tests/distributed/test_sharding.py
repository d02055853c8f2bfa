"""However the work is spread, several ranks train as one process, and stay equal bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_precond import list_optimizers, option_specs, resolve
from tests.distributed.comparing import (
    alone,
    assert_equal,
    assert_moved,
    assert_near,
    assert_ranks_agree,
    bytes_of,
    cases,
    layout,
    layout_alone,
    tolerance,
)
from tests.distributed.ranks import MOST, Ranks
from tests.distributed.tiny_llama import TinyLlama
from tests.distributed.training import (
    BLOCKWISE,
    FEW,
    STEPS,
    Run,
    Training,
    Weights,
    local,
    trained,
)
from tests.relatives import RELATIVES
from trainer_ext import build_optimizer

pytestmark = pytest.mark.distributed

ALL = list_optimizers()
FEW_CASES = cases(("owner", "blocks", "fsdp2"), FEW)
# Three and four ranks cut heads and leave the last one without a row; what that matters to.
ON_FOUR = ("shared_basis_adagrad", "kfac")


# -- ranks and one process --


def trained_and_held(run: Run) -> dict[str, Any]:
    """Weights at the end, the layout of the whole state, and the bytes of it on this rank."""
    training = Training(run).take(range(STEPS))
    held = sum(
        local(tensor).numel() * tensor.element_size()
        for state in training.optimizer.state.values()
        for tensor in state.values()
    )
    return {"weights": training.weights(), "layout": layout(training.state()), "held": held}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *cases(["owner"], [name for name in ALL if name not in RELATIVES], every=ALL),
        *cases(("blocks", "fsdp2"), (*FEW, *BLOCKWISE), every=ALL),
        # Of most optimizers the same as with owners but for vectors and embeddings.
        *cases(("replicated", "fsdp2-owner"), FEW, every=ALL),
    ],
)
def test_two_ranks_train_as_one_process(ranks: Ranks, name: str, mode: str) -> None:
    """And hold of the state what they have to, which put together is that of one process."""
    run = Run(name=name, mode=mode)
    found = ranks.run(trained_and_held, run, world=2)
    assert_ranks_agree([rank["weights"] for rank in found])
    assert_near(found[0]["weights"], alone(run), tolerance(name))
    assert_moved(found[0]["weights"], alone(run, steps=0))
    assert [rank["layout"] for rank in found] == 2 * [layout_alone(name)]
    whole = bytes_of(layout_alone(name))
    if mode == "replicated":
        assert [rank["held"] for rank in found] == 2 * [whole]
    else:
        # A few matrices are not much to share out; and bases of rows that are spread are on
        # every rank.
        assert max(rank["held"] for rank in found) < 0.75 * whole
        limit = 2.0 if name in BLOCKWISE else 1.1
        assert sum(rank["held"] for rank in found) < limit * whole


@pytest.mark.parametrize("world", [pytest.param(3, marks=pytest.mark.slow), MOST])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *cases(("owner", "blocks", "fsdp2"), ON_FOUR, every=ALL),
        *cases(("replicated", "fsdp2-owner"), (), every=ALL),
    ],
)
def test_more_ranks_train_as_one_process(ranks: Ranks, name: str, mode: str, world: int) -> None:
    run = Run(name=name, mode=mode)
    found = ranks.run(trained, run, world=world)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run), tolerance(name))


@pytest.mark.parametrize(("name", "mode"), cases(["fsdp2-replicated"], FEW, every=ALL))
def test_gathered_everywhere_is_one_process(ranks: Ranks, name: str, mode: str) -> None:
    """FSDP2 whose shards every rank gathers: slow, and the same."""
    run = Run(name=name, mode=mode)
    found = ranks.run(trained, run, 6, world=2)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run, 6), tolerance(name))


@pytest.mark.parametrize(
    ("name", "mode"),
    # Others turn rounding of float32 into more than 1e-5 on one process as well, see TOLERANCES.
    cases(
        ("owner", "blocks", "fsdp2"),
        ("shared_basis_adagrad", "kfac"),
        every=("sketchy", "adadiag", "muon"),
    ),
)
def test_ranks_train_as_one_process_in_float32(ranks: Ranks, name: str, mode: str) -> None:
    # A larger eps than the default: coefficients near zero would be rounding.
    options: dict[str, Any] = {"state_dtype": "float32"}
    options |= {"eps": 1e-3} if name in BLOCKWISE else {}
    run = Run(name=name, mode=mode, dtype=torch.float32, options=options)
    found = ranks.run(trained, run, world=2)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run), 1e-5)


@pytest.mark.parametrize("mode", ["replicated", "owner"])
def test_one_rank_is_no_ranks(ranks: Ranks, mode: str) -> None:
    run = Run(name="soap", mode=mode)
    assert_equal(ranks.run(trained, run, world=1)[0], alone(run))


def trained_with_gaps(run: Run) -> tuple[Weights, list[str]]:
    """Weights, and the parameters without a gradient at the last step."""
    training = Training(run).take(range(STEPS))
    missing = [name for name, p in training.model.named_parameters() if p.grad is None]
    return training.weights(), missing


@pytest.mark.parametrize(("name", "mode"), FEW_CASES)
@pytest.mark.parametrize(
    ("gaps", "world"),
    [((0, 3, 4, STEPS - 1), MOST), (tuple(range(STEPS)), 2)],
    ids=["sometimes", "always"],
)
def test_a_module_may_be_left_out(
    ranks: Ranks, name: str, mode: str, gaps: tuple[int, ...], world: int
) -> None:
    """In the first step and later ones, or in all of them."""
    run = Run(name=name, mode=mode, gaps=gaps)
    found = ranks.run(trained_with_gaps, run, world=world)
    assert [missing for _, missing in found] == world * [["scores.weight", "scores.bias"]]
    assert_ranks_agree([weights for weights, _ in found])
    assert_near(found[0][0], alone(run), tolerance(name))


# -- learning rates, dtypes --


@pytest.mark.parametrize(("name", "mode"), FEW_CASES)
def test_without_a_rate_nothing_moves(ranks: Ranks, name: str, mode: str) -> None:
    run = Run(name=name, mode=mode, lr=0.0)
    for weights in ranks.run(trained, run, 4, world=2):
        assert_equal(weights, alone(run, steps=0))


def ramp(step: int) -> float:
    """Up and down again."""
    return 1 - abs(step - 4) / 6


@pytest.mark.parametrize(("name", "mode"), FEW_CASES)
def test_a_scheduler_reaches_all_ranks(ranks: Ranks, name: str, mode: str) -> None:
    run = Run(name=name, mode=mode, rate=ramp)
    found = ranks.run(trained, run, world=2)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run), tolerance(name))


@pytest.mark.parametrize("clip", [{"max_grad_norm": 0.1}, {"clip_mode": "kl"}], ids=["norm", "kl"])
@pytest.mark.parametrize(
    ("name", "mode"),
    cases(("owner", "blocks", "fsdp2"), ("shared_basis_adagrad", "kfac"), every=ALL),
)
def test_clipping_sees_all_ranks(ranks: Ranks, name: str, mode: str, clip: dict[str, Any]) -> None:
    """Both kinds need a sum over everything there is."""
    run = Run(name=name, mode=mode, options=clip)
    found = ranks.run(trained, run, world=2)
    assert_ranks_agree(found)
    assert_near(found[0], alone(run), tolerance(name))


@pytest.mark.parametrize(("name", "mode"), FEW_CASES)
def test_bf16_weights(ranks: Ranks, name: str, mode: str) -> None:
    """Beside statistics in float32; gradients are rounded to three digits on each rank."""
    run = Run(name=name, mode=mode, dtype=torch.bfloat16, options={"state_dtype": "float32"})
    found = ranks.run(trained, run, world=2)
    assert_ranks_agree(found)
    assert {weight.dtype for weight in found[0].values()} == {torch.bfloat16}
    start, expected = alone(run, steps=0), alone(run)
    moved = sum((expected[n].double() - start[n].double()).norm() ** 2 for n in start) ** 0.5
    apart = sum((expected[n].double() - found[0][n].double()).norm() ** 2 for n in start) ** 0.5
    assert apart < 0.3 * moved


@pytest.mark.parametrize(("name", "mode"), cases(("owner", "fsdp2-owner"), ("muon", "kfac")))
def test_directions_travel_in_bf16(ranks: Ranks, name: str, mode: str) -> None:
    """Which costs three digits of each step, and no rank knows better than another."""
    options = {"state_dtype": "float32"}
    run = Run(name=name, mode=mode, dtype=torch.float32, options=options)
    rounded = Run(
        name=name,
        mode=mode,
        dtype=torch.float32,
        options={**options, "exchange_dtype": "bfloat16"},
    )
    found = ranks.run(trained, rounded, world=2)
    assert_ranks_agree(found)
    start, expected = alone(run, steps=0), alone(run)
    for key, weight in found[0].items():
        moved = (expected[key] - start[key]).norm()
        assert (weight - expected[key]).norm() < 0.05 * moved, key
    assert not torch.equal(found[0]["lm_head.weight"], expected["lm_head.weight"])


# -- what is refused --


def test_every_optimizer_has_the_options() -> None:
    for name in list_optimizers():
        specs = option_specs(name)
        assert specs["sharding"].default == "auto"
        assert "bfloat16" in specs["exchange_dtype"].allowed


@pytest.mark.parametrize("name", sorted(set(list_optimizers()) - set(BLOCKWISE)))
def test_methods_that_cannot_share_blocks_say_who_can(name: str) -> None:
    with pytest.raises(ValueError, match="sharding") as caught:
        build_optimizer(TinyLlama(), name, lr=0.1, sharding="blocks")
    assert "blocks" in str(caught.value)
    assert all(able in str(caught.value) for able in BLOCKWISE)


@pytest.mark.parametrize(
    "option", [{"sharding": "rows"}, {"sharding": True}, {"exchange_dtype": "float16"}], ids=str
)
def test_unknown_values_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        resolve("soap", option)


def test_blocks_may_be_asked_for_on_one_process() -> None:
    run = Run(name="shared_basis_adam", mode="blocks")
    actual: dict[str, Tensor] = trained(run)
    assert_equal(actual, alone(run))
