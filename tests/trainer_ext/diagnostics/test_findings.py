"""From figures to advice."""

from __future__ import annotations

from dataclasses import replace

import torch

from trainer_ext.diagnostics.collect import KernelSamples
from trainer_ext.diagnostics.findings import Window, advise, look_at


def window_of(gradients: list[torch.Tensor], heads: list[torch.Tensor] | None = None) -> Window:
    """A look at one kernel with these gradients ``[1, O, I]`` (and ``[G, M, B]``)."""
    _, out, size = gradients[0].shape
    samples = KernelSamples(
        name="kernel",
        shape=(1, out, size),
        head_shape=None if heads is None else tuple(heads[0].shape),
        blocks=gradients,
        heads=heads or [],
    )
    findings, pictures = look_at(samples, rank=4, picture=8)
    return Window(
        first=1,
        steps=len(gradients),
        skipped=0,
        rank=4,
        kernels=[findings],
        pictures={"kernel": pictures},
    )


def low_rank(rank: int, out: int = 16, size: int = 32, steps: int = 24, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, rank, generator=generator))[0]
    return [torch.randn(1, out, rank, generator=generator) @ basis.mT for _ in range(steps)]


def test_the_rank_is_that_of_the_gradients() -> None:
    assert advise(window_of(low_rank(3))).rank == 4
    assert advise(window_of(low_rank(8))).rank == 8
    assert advise(window_of(low_rank(16))).rank == 16
    # Full rank: no small basis is enough.
    assert advise(window_of(low_rank(32))).rank == 32


def test_kernels_that_need_very_different_ranks_are_told_apart() -> None:
    one, other = window_of(low_rank(2)), window_of(low_rank(16))
    alike = replace(one, kernels=[*one.kernels, *one.kernels])
    apart = replace(one, kernels=[*one.kernels, *other.kernels])
    assert not any("rank=auto" in text for text in advise(alike).sentences)
    (sentence,) = (text for text in advise(apart).sentences if "rank=auto" in text)
    assert "from 2 to 16 columns" in sentence


def test_heads_in_subspaces_of_their_own_want_bases_of_their_own() -> None:
    parts = [low_rank(4, out=8, seed=seed) for seed in range(4)]
    heads = [torch.cat(step) for step in zip(*parts, strict=True)]
    kernel = [step.flatten(0, 1)[None] for step in heads]
    advice = advise(window_of(kernel, heads))
    assert advice.rank == 16  # of the kernel: four subspaces of four dimensions
    apart = advise(window_of([step[:1] for step in heads], heads))
    assert apart.rank == 4
    assert apart.grouping == "head"
    assert apart.optim_args == "rank=4,attention_grouping=head"


def test_heads_in_one_subspace_share_a_basis() -> None:
    together = low_rank(4, out=32)
    heads = [step.view(4, 8, 32) for step in together]
    advice = advise(window_of(together, heads))
    assert (advice.rank, advice.grouping) == (4, "kernel")


def test_without_heads_there_is_no_word_of_them() -> None:
    advice = advise(window_of(low_rank(2)))
    assert advice.grouping is None
    assert advice.optim_args == "rank=2"
    assert not any("head" in sentence for sentence in advice.sentences)


def test_blocks_by_outputs_are_told_from_blocks_by_inputs() -> None:
    """Each output neuron has a sign of its own per step: blocks by outputs and nothing outside."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(32, generator=generator)
    by_outputs = [torch.randn(1, 16, 1, generator=generator) * row for _ in range(30)]
    (sentence,) = (text for text in advise(window_of(by_outputs)).sentences if "clearer by" in text)
    assert "clearer by outputs" in sentence
    column = torch.randn(16, 1, generator=generator)
    by_inputs = [column * torch.randn(1, 1, 32, generator=generator) for _ in range(30)]
    (sentence,) = (text for text in advise(window_of(by_inputs)).sentences if "clearer by" in text)
    assert "clearer by inputs" in sentence
