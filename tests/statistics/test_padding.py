"""Positions that are padding are no part of the statistics; one column per position or sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2LMHeadModel

from hf_precond.statistics.captured import Captured
from tests.reference.layers import LayerRecord
from tests.statistics.capturing import NO_DROPOUT, assert_close, capture, gram, product, tiny_gpt2

IGNORED = -100


class Tokens(nn.Module):
    """Two layers over positions; the first one's outputs are mixed over positions if asked."""

    def __init__(self, *, mixing: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.mixing = mixing
        self.double()

    def forward(self, x: Tensor, counted: Tensor, **arguments: Any) -> Tensor:
        """Loss over the counted positions."""
        hidden = self.first(x).tanh()
        if self.mixing:
            hidden = hidden + hidden.mean(1, keepdim=True)
        return (self.second(hidden).square() * counted.unsqueeze(-1)).sum()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 4, dtype=torch.float64)


@pytest.fixture
def mask() -> Tensor:
    return torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])


def labels_of(mask: Tensor) -> Tensor:
    return torch.where(mask == 1, 7, IGNORED)


def seen(model: nn.Module, x: Tensor, counted: Tensor, **options: Any) -> dict[str, Captured]:
    arguments = {key: options.pop(key) for key in list(options) if key.endswith(("mask", "labels"))}
    return capture(model, [lambda: model(x=x, counted=counted, **arguments)], **options)


def valid_of(captured: Captured, shape: tuple[int, int]) -> Tensor:
    return (captured.valid != 0).view(shape)


@pytest.mark.parametrize("told_by", ["attention_mask", "bool_mask", "labels", "both"])
def test_padding_is_left_out(x: Tensor, mask: Tensor, told_by: str) -> None:
    model = Tokens()
    arguments: dict[str, dict[str, Tensor]] = {
        "attention_mask": {"attention_mask": mask},
        "bool_mask": {"attention_mask": mask.bool()},
        "labels": {"labels": labels_of(mask)},
        "both": {"attention_mask": mask, "labels": labels_of(mask)},
    }
    found = seen(model, x, mask, **arguments[told_by])
    for name, item in found.items():
        assert torch.equal(valid_of(item, (3, 4)), mask == 1)
        assert int(item.total) == 9, "T counts the valid positions"
        assert item.inputs[mask.flatten() == 0].eq(0).all()
        assert item.outputs[mask.flatten() == 0].eq(0).all()
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert_close(product(item), gradient)
    # The same as of the valid positions alone.
    rows = x[mask == 1].unsqueeze(1)
    alone = seen(model, rows, torch.ones(9, 1))
    for name, item in alone.items():
        assert_close(gram(found[name].inputs), gram(item.inputs))
        assert_close(gram(found[name].outputs), gram(item.outputs))


def test_a_mask_that_marks_more_than_another(x: Tensor, mask: Tensor) -> None:
    """What either calls padding and has no gradient is left out."""
    labels = labels_of(mask)
    labels[0, 0] = IGNORED
    counted = (labels != IGNORED).long()
    found = seen(Tokens(), x, counted, attention_mask=mask, labels=labels)
    for item in found.values():
        assert torch.equal(valid_of(item, (3, 4)), counted == 1)
        assert int(item.total) == 8


def test_positions_with_a_gradient_stay(x: Tensor, mask: Tensor) -> None:
    """Masked language models ignore most labels, and their losses reach all positions."""
    model = Tokens(mixing=True)
    found = seen(model, x, mask, labels=labels_of(mask))
    assert valid_of(found["first.weight"], (3, 4)).all()
    assert int(found["first.weight"].total) == 12
    assert torch.equal(valid_of(found["second.weight"], (3, 4)), mask == 1)
    assert int(found["second.weight"].total) == 9
    for name, item in found.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert_close(product(item), gradient)


def test_a_zero_gradient_alone_is_no_padding(x: Tensor, mask: Tensor) -> None:
    """A dead neuron is not padding, and nobody has said that these positions are."""
    found = seen(Tokens(), x, mask)
    for item in found.values():
        assert valid_of(item, (3, 4)).all()
        assert int(item.total) == 12
    found = seen(Tokens(), x, mask, attention_mask=torch.ones(3, 4))
    assert all(int(item.total) == 12 for item in found.values())


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.zeros(3, 5)},
        {"attention_mask": torch.zeros(3, 1, 4, 4)},
        {"attention_mask": torch.zeros(2, 4)},
        {"labels": torch.full((3,), IGNORED)},
        {"labels": torch.full((3, 4), float(IGNORED))},
        {"labels": None, "attention_mask": None},
    ],
)
def test_masks_of_other_shapes_are_ignored(
    x: Tensor, mask: Tensor, arguments: dict[str, Any]
) -> None:
    for item in seen(Tokens(), x, mask, **arguments).values():
        assert int(item.total) == 12


class EncoderDecoder(nn.Module):
    """Two stacks of positions of other lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(4, 3)
        self.double()

    def forward(
        self, x: Tensor, y: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        inside = self.encoder(x).sin() * attention_mask.unsqueeze(-1)
        outside = self.decoder(y).sin() * decoder_attention_mask.unsqueeze(-1)
        return inside.sum() + outside.sum()


def test_encoder_and_decoder_have_each_their_mask() -> None:
    model = EncoderDecoder()
    x, y = torch.randn(2, 4, 4).double(), torch.randn(2, 3, 4).double()
    masks = {
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    }
    found = capture(model, [lambda: model(x=x, y=y, **masks)])
    assert int(found["encoder.weight"].total) == 5
    assert int(found["decoder.weight"].total) == 3


def test_masks_of_each_micro_batch(x: Tensor, mask: Tensor) -> None:
    model = Tokens()
    pairs = list(zip(x.split(1), mask.split(1), strict=True))
    found = capture(
        model,
        [lambda x=x, m=m: model(x=x, counted=m, attention_mask=m) for x, m in pairs],
    )
    whole = seen(model, x, mask, attention_mask=mask)
    for name, item in whole.items():
        assert int(found[name].total) == 9
        assert_close(found[name].inputs, item.inputs)
        assert_close(found[name].outputs, item.outputs)


def test_nothing_but_padding(x: Tensor) -> None:
    none = torch.zeros(3, 4, dtype=torch.long)
    for item in seen(Tokens(), x, none, attention_mask=none).values():
        assert item.inputs.eq(0).all()
        assert item.outputs.eq(0).all()


# -- one column per position, or per sample --


def records(model: Tokens, x: Tensor, counted: Tensor) -> dict[str, LayerRecord]:
    """Inputs and output gradients by hand, with the input of the bias."""
    ones = torch.ones(*x.shape[:2], 1, dtype=x.dtype)
    first = model.first(x)
    second = model.second(first.tanh())
    first.retain_grad()
    second.retain_grad()
    loss = (second.square() * counted.unsqueeze(-1)).sum()
    gradients = torch.autograd.grad(loss, [first, second])
    return {
        "first.weight": LayerRecord(
            module=model.first, inputs=torch.cat([x, ones], -1), outputs=gradients[0]
        ),
        "second.weight": LayerRecord(
            module=model.second,
            inputs=torch.cat([first.tanh().detach(), ones], -1),
            outputs=gradients[1],
        ),
    }


@pytest.mark.parametrize("padded", [False, True])
def test_expand_and_reduce(x: Tensor, mask: Tensor, padded: bool) -> None:
    mask = mask if padded else torch.ones_like(mask)
    model = Tokens()
    expected = records(model, x, mask)
    arguments = {"attention_mask": mask} if padded else {}
    expand = seen(model, x, mask, by_sample=True, **arguments)
    reduce = seen(model, x, mask, reduce=True, **arguments)
    for name, record in expected.items():
        for found, columns in (
            (expand[name], record.columns(mask == 1)),
            (reduce[name], record.reduced_columns(mask == 1)),
        ):
            inputs = torch.cat([found.inputs, found.valid.unsqueeze(-1)], -1)
            assert_close(inputs, columns.inputs)
            assert_close(found.outputs, columns.outputs)
        assert int(reduce[name].total) == 3


def test_reduce_leaves_padded_samples_out(x: Tensor) -> None:
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[1] = 0
    model = Tokens()
    found = seen(model, x, mask, reduce=True, attention_mask=mask)
    alone = seen(model, x[[0, 2]], mask[[0, 2]], reduce=True)
    for name, item in alone.items():
        assert int(found[name].total) == 2
        assert found[name].valid[1].eq(0).all()
        assert_close(gram(found[name].inputs), gram(item.inputs))
        assert_close(gram(found[name].outputs), gram(item.outputs))


def test_reduce_of_single_positions_is_expand() -> None:
    x, counted = torch.randn(5, 1, 4, dtype=torch.float64), torch.ones(5, 1)
    model = Tokens()
    for name, item in seen(model, x, counted, reduce=True).items():
        other = seen(model, x, counted)[name]
        assert_close(item.inputs, other.inputs)
        assert_close(item.outputs, other.outputs)
        assert item.complete


def test_reduced_columns_do_not_make_the_gradient(x: Tensor) -> None:
    """Algorithms that take the columns for the gradient must be told that these are not it."""
    model = Tokens()
    found = seen(model, x, torch.ones(3, 4), reduce=True)
    for name, item in found.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert (product(item) - gradient).abs().max() > 1e-3 * gradient.abs().max()
        assert not item.complete


# -- real models --


def gpt2() -> GPT2LMHeadModel:
    model = tiny_gpt2(n_layer=2, **NO_DROPOUT, attn_implementation="eager").double()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0.0, 0.3)
    return model


def next_tokens(model: nn.Module, ids: Tensor, targets: Tensor, total: int, **rest: Any) -> Tensor:
    """Sum of losses over a number of targets; the model's own loss is in float32."""
    logits = model(input_ids=ids, use_cache=False, **rest).logits[:, :-1].flatten(0, 1)
    targets = targets[:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / total


@pytest.mark.parametrize("told_by", ["attention_mask", "labels"])
def test_padded_gpt2_has_the_statistics_of_its_sequences(told_by: str) -> None:
    model, lengths = gpt2(), [5, 2, 4]
    ids = torch.randint(11, (3, 5))
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask == 1, ids, IGNORED)
    total = sum(lengths) - 3

    # The model would compute its own loss of labels, in float32.
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, labels: Tensor | None = None, **rest: Any) -> Any:
            return self.inner(**rest)

    told = Told().train()
    arguments = {"attention_mask": mask} if told_by == "attention_mask" else {"labels": labels}
    padded = capture(told, [lambda: next_tokens(told, ids, labels, total, **arguments)])
    single = capture(
        told,
        [
            lambda row=row, n=n: next_tokens(told, row[None, :n], row[None, :n], total)
            for row, n in zip(ids, lengths, strict=True)
        ],
    )
    for name, item in single.items():
        assert int(padded[name].total) == sum(lengths), name
        assert_close(gram(padded[name].inputs), gram(item.inputs), 1e-10)
        assert_close(gram(padded[name].outputs), gram(item.outputs), 1e-10)
        assert_close(product(padded[name]), product(item), 1e-10)


def test_masked_language_model_counts_all_tokens() -> None:
    """Labels of -100 are tokens that are not asked for: all but padding stay in the statistics."""
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        vocab_size=13,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config).train()
    ids = torch.randint(13, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = torch.full_like(ids, IGNORED)
    labels[0, 2] = labels[1, 1] = 3
    found = capture(model, [lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss])
    totals = {name: int(item.total) for name, item in found.items()}
    first = "bert.encoder.layer.0"
    assert totals[f"{first}.attention.self.key.weight"] == 10
    assert totals[f"{first}.intermediate.dense.weight"] == 10
    # After the last attention only the asked-for positions have a gradient.
    assert totals["bert.encoder.layer.1.output.dense.weight"] == 2
    assert totals["cls.predictions.transform.dense.weight"] == 2
