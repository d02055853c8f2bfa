"""Which positions are kept, and that they stand for all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hf_precond.statistics.captured import Captured
from hf_precond.statistics.layer_io import LayerIO
from hf_precond.statistics.sampling import Reservoir
from tests.statistics.capturing import assert_close, capture, gram, product

SEEDS = 400


def kept(
    size: int | None, seed: int, batches: Sequence[Tensor], valid: Sequence[Tensor] | None = None
) -> Tensor:
    """The rows that a reservoir keeps of some batches."""
    reservoir = Reservoir(seed)
    for index, batch in enumerate(batches):
        reservoir.add([batch], size, None if valid is None else valid[index])
        assert size is None or len(reservoir.rows[0]) <= size
    return reservoir.rows[0]


def test_rows_are_drawn_without_replacement() -> None:
    numbers = torch.arange(20.0)
    for seed in range(20):
        found = kept(6, seed, [numbers]).tolist()
        assert len(set(found)) == 6
        assert found == sorted(found), "in the order of the batch"


@pytest.mark.parametrize("size", [20, 21, None])
def test_all_rows_are_kept_where_they_fit(size: int | None) -> None:
    numbers = torch.arange(20.0)
    assert torch.equal(kept(size, 0, numbers.split(7)), numbers)


@pytest.mark.parametrize("cuts", [[10, 10], [1, 19], [7, 6, 7], [3, 3, 14]])
@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_keep_what_one_batch_keeps(cuts: list[int], padded: bool) -> None:
    numbers = torch.arange(20.0)
    valid = torch.arange(20) % 3 != 0 if padded else None
    for seed in range(10):
        whole = kept(6, seed, [numbers], None if valid is None else [valid])
        pieces = kept(6, seed, numbers.split(cuts), None if valid is None else valid.split(cuts))
        assert torch.equal(pieces, whole)


def test_every_row_is_as_likely() -> None:
    counts = torch.zeros(10)
    for seed in range(2000):
        counts[kept(3, seed, torch.arange(10).split(4))] += 1
    # Standard deviation of a share is 0.01.
    assert ((counts / 2000 - 0.3).abs() < 0.05).all()


def test_other_seeds_draw_other_rows() -> None:
    drawn = {tuple(kept(3, seed, [torch.arange(10)]).tolist()) for seed in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize("size", [4, 5, 8])
def test_padding_is_kept_last(size: int) -> None:
    numbers = torch.arange(12)
    valid = torch.zeros(12, dtype=torch.bool)
    valid[[0, 3, 5, 8, 11]] = True
    for seed in range(20):
        found = kept(size, seed, numbers.split(5), valid.split(5))
        assert valid[found].sum() == min(size, 5)


def test_rows_of_several_tensors_stay_together() -> None:
    reservoir = Reservoir(3)
    for start in (0, 6):
        x = torch.arange(start, start + 6)
        reservoir.add([x, 10 * x, x.float().unsqueeze(1)], 4)
    first, second, third = reservoir.rows
    assert torch.equal(second, 10 * first)
    assert torch.equal(third.squeeze(1), first.float())
    assert reservoir.seen == 12


# -- in a layer --


class Tokens(nn.Module):
    """A layer over positions, and which of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y = self.layer(x).sin()
        return y if attention_mask is None else y * attention_mask.unsqueeze(-1)


def seen(
    model: nn.Module,
    batches: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None = None,
    **options: object,
) -> Captured:
    masks = masks or [None] * len(batches)
    losses = [
        lambda x=x, mask=mask: model(x, attention_mask=mask).sum()
        for x, mask in zip(batches, masks, strict=True)
    ]
    return capture(model, losses, **options)["layer.weight"]


def tokens(samples: int = 6, length: int = 5) -> Tensor:
    return torch.randn(samples, length, 4, dtype=torch.float64)


@pytest.mark.parametrize("by_sample", [False, True])
def test_two_micro_batches_keep_what_one_batch_keeps(by_sample: bool) -> None:
    model, x = Tokens(), tokens(8)
    options = {"max_columns": 20, "by_sample": by_sample, "seed": 5}
    whole, halves = seen(model, [x], **options), seen(model, x.split(4), **options)
    assert not whole.complete
    assert_close(halves.inputs, whole.inputs)
    assert_close(halves.outputs, whole.outputs)


@pytest.mark.parametrize("by_sample", [False, True])
def test_columns_are_scaled_to_stand_for_all(by_sample: bool) -> None:
    """Both by sqrt(N / n), on top of 1 / sqrt(T) and sqrt(T)."""
    model, x = Tokens(), tokens(6, 5)
    options = {"by_sample": by_sample, "seed": 1}
    some, everything = seen(model, [x], max_columns=15, **options), seen(model, [x], **options)
    assert some.inputs.shape[:2] == ((3, 5) if by_sample else (15, 1))
    assert not some.complete
    assert everything.complete
    for kind in ("inputs", "outputs"):
        rows = {tuple(row.flatten().tolist()) for row in getattr(everything, kind) * 2**0.5}
        found = [tuple(row.flatten().tolist()) for row in getattr(some, kind)]
        near = [
            min(max(abs(a - b) for a, b in zip(row, other, strict=True)) for other in rows)
            for row in found
        ]
        assert max(near) < 1e-12


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_samples_are_unbiased(by_sample: bool, padded: bool) -> None:
    """The mean over seeds of all second moments is that of the whole batch."""
    model, x = Tokens(), tokens(6, 4)
    mask = None
    if padded:
        mask = torch.ones(6, 4, dtype=torch.long)
        mask[0, 1:] = mask[3, 2:] = mask[5, 3:] = 0
    everything = seen(model, [x], [mask], by_sample=by_sample)
    found = [
        seen(model, [x], [mask], by_sample=by_sample, max_columns=12, seed=seed)
        for seed in range(SEEDS)
    ]
    for what in (product, lambda c: gram(c.inputs), lambda c: gram(c.outputs)):
        values = torch.stack([what(captured) for captured in found])
        error = (values.mean(0) - what(everything)) / (values.std(0) / SEEDS**0.5 + 1e-12)
        assert error.abs().max() < 5, "five standard errors"


@pytest.mark.parametrize("by_sample", [False, True])
def test_padded_samples_do_not_count(by_sample: bool) -> None:
    """Two samples of padding alone: the kept ones are all there is, and they make the gradient."""
    model, x = Tokens(), tokens(4, 3)
    mask = torch.ones(4, 3, dtype=torch.long)
    mask[1] = mask[2] = 0
    found = seen(model, [x], [mask], by_sample=by_sample, max_columns=6)
    model.zero_grad()
    model(x, attention_mask=mask).sum().backward()
    assert_close(product(found), model.layer.weight.grad)


def test_padding_is_dropped_first() -> None:
    model, x = Tokens(), tokens(4, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
    for seed in range(5):
        found = seen(model, [x], [mask], max_columns=7, seed=seed)
        assert found.valid.count_nonzero() == 7
        assert_close(product(found), model.layer.weight.grad)
        model.zero_grad()


@pytest.mark.parametrize("by_sample", [False, True])
def test_memory_is_bounded(by_sample: bool) -> None:
    model = Tokens()
    layers: dict[str, nn.Module] = {"layer.weight": model.layer}
    io = LayerIO(model, layers, dtype=torch.float64, max_columns=10, by_sample=by_sample)
    io.arm({"layer.weight": 1})
    for _ in range(4):
        model(tokens(5, 3)).sum().backward()
        found = io.take()["layer.weight"]
        assert found.inputs.shape[0] * found.inputs.shape[1] <= 10


@pytest.mark.parametrize("lengths", [(6, 3), (3, 6)])
def test_whole_samples_are_bounded_whatever_their_lengths(lengths: tuple[int, int]) -> None:
    """Micro-batches of other lengths: SENG's state has room for ``max_columns`` positions."""
    model = Tokens()
    batches = [tokens(4, length) for length in lengths]
    found = seen(model, batches, by_sample=True, max_columns=12)
    assert found.inputs.shape[0] * found.inputs.shape[1] <= 12


def test_samples_of_other_lengths_are_padded() -> None:
    model = Tokens()
    batches = [tokens(2, 3), tokens(2, 5), tokens(1, 4)]
    found = seen(model, batches, by_sample=True)
    assert found.inputs.shape == (5, 5, 4)
    assert found.valid.count_nonzero() == 2 * 3 + 2 * 5 + 4
    assert found.complete
    assert_close(product(found), model.layer.weight.grad)


def test_whole_samples_are_kept() -> None:
    """Each kept sample's share of the gradient is that of one sample of the batch."""
    model, x = Tokens(), tokens(6, 4)
    everything = seen(model, [x], by_sample=True)
    some = seen(model, [x], by_sample=True, max_columns=11)
    assert some.inputs.shape[:2] == (2, 4)

    def gradients(captured: Captured) -> Tensor:
        return torch.einsum("nsm,nsb->nmb", captured.outputs, captured.inputs)

    for gradient in gradients(some) / 3:
        distances = (gradients(everything) - gradient).abs().amax((1, 2))
        assert distances.min() < 1e-12


def test_one_sample_is_kept_where_none_fits() -> None:
    found = seen(Tokens(), [tokens(4, 6)], by_sample=True, max_columns=5)
    assert found.inputs.shape[:2] == (1, 6)
