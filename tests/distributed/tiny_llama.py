"""A tiny LLaMA with grouped queries, an odd head, and batches that any number of ranks can share.

The sizes are chosen for sharding: heads of 6 rows cut by the shard borders of four ranks, widths
that four ranks do not divide, and a head of three rows, of which the fourth rank has none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, VALUES, WIDTH = 50, 3, 24
# Twelve: shares of equal size for one, two, three and four ranks.
SAMPLES, LENGTH = 12, 5

Batch = tuple[Tensor, Tensor]
"""Tokens ``[N, T]`` and three values for each sample, ``[N, 3]``."""


class TinyLlama(LlamaForCausalLM):
    """Two layers, and ``scores``: three values for a sample.

    Not the scores of three classes: their gradients add up to zero, and a method whose basis has
    three vectors would find the third in rounding.

    Args:
        dtype: of the weights, the same random numbers in each of them.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(_config())
            self.scores = nn.Linear(WIDTH, VALUES)
        _use_plain_norms(self)
        self.to(dtype)

    def forward(self, tokens: Tensor, values: Tensor, leave_out: bool = False) -> Tensor:
        """Loss of a batch: the mean over its samples.

        Args:
            leave_out: whether ``scores`` takes no part.
        """
        hidden = self.model(input_ids=tokens).last_hidden_state
        logits = self.lm_head(hidden[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
        if leave_out:
            return loss
        return loss + F.mse_loss(self.scores(hidden[:, -1]), values.to(hidden.dtype))


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        # Weights that are large for their layers: no head is idle, no gradient near zero.
        initializer_range=0.3,
        use_cache=False,
        attn_implementation="sdpa",
    )


def _use_plain_norms(model: nn.Module) -> None:
    """LlamaRMSNorm computes in float32 in any model, and 1e-10 could not be asked of the rest."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, nn.RMSNorm(WIDTH, eps=1e-6))


def batch(step: int) -> Batch:
    """The whole batch of a step."""
    rng = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=rng)
    return tokens, torch.randn(SAMPLES, VALUES, generator=rng, dtype=torch.float64)


def share(step: int, rank: int, world: int) -> Batch:
    """What one of several ranks has of it; the mean of their losses is the loss of the whole."""
    tokens, values = batch(step)
    return tokens.chunk(world)[rank], values.chunk(world)[rank]
