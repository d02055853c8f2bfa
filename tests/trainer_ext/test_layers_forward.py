"""The pieces and heads of the views are those that the models' own forward passes use.

Nothing here repeats how a model splits its kernels. Weights are changed through the windows of the
views, and the input of the attention output kernel, the heads' contexts side by side, shows which
heads felt it:

- removing a value head silences exactly the query heads it serves;
- a query head that is blind for the state at one position changes its context there only;
- a key head that is blind for that state changes the contexts of positions that look at it;
- removing a head of the output kernel removes exactly that head's contribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from hf_precond.views.rules import assign_all, is_conv1d
from hf_precond.views.view import ParamView
from tests.trainer_ext.models import CASES, Attention, Case
from trainer_ext.layers import view_rules

PROOFS = [
    pytest.param(case, layer, id=f"{case.name}-{layer.o.removesuffix('.weight')}")
    for case in CASES
    for layer in case.attention
]
POSITION = 3

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of one kernel: the parameter, the view on it, the module that owns it."""

    param: Tensor
    view: ParamView
    owner: nn.Module

    @property
    def num_groups(self) -> int:
        return self.view.shape[0]

    def group(self, index: int) -> Tensor:
        """The group's part of the parameter, flat; a copy."""
        return self.view.to_blocks(self.param.detach())[index].clone()

    @contextmanager
    def changed(self, index: int, change: Change) -> Iterator[None]:
        """Replaces group ``index`` [M, B] by ``change`` of it while the block runs."""
        before = self.param.detach().clone()
        blocks = self.view.to_blocks(before).clone()
        blocks[index] = change(blocks[index])
        with torch.no_grad():
            self.view.copy_from_blocks(self.param, blocks)
        try:
            yield
        finally:
            with torch.no_grad():
                self.param.copy_(before)


def find_piece(model: nn.Module, name: str, piece: str) -> Piece:
    """The view called ``piece`` on the parameter ``name``; the only view has no name of its own."""
    for info, assignment in assign_all(model, view_rules(model)):
        if info.name == name:
            views = {view.name or piece: view for view in assignment.views}
            return Piece(param=info.param, view=views[piece], owner=info.module)
    raise AssertionError(f"{name} is no parameter")


def float64(case: Case) -> nn.Module:
    model = case.build().double()
    # The batched kernels for experts know no float64.
    model.config._experts_implementation = "eager"
    return model


class Probe:
    """One attention layer of a model in float64 with large weights and no attention biases."""

    def __init__(self, case: Case, layer: Attention) -> None:
        self.model, self.inputs = float64(case), case.inputs()
        torch.manual_seed(1)
        names = {piece: getattr(layer, piece) for piece in "qkvo"}
        self.pieces = {piece: find_piece(self.model, names[piece], piece) for piece in "qkvo"}
        for piece in self.pieces.values():
            nn.init.normal_(piece.param, std=0.2)
            if piece.owner.bias is not None:
                nn.init.zeros_(piece.owner.bias)
        self.columns = head_columns(self.pieces["o"])

    @torch.no_grad()
    def run(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Input and output [T, .] of every kernel in one forward pass."""
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[module] = (args[0].flatten(0, -2).clone(), output.flatten(0, -2).clone())

        owners = {piece.owner for piece in self.pieces.values()}
        hooks = [owner.register_forward_hook(remember) for owner in owners]
        self.model(
            **{
                key: value.double() if value.is_floating_point() else value
                for key, value in self.inputs.items()
            }
        )
        for hook in hooks:
            hook.remove()
        return seen

    def contexts(self) -> Tensor:
        """Contexts of the heads [T, H, d], in the order of the output kernel's groups."""
        return self.run()[self.pieces["o"].owner][0][:, self.columns]

    def felt_by(self, before: Tensor) -> Tensor:
        """Which positions and heads [T, H] changed."""
        return (self.contexts() - before).abs().amax(-1) > 1e-6


def head_columns(output: Piece) -> Tensor:
    """Which inputs of the output kernel each of its groups reads, [H, d]."""
    size_in = output.view.shape[0] * output.view.shape[2]
    numbers = torch.arange(size_in)
    grid = numbers.view(-1, 1) if is_conv1d(output.owner) else numbers.view(1, -1)
    blocks = output.view.to_blocks(grid.expand(output.param.shape))
    assert (blocks == blocks[:, :1]).all()
    return blocks[:, 0]


def blind_at_position(states: Tensor) -> Change:
    """Makes a kernel [M, B] map the state at ``POSITION`` to zero, all others [T, B] as before."""
    state = states[POSITION]
    others = torch.cat([states[:POSITION], states[POSITION + 1 :]])
    only_here = state - others.T @ torch.linalg.lstsq(others.T, state[:, None]).solution[:, 0]
    return lambda block: block - torch.outer(block @ state, only_here) / (only_here @ state)


def served(index: int, num_groups: int, num_heads: int) -> Tensor:
    """The query heads [H] that use group ``index`` of a kernel with ``num_groups`` heads."""
    return torch.arange(num_heads) // (num_heads // num_groups) == index


@pytest.mark.parametrize(("case", "layer"), PROOFS)
def test_pieces_and_heads_are_those_of_the_forward_pass(case: Case, layer: Attention) -> None:
    probe = Probe(case, layer)
    q, k, v, o = (probe.pieces[piece] for piece in "qkvo")
    seen = probe.run()
    before = probe.contexts()
    num_positions, num_heads = before.shape[:2]
    assert o.num_groups == q.num_groups == num_heads
    assert before.abs().amax((0, 2)).min() > 1e-3
    here = torch.arange(num_positions) == POSITION

    for index in range(v.num_groups):
        heads = served(index, v.num_groups, num_heads)
        with v.changed(index, torch.zeros_like):
            assert_silent(probe.contexts(), before, heads)

    for index in range(q.num_groups):
        with q.changed(index, blind_at_position(seen[q.owner][0])):
            felt = probe.felt_by(before)
        assert (felt == here[:, None] & served(index, num_heads, num_heads)).all()

    for index in range(k.num_groups):
        heads = served(index, k.num_groups, num_heads)
        with k.changed(index, blind_at_position(seen[k.owner][0])):
            felt = probe.felt_by(before)
        assert (felt.any(0) == heads).all()
        assert felt[~here].any(0)[heads].all()
        with k.changed(index, torch.zeros_like):
            assert probe.contexts()[:, heads].abs().amax() > 1e-3

    contexts, output = seen[o.owner]
    for index in range(num_heads):
        with o.changed(index, torch.zeros_like):
            masked = probe.run()[o.owner][1]
        columns = probe.columns[index]
        contribution = contexts[:, columns] @ o.group(index).T
        torch.testing.assert_close(masked, output - contribution)


def assert_silent(contexts: Tensor, before: Tensor, heads: Tensor) -> None:
    assert contexts[:, heads].abs().max() == 0
    torch.testing.assert_close(contexts[:, ~heads], before[:, ~heads])


def run_dense(module: nn.Module, states: Tensor, group: int) -> Tensor:
    return module(states)


def run_routed(module: nn.Module, states: Tensor, group: int) -> Tensor:
    """All states through one expert."""
    index = torch.full((len(states), 1), group)
    return module(states, index, torch.ones(len(states), 1, dtype=states.dtype))


def run_sorted(module: nn.Module, states: Tensor, group: int) -> Tensor:
    """For experts that get an equal share of the states each."""
    return module(states.repeat(3, 1)).view(3, *states.shape)[group]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """A gated layer: its module, the names of its two weights, how to run one group of it."""

    case: str
    module: str
    fused: str
    down: str
    run: Callable[[nn.Module, Tensor, int], Tensor]


GATED = (
    Gated(
        case="phi3",
        module="model.layers.1.mlp",
        fused="gate_up_proj.weight",
        down="down_proj.weight",
        run=run_dense,
    ),
    Gated(
        case="modernbert",
        module="model.layers.1.mlp",
        fused="Wi.weight",
        down="Wo.weight",
        run=run_dense,
    ),
    *(
        Gated(
            case=case,
            module="model.layers.1.mlp.experts",
            fused="gate_up_proj",
            down="down_proj",
            run=run_routed,
        )
        for case in ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")
    ),
    Gated(
        case="llama4",
        module="model.layers.1.feed_forward.experts",
        fused="gate_up_proj",
        down="down_proj",
        run=run_sorted,
    ),
)


@torch.no_grad()
@pytest.mark.parametrize("gated", GATED, ids=lambda gated: gated.case)
def test_gate_and_up_are_those_of_the_forward_pass(gated: Gated) -> None:
    """A closed gate silences one group; the output is affine in up, not in gate."""
    model = float64(next(case for case in CASES if case.name == gated.case))
    module = model.get_submodule(gated.module)
    torch.manual_seed(1)
    gate = find_piece(model, f"{gated.module}.{gated.fused}", "gate")
    up = find_piece(model, f"{gated.module}.{gated.fused}", "up")
    down = find_piece(model, f"{gated.module}.{gated.down}", "down")
    for piece in (gate, up, down):
        nn.init.normal_(piece.param, std=0.2)
    states = torch.randn(5, 32, dtype=torch.float64)
    num_groups = gate.num_groups

    def outputs() -> Tensor:
        return torch.stack([gated.run(module, states, group) for group in range(num_groups)])

    before = outputs()
    for group in range(num_groups):
        others = torch.arange(num_groups) != group
        with gate.changed(group, torch.zeros_like):
            closed = outputs()
        assert closed[group].abs().max() == 0
        torch.testing.assert_close(closed[others], before[others])

        def bend(piece: Piece, group: int = group) -> Tensor:
            with piece.changed(group, torch.zeros_like):
                none = outputs()[group]
            with piece.changed(group, lambda block: 2 * block):
                double = outputs()[group]
            return (double + none - 2 * before[group]).abs().max()

        assert bend(up) < 1e-12 < 1e-3 < bend(gate)

        with gate.changed(group, without_row(7)):
            without_neuron = outputs()
        with down.changed(group, without_column(7)):
            torch.testing.assert_close(outputs(), without_neuron)
        assert not torch.equal(without_neuron, before)
        with down.changed(group, without_row(7)):
            assert (outputs()[group] == 0).all(0).nonzero().tolist() == [[7]]


def without_row(index: int) -> Change:
    return lambda block: block.index_fill(0, torch.tensor([index]), 0)


def without_column(index: int) -> Change:
    return lambda block: block.index_fill(1, torch.tensor([index]), 0)
