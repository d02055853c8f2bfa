"""Batches without a label in the Trainer.

Torch's cross entropy gives them a loss of NaN and gradients of zero, and the Trainer, which sums
over labels and takes none for one, a loss of zero: either is a step like any other. A mean that a
script takes by itself is 0/0 all the way back: that step is left out and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import SequentialSampler
from transformers import Trainer

import trainer_ext
from hf_precond import list_optimizers
from tests.trainer_ext.tiny import NAME, arguments, same_weights, tiny_gpt2, token_blocks
from trainer_ext.callbacks import our_optimizer

IGNORED = -100
BATCH = 4
STEPS = 4


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Whatever ran before, the optimizers are registered."""
    trainer_ext.register()
    yield
    trainer_ext.register()


def blocks_without_labels(batches: set[int]) -> list[dict[str, torch.Tensor]]:
    """Token blocks of which some batches, counted from 0, have no label."""
    return [
        {**block, "labels": torch.full_like(block["labels"], IGNORED)}
        if index // BATCH in batches
        else block
        for index, block in enumerate(token_blocks())
    ]


def masked_mean(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of a script of its own: summed over labels, over their number."""
    targets = labels[:, 1:].flatten()
    losses = F.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), targets.clamp(min=0), reduction="none"
    )
    labelled = targets != IGNORED
    return (losses * labelled).sum() / labelled.sum()


def trainer_over(
    folder: Path, blocks: list[dict[str, torch.Tensor]], loss: str, **changes: Any
) -> Trainer:
    """A few steps over the blocks in their order, logged at every step.

    Args:
        loss: ``"sum"`` over labels as the Trainer has it, ``"mean"`` as the model alone does, or
            ``"own"``, that of a script.
    """
    args = arguments(
        folder, **{"max_steps": STEPS, "logging_steps": 1, **changes}, save_strategy="no"
    )
    own = masked_mean if loss == "own" else None
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    run = Trainer(model, args, train_dataset=blocks, compute_loss_func=own)
    run._get_train_sampler = lambda *_: SequentialSampler(blocks)
    run.model_accepts_loss_kwargs = loss == "sum"
    return run


def train(folder: Path, batches: set[int], loss: str = "own", **changes: Any) -> Trainer:
    """Trains over blocks of which some batches have no label."""
    run = trainer_over(folder, blocks_without_labels(batches), loss, **changes)
    run.train()
    return run


def figures(run: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.mark.parametrize("optim", list_optimizers())
def test_a_mean_over_no_labels_of_a_scripts_own_is_left_out_and_counted(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_precond"):
        run = train(tmp_path, {2}, optim=optim, optim_args=None)
    count = len(our_optimizer(run.optimizer).param_names)
    assert figures(run, "optim_skipped_nonfinite") == [0, 0, count, 0]
    assert "transformer.h.0.attn.c_attn.weight: gradient is not finite" in caplog.text
    assert run.state.global_step == STEPS
    assert all(param.isfinite().all() for param in run.model.parameters())


@pytest.mark.parametrize(
    ("optim", "loss"), [*((name, "sum") for name in list_optimizers()), (NAME, "mean")]
)
def test_torchs_loss_of_no_labels_is_a_step_without_a_gradient(
    optim: str, loss: str, tmp_path: Path
) -> None:
    run = train(tmp_path, {0, 2}, loss, optim=optim, optim_args=None)
    assert [norm == 0 for norm in figures(run, "grad_norm")] == [True, False, True, False]
    assert figures(run, "optim_skipped_nonfinite") == [0] * STEPS
    assert figures(run, "optim_failed_updates") == [0] * STEPS
    assert all(param.isfinite().all() for param in run.model.parameters())


def test_the_step_left_out_changes_no_weight(tmp_path: Path) -> None:
    """The steps with it equal those without, bit for bit."""
    changes = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    with_gap = train(tmp_path / "gap", {2}, **changes)
    others = [block for index, block in enumerate(token_blocks()) if index // BATCH != 2]
    without = trainer_over(tmp_path / "others", others, "own", max_steps=STEPS - 1, **changes)
    without.train()
    assert same_weights(with_gap.model, without.model)


@pytest.mark.parametrize("loss", ["sum", "mean", "own"])
def test_a_part_of_an_accumulated_batch_without_labels(loss: str, tmp_path: Path) -> None:
    """Torch's losses take in the part that has labels; the script's step is left out as a whole."""
    run = train(tmp_path, {1, 2}, loss, gradient_accumulation_steps=2, max_steps=4)
    left_out = [count > 0 for count in figures(run, "optim_skipped_nonfinite")]
    assert left_out == [loss == "own"] * 2 + [False] * 2
    assert all(param.isfinite().all() for param in run.model.parameters())


def test_no_labels_at_all_end_in_an_error_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"'transformer\.wte\.weight'.*3 in a row"):
        train(tmp_path, set(range(8)), optim_args="rank=4,max_failures=3")
