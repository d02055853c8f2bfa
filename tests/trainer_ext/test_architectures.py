"""Every architecture trains through the stock Trainer with one of our optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests.trainer_ext.models import CASES, Case
from tests.trainer_ext.tiny import arguments
from trainer_ext.callbacks import our_optimizer


def sample(case: Case) -> dict[str, Any]:
    """One training sample of the case's kind, without a batch dimension."""
    inputs = {name: tensor[0] for name, tensor in case.inputs().items()}
    if "decoder_input_ids" in inputs:
        labels = inputs["decoder_input_ids"]
    else:
        labels = inputs.get("input_ids", torch.tensor(1))
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trains_through_the_trainer(case: Case, tmp_path: Path) -> None:
    model = case.build()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    args = arguments(
        tmp_path, max_steps=2, save_strategy="no", optim_args="rank=4,start_step=1", warmup_steps=0
    )
    trainer = Trainer(model, args, train_dataset=[sample(case)] * 8)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    optimizer = our_optimizer(trainer.optimizer)
    assert optimizer is not None
    preconditioned = {
        name
        for group in optimizer.param_groups
        for name, views in zip(group["param_names"], group["views"], strict=True)
        if views
    }
    assert preconditioned >= {name for name, views in case.views.items() if views}
    after = dict(model.named_parameters())
    assert all(param.isfinite().all() for param in after.values())
    touched = {name for name in preconditioned if optimizer.state[after[name]]["step"] == 2}
    assert touched
    assert any(not torch.equal(after[name], before[name]) for name in touched)
