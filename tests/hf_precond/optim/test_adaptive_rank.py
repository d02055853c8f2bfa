"""Ranks that are chosen while training: what is chosen, what is carried over, what is refused."""

from __future__ import annotations

import copy
from itertools import pairwise, product
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_precond import PreconditionedOptimizer, create_optimizer, resolve
from hf_precond.explain import explain_groups
from hf_precond.linalg.symmetric import pack
from hf_precond.optim.adaptive_rank import Candidate, choose, fit, near, rungs
from hf_precond.optim.flat_state import StateMismatchError, flat_state, load_flat_state
from hf_precond.preconditioners.base import Spectrum, StepContext
from hf_precond.preconditioners.shared_basis import SharedBasis
from hf_precond.preconditioners.two_sided_basis import TwoSidedBasis

NAMES = ("shared_basis_adagrad", "shared_basis_adam", "two_sided_basis")
DOUBLE: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}
SHAPE = (2, 9, 12)


# --- the choice -----------------------------------------------------------------------------------


def candidates(count: int, seed: int) -> list[Candidate]:
    """Views whose steps up cost ever more and bring ever less."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        costs = torch.randint(1, 9, (4,), generator=draw).sort().values.cumsum(0).tolist()
        gains = torch.rand(4, generator=draw).sort(descending=True).values.cumsum(0).tolist()
        found.append(Candidate(ranks=(1, 2, 4, 8), num_bytes=costs, values=gains))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_within_the_bytes_spent_is_worth_more(seed: int) -> None:
    views = candidates(4, seed)

    def worth(ranks: Any) -> tuple[float, int]:
        places = [view.ranks.index(rank) for view, rank in zip(views, ranks, strict=True)]
        pairs = list(zip(views, places, strict=True))
        return sum(v.values[p] for v, p in pairs), sum(v.num_bytes[p] for v, p in pairs)

    least, most = (sum(view.num_bytes[place] for view in views) for place in (0, -1))
    chosen = {tuple(choose(views, budget)) for budget in range(least, most + 1)}
    assert {(1,) * 4, (8,) * 4} < chosen
    everything = [worth(ranks) for ranks in product((1, 2, 4, 8), repeat=4)]
    for budget in range(least, most + 1):
        value, spent = worth(choose(views, budget))
        assert spent <= budget
        best = max(other for other, cost in everything if cost <= spent)
        # A step of several rungs may leave a smaller one that would have fitted.
        assert value >= 0.9 * best


def test_a_rung_worth_nothing_is_not_climbed() -> None:
    flat = Candidate(ranks=(1, 2, 4), num_bytes=(1, 2, 4), values=(0.5, 0.5, 0.5))
    steep = Candidate(ranks=(1, 2, 4), num_bytes=(1, 2, 4), values=(0.1, 0.1, 0.9))
    assert choose([flat, steep], 100) == [1, 4]


def test_a_rank_is_worth_how_well_it_describes_what_is_known() -> None:
    shares = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    found = fit(Spectrum(tuple(shares.tolist()), 0.0, 0), range(1, 7))
    for rank, value in enumerate(found, start=1):
        described = torch.cat([shares[:rank], shares[rank:].mean().expand(6 - rank)])
        assert value == pytest.approx(-float(torch.logdet(described.diag())) / 6)
    # No other description of one mean outside is more likely.
    log_likelihood = -(described.log().sum() + (shares / described).sum()) / 6
    assert found[-1] == pytest.approx(float(log_likelihood) + 1)
    assert all(before < after for before, after in pairwise(found[:-1]))
    assert found[-1] == pytest.approx(found[-2])  # one direction is its own mean


def test_shares_outside_are_filled_in() -> None:
    tail = [0.1 * 0.8**index for index in range(1, 8)]
    spectrum, whole = (
        Spectrum((0.4, 0.2, 0.1), sum(tail), 7),
        Spectrum((0.4, 0.2, 0.1, *tail), 0.0, 0),
    )
    assert fit(spectrum, range(1, 11)) == pytest.approx(fit(whole, range(1, 11)))
    # More than equal shares could hold is even, and what is even needs no column.
    even = fit(Spectrum((0.1,), 0.9, 4), range(1, 6))
    assert even == pytest.approx(5 * [even[0]])
    assert fit(Spectrum((0.0,), 0.0, 4), [1, 5]) == pytest.approx(2 * [-log(2e-9)])


def test_ranks_move_a_rung_at_a_time_and_not_for_little() -> None:
    steep = Candidate(ranks=(1, 2, 4, 8), num_bytes=(1, 2, 4, 8), values=(0.0, 1.0, 2.0, 3.0))
    middle = near(steep, 2)
    assert (middle.ranks, middle.num_bytes) == ((1, 2, 4), (1, 2, 4))
    assert middle.values[1:] == [1.0, 2.0]
    assert middle.values[0] < 0.0
    assert (near(steep, 1).ranks, near(steep, 8).ranks) == ((1, 2), (4, 8))
    assert near(steep, 3).ranks == (2, 4)  # a rank of another ladder
    # What one gives up must be worth much more elsewhere.
    alike, better = (
        Candidate(ranks=(1, 2), num_bytes=(1, 2), values=(0.0, gain)) for gain in (1.0, 1.1)
    )
    assert choose([near(alike, 2), near(better, 1)], 3) == [2, 1]
    much = Candidate(ranks=(1, 2), num_bytes=(1, 2), values=(0.0, 1.5))
    assert choose([near(alike, 2), near(much, 1)], 3) == [1, 2]


def test_ranks_are_rungs_up_to_what_a_view_can_have() -> None:
    algorithm = SharedBasis(max_rank_ratio=4.0)
    assert rungs(algorithm, (1, 8, 64)) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert rungs(algorithm, (1, 8, 50)) == [1, 2, 3, 4, 6, 8, 12, 14]
    assert rungs(TwoSidedBasis(), (1, 8, 50)) == [1, 2, 3, 4, 6, 8]
    assert rungs(TwoSidedBasis(), (1, 4096, 4096))[-1] == 1024


# --- what is carried over -------------------------------------------------------------------------


def gradients(steps: int) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    scale = 0.6 ** torch.arange(SHAPE[-1], dtype=torch.float64)
    return torch.randn(steps, *SHAPE, generator=draw, dtype=torch.float64) * scale


def trained(algorithm: Any, steps: int = 8) -> dict[str, Tensor]:
    state = algorithm.init(SHAPE, **DOUBLE)
    for step, g in enumerate(gradients(steps), start=1):
        algorithm.update(state, g, StepContext(step=step, phases=[0.0, 0.0]))
    return state


def resized(algorithm: Any, state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    turns = algorithm.turns_for_ranks(algorithm.sums_for_ranks(state, None))
    found: dict[str, Tensor] = algorithm.resized(state, turns, rank)
    return found


def dense(state: dict[str, Tensor], rank: int) -> Tensor:
    """H_i = Q R_i Q^T + rho_i I, ``[G, M, B, B]``."""
    basis = state["basis"][:, None, :, :rank]
    eye = torch.eye(SHAPE[-1], dtype=torch.float64)
    return basis @ state["coef"] @ basis.mT + state["escaped_mass"][..., None, None] * eye


@pytest.mark.parametrize("oversample", [0, 2])
@pytest.mark.parametrize("norm", ["block", "exact", "mean"])
def test_a_larger_shared_basis_holds_the_same(norm: str, oversample: int) -> None:
    algorithm = SharedBasis(rank=3, escaped_norm=norm, oversample=oversample)
    state = trained(algorithm)
    before = {name: value.clone() for name, value in state.items()}
    larger = resized(algorithm, state, 5)
    assert larger["basis"].shape == (2, 12, 5 + oversample)
    gram = larger["basis"].mT @ larger["basis"]
    torch.testing.assert_close(gram, torch.eye(5 + oversample).double().expand_as(gram))
    torch.testing.assert_close(dense(larger, 5), dense(state, 3), rtol=1e-10, atol=0)
    ctx, g = StepContext(step=9, phases=[0.0, 0.0]), gradients(9)[-1]
    wide = SharedBasis(rank=5, escaped_norm=norm, oversample=oversample)
    torch.testing.assert_close(
        wide.apply(larger, g, ctx), algorithm.apply(state, g, ctx), rtol=1e-10, atol=1e-12
    )
    assert all(torch.equal(before[name], state[name]) for name in state)


@pytest.mark.parametrize("norm", ["block", "exact", "mean"])
def test_a_smaller_shared_basis_keeps_the_largest(norm: str) -> None:
    algorithm = SharedBasis(rank=5, escaped_norm=norm, tail="diagonal", deflate=False)
    state = trained(algorithm)
    smaller = resized(algorithm, state, 2)
    # The two leading eigenvectors of sum_i Q R_i Q^T, and R_i seen from them.
    total = (state["basis"][:, None] @ state["coef"] @ state["basis"][:, None].mT).sum(1)
    values, vectors = torch.linalg.eigh(total)
    top = vectors[..., -2:].flip(-1)
    aligned = (top.mT @ smaller["basis"]).abs()
    torch.testing.assert_close(aligned, torch.eye(2).double().expand_as(aligned))
    torch.testing.assert_close(
        smaller["coef"].sum(1).diagonal(dim1=-2, dim2=-1), values[..., -2:].flip(-1)
    )
    old, new = dense(state, 5), dense(smaller, 2)
    if norm == "mean":
        inside = smaller["coef"].diagonal(dim1=-2, dim2=-1).sum(-1)
        before = state["coef"].diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(
            inside + smaller["escaped_mass"] * 10, before + state["escaped_mass"] * 7
        )
    else:
        assert torch.linalg.eigvalsh(new - old).min() > -1e-12 * old.abs().max()
    # What leaves the basis is found again weight by weight.
    lost = old - state["escaped_mass"][..., None, None] * torch.eye(12).double()
    rest = smaller["basis"][:, None] @ smaller["basis"][:, None].mT
    outside = torch.eye(12).double() - rest
    expected = state["tail_sq"] + (outside @ lost @ outside).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(smaller["tail_sq"], expected)


def test_packed_coefficients_are_carried_over_alike() -> None:
    plain, packed = (SharedBasis(rank=4, packed=value) for value in (False, True))
    for rank in (2, 5):
        one, other = (resized(x, trained(x), rank) for x in (plain, packed))
        for name in one:
            expected = pack(one[name]) if name in ("coef", "root") else one[name]
            torch.testing.assert_close(other[name], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("old", "new"), [(6, 2), (2, 5), (9, 12), (12, 9)])
def test_two_sided_bases_keep_all_second_moments_they_lose(old: int, new: int) -> None:
    algorithm, other = TwoSidedBasis(rank=old), TwoSidedBasis(rank=new)
    state = trained(algorithm)
    found = resized(algorithm, state, new)
    like = other.init(SHAPE, **DOUBLE)
    assert {name: x.shape for name, x in found.items()} == {n: x.shape for n, x in like.items()}
    for side in ("in_basis", "out_basis"):
        gram = found[side].mT @ found[side]
        torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).double().expand_as(gram))
    squares = ("core_sq", "out_sq", "in_sq", "tail_sq")
    if new < old:
        totals = [sum(x[name].sum((-2, -1)) for name in squares) for x in (state, found)]
        torch.testing.assert_close(totals[1], totals[0])
        energy = state["core_sq"].sum(-2) + state["in_sq"].sum(-2)
        kept = found["core_sq"].sum(-2) + found["in_sq"].sum(-2)
        top = energy.sort(-1, descending=True).values[..., : kept.shape[-1]]
        assert (kept >= top * (1 - 1e-12)).all()  # and what the other side gave up
    else:
        # What the parts outside know of the new directions, by hand for one group.
        q = found["in_basis"][0, :, old:]
        expected = torch.einsum("mb,bk->mk", state["tail_sq"][0], q**2)
        p = found["out_basis"][0]
        if old < p.shape[-1] == new:
            seen = state["in_sq"][0], expected
            assert found["in_sq"].shape[-1] == new
            torch.testing.assert_close(found["in_sq"][0], torch.cat(seen, -1))


def test_the_same_rank_changes_nothing() -> None:
    for algorithm in (SharedBasis(rank=3), TwoSidedBasis(rank=3)):
        state = trained(algorithm)
        found = resized(algorithm, state, 3)
        assert all(torch.equal(found[name], state[name]) for name in state)


# --- training -------------------------------------------------------------------------------------


class Model(nn.Module):
    """Layers of one shape whose inputs have spectra of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(32, 24) for _ in range(3)])
        self.decays = (0.2, 0.9, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        powers = torch.arange(32)
        parts = [
            layer(x * decay**powers) for layer, decay in zip(self.layers, self.decays, strict=True)
        ]
        return torch.stack(parts).tanh()


def build(name: str, model: Model, **options: Any) -> PreconditionedOptimizer:
    given = {"rank": "auto", "rank_interval": 4, "state_budget": 2.0} | options
    return create_optimizer(model, name, lr=1e-2, **given)


def take(model: Model, optimizer: PreconditionedOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        draw = torch.Generator().manual_seed(step)
        x, y = (torch.randn(64, n, generator=draw) for n in (32, 24))
        (model(x) - y).square().mean().backward()
        optimizer.step()


def held(optimizer: PreconditionedOptimizer) -> int:
    states = optimizer.state.values()
    return sum(x.numel() * x.element_size() for state in states for x in state.values())


def adamw_bytes(model: Model) -> int:
    return sum(8 * param.numel() + 4 for param in model.parameters())


def ranks_of(optimizer: PreconditionedOptimizer) -> list[int]:
    found = optimizer.view_ranks
    assert found is not None
    return [rank for of_param in found for rank in of_param if rank]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_go_where_the_spectrum_is_long_within_the_budget(name: str) -> None:
    model = Model()
    optimizer = build(name, model)
    planned = sum(row.state_bytes for row in optimizer.plan())
    first = ranks_of(optimizer)
    assert len(set(first)) == 1
    take(model, optimizer, range(4))
    seen = [ranks_of(optimizer)]
    for begin in range(4, 24, 4):
        take(model, optimizer, range(begin, begin + 4))
        seen.append(ranks_of(optimizer))
        assert held(optimizer) <= 2.0 * adamw_bytes(model)
        steps = 4 * len(optimizer.param_names)
        assert held(optimizer) == steps + sum(row.state_bytes for row in optimizer.plan())
    assert planned <= 2.0 * adamw_bytes(model)
    assert optimizer.health()["mean_rank"] == pytest.approx(sum(seen[-1]) / len(seen[-1]))
    assert seen[1] != first
    _, falling, flat = seen[-1]
    assert falling > max(first[0], flat)


def test_without_a_budget_the_default_rank_is_shared_out() -> None:
    model = Model()
    fixed = create_optimizer(model, "two_sided_basis", rank=32)
    optimizer = build("two_sided_basis", model, state_budget=None)
    limit = sum(row.state_bytes for row in fixed.plan())
    take(model, optimizer, range(9))
    assert held(optimizer) <= limit
    assert held(optimizer) > 0.8 * limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("through", ["flat", "dict", "copy"])
def test_goes_on_bit_for_bit(name: str, through: str) -> None:
    model = Model()
    optimizer = build(name, model)
    take(model, optimizer, range(10))
    weights = copy.deepcopy(model.state_dict())
    other_model = Model()
    other = build(name, other_model)
    assert ranks_of(other) != ranks_of(optimizer)
    if through == "flat":
        load_flat_state(other, *flat_state(optimizer))
    elif through == "dict":
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        pair = copy.deepcopy((model, optimizer))
        other_model, other = pair
    assert ranks_of(other) == ranks_of(optimizer)
    other_model.load_state_dict(weights)
    take(model, optimizer, range(10, 18))
    take(other_model, other, range(10, 18))
    assert ranks_of(other) == ranks_of(optimizer)
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_bf16_state_keeps_its_dtypes() -> None:
    model = Model()
    optimizer = build("shared_basis_adam", model, state_storage="bfloat16", state_budget=1.2)
    take(model, optimizer, range(5))
    dtypes = {name: x.dtype for name, x in optimizer.state[model.layers[0].weight].items()}
    assert dtypes["basis"] == torch.float32
    assert dtypes["coef"] == dtypes["exp_avg"] == torch.bfloat16


def test_a_layer_added_later_has_a_rank() -> None:
    model = Model()
    optimizer = build("two_sided_basis", model)
    take(model, optimizer, range(5))
    before = ranks_of(optimizer)
    late = nn.Linear(16, 16)
    optimizer.add_param_group({"params": [("late.weight", late.weight)]})
    assert ranks_of(optimizer)[: len(before)] == before
    assert len(ranks_of(optimizer)) == len(before) + 1
    late(torch.randn(4, 16)).square().mean().backward()
    take(model, optimizer, range(5, 13))


def test_the_explanation_names_the_ranks() -> None:
    rows = explain_groups(Model(), "two_sided_basis", rank="auto", state_budget=1.6)
    assert [row.rank for row in rows if "weight" in row.parameter] == 3 * [rows[0].rank]
    assert int(rows[0].rank) > 1
    size = sum(row.state_bytes for row in rows)
    assert size <= 1.6 * adamw_bytes(Model())


# --- what is refused ------------------------------------------------------------------------------


def test_a_budget_below_rank_one_is_refused_with_what_it_takes() -> None:
    optimizer = build("shared_basis_adam", Model(), state_budget=0.5)
    with pytest.raises(
        ValueError, match=r"state_budget = 0\.5 .* with rank 1 is 1\.\d+ of AdamW's"
    ):
        optimizer.plan()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("two_sided_basis", {"state_budget": 1.0}, "state_budget .* it needs rank = 'auto'"),
        ("shared_basis_adam", {"rank": 8, "rank_interval": 3}, "rank = 8: it needs rank = 'auto'"),
        ("two_sided_basis", {"rank": "auto", "state_budget": 0.0}, "it must be > 0"),
        ("two_sided_basis", {"rank": "auto", "rank_interval": 0}, "it must be >= 1"),
        ("two_sided_basis", {"rank": "all"}, "an integer .*>= 1, or 'auto'"),
        ("sketchy", {"rank": "auto"}, "it must be an integer"),
        ("soap", {"state_budget": 1.0}, "soap has no option 'state_budget'"),
    ],
)
def test_options_that_do_not_go_together(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name, options)


def test_defaults_that_a_fixed_rank_does_not_read_may_be_given() -> None:
    defaults = {"rank": 8, "state_budget": None, "rank_interval": 200}
    assert resolve("two_sided_basis", defaults) == resolve("two_sided_basis", {"rank": 8})


@pytest.mark.parametrize("saved_auto", [True, False])
def test_a_state_of_the_other_kind_is_refused(saved_auto: bool) -> None:
    kinds: list[dict[str, Any]] = [{}, {"rank": 4, "rank_interval": None, "state_budget": None}]
    first, second = kinds if saved_auto else kinds[::-1]

    def made(options: dict[str, Any]) -> tuple[Model, PreconditionedOptimizer]:
        model = Model()
        if options:
            return model, create_optimizer(model, "two_sided_basis", rank=4)
        return model, build("two_sided_basis", model)

    (model, optimizer), (_, other) = made(first), made(second)
    take(model, optimizer, range(5))
    with pytest.raises(StateMismatchError, match="a fixed rank"):
        load_flat_state(other, *flat_state(optimizer))
    with pytest.raises(ValueError, match="a fixed rank"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize("ranks", [[99], [0], ["8"], [True], [4, 4], 4, None])
def test_ranks_that_cannot_be_are_refused_and_nothing_changes(ranks: Any) -> None:
    model = Model()
    optimizer = build("two_sided_basis", model)
    take(model, optimizer, range(5))
    tensors, header = flat_state(optimizer)
    header = copy.deepcopy(header)
    header["view_ranks"]["layers.1.weight"] = ranks
    other = build("two_sided_basis", Model())
    before = ranks_of(other)
    with pytest.raises(StateMismatchError, match="ranks of"):
        load_flat_state(other, tensors, header)
    assert ranks_of(other) == before
    assert not other.state
