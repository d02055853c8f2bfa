"""The tagger's model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_ext import explain_groups
from trainer_ext.data.tagger import (
    TaggerConfig,
    TaggerForTokenClassification,
    sinusoids,
    tagger_preset_config,
)

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def tagger(**changes: object) -> TaggerForTokenClassification:
    torch.manual_seed(0)
    options = {**SIZES, "num_attention_heads": 2, "vocab_size": 12, "num_labels": 5, **changes}
    return TaggerForTokenClassification(TaggerConfig(**options)).eval()


def test_the_paper_s_model_has_its_number_of_weights() -> None:
    config = tagger_preset_config("paper")
    config.num_labels = 851
    with torch.device("meta"):
        model = TaggerForTokenClassification(config)
    beside = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    assert round(beside / 1e6, 2) == 19.34


def test_forward_is_the_written_out_formula() -> None:
    model = tagger().double()
    ids = torch.tensor([[2, 5, 7, 1]])
    hidden = model.embedding.weight[ids[0]] + sinusoids(4, 16, like=model.embedding.weight)

    def norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-6).sqrt() * layer.weight + layer.bias

    for layer in model.layers:
        x = norm(layer.attention_norm, hidden)
        attention, mixed = layer.attention, []
        for head in range(2):
            rows = slice(8 * head, 8 * head + 8)
            q, k, v = (
                x @ kernel.weight[rows].T
                for kernel in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed.append((q @ k.T / math.sqrt(8)).softmax(-1) @ v)
        hidden = hidden + torch.cat(mixed, -1) @ attention.out_proj.weight.T
        x = norm(layer.mlp_norm, hidden) @ layer.up_proj.weight.T + layer.up_proj.bias
        x = torch.where(x > 0, x, x.exp() - 1)
        hidden = hidden + x @ layer.down_proj.weight.T + layer.down_proj.bias
    logits = norm(model.norm, hidden) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(ids).logits[0], logits, rtol=1e-10, atol=1e-10)


def test_positions_are_sines_and_cosines() -> None:
    waves = sinusoids(8, 6, like=torch.empty(0, dtype=torch.float64))
    assert waves.shape == (8, 6)
    assert waves[3, 2].item() == pytest.approx(math.sin(3 / 10_000 ** (2 / 6)), abs=1e-6)
    assert waves[3, 3].item() == pytest.approx(math.cos(3 / 10_000 ** (2 / 6)), abs=1e-6)


@pytest.mark.parametrize("masked", [True, False])
def test_padding_counts_only_where_it_is_attended_to(masked: bool) -> None:
    model = tagger(mask_padding=masked)
    alone = model(torch.tensor([[2, 5, 7]])).logits
    padded = model(
        torch.tensor([[2, 5, 7, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
    ).logits[:, :3]
    assert torch.allclose(alone, padded, atol=1e-6) == masked


def test_loss_is_a_mean_over_what_counts() -> None:
    model = tagger()
    ids, labels = torch.tensor([[2, 5, 7, 0]]), torch.tensor([[2, 1, 4, -100]])
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[0, :3], labels[0, :3])
    torch.testing.assert_close(output.loss, expected)
    shared = model(ids, labels=labels, num_items_in_batch=6).loss
    torch.testing.assert_close(shared, expected * 3 / 6)


def test_heads_are_found() -> None:
    rows = {row.parameter: row for row in explain_groups(tagger(), "shared_basis_adam", rank=2)}
    for name in ("q_proj", "k_proj", "v_proj"):
        assert rows[f"layers.1.attention.{name}.weight"].view == "2 x [8, 16]"
    assert "embedding" in rows["embedding.weight"].reason


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size=16 is no multiple of num_attention_heads=3"):
        tagger(num_attention_heads=3)
    with pytest.raises(ValueError, match="9 tokens are more than max_position_embeddings=8"):
        tagger(max_position_embeddings=8)(torch.zeros(1, 9, dtype=torch.long))
