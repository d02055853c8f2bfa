"""The times and the memory that a run reports of itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from tests.trainer_ext.tiny import arguments, same_weights, tiny_gpt2, token_blocks, trainer
from trainer_ext.step_times import ELAPSED, StepTimesCallback, optimizer_state_bytes

PAUSE_S = 0.03


class SlowModel(nn.Module):
    """A language model whose forward pass, or backward pass, pauses."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.inner = tiny_gpt2()
        self.config = self.inner.config
        self.forward_s = forward_s
        if backward_s:
            self.inner.transformer.ln_f.weight.register_hook(lambda _: time.sleep(backward_s))

    def forward(self, **batch: Any) -> Any:
        time.sleep(self.forward_s)
        return self.inner(**batch)


def slow_optimizer(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: time.sleep(PAUSE_S))
    return optimizer


@pytest.mark.parametrize("slow", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_pause_is_found_where_it_is(slow: str, batches: int, tmp_path: Path) -> None:
    pauses = {part: PAUSE_S * (part == slow) for part in ("forward", "backward")}
    model = SlowModel(pauses["forward"], pauses["backward"])
    run = trainer(
        tmp_path,
        model,
        optim="sgd",
        optim_args=None,
        save_strategy="no",
        gradient_accumulation_steps=batches,
        remove_unused_columns=False,
    )
    if slow == "optimizer":
        run.optimizer = slow_optimizer(model.parameters())
    times = StepTimesCallback()
    run.add_callback(times)
    run.train()
    parts = {part: times.figures[f"{part}_ms"] for part in ("forward", "backward", "optimizer")}
    least = 1e3 * PAUSE_S * (1 if slow == "optimizer" else batches)
    assert parts[slow] >= least
    assert max(parts, key=parts.__getitem__) == slow
    assert times.figures["step_ms"] >= parts[slow]


def test_seconds_so_far_are_in_the_history_and_leave_evaluations_out(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="no", eval_strategy="steps", eval_steps=2)
    run = Trainer(tiny_gpt2(), args, train_dataset=token_blocks(), eval_dataset=token_blocks())

    def slow_evaluation(*_: Any, **__: Any) -> dict[str, float]:
        time.sleep(0.5)
        run.log({"eval_loss": 1.0})
        return {"eval_loss": 1.0}

    run.evaluate = slow_evaluation
    run.add_callback(StepTimesCallback())
    run.train()
    seconds = {entry["step"]: entry[ELAPSED] for entry in run.state.log_history}
    assert list(seconds) == [2, 4, 6]
    assert 0 < seconds[2] < seconds[4] < seconds[6]
    assert seconds[6] - seconds[4] < 0.5


class FailsOnce(SlowModel):
    """A model whose first pass finds no memory for its batch."""

    failed = False

    def forward(self, **batch: Any) -> Any:
        if not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(**batch)


def test_a_training_that_begins_again_is_measured_once(tmp_path: Path) -> None:
    model = FailsOnce(PAUSE_S, 0.0)
    changes = {"optim": "sgd", "optim_args": None, "save_strategy": "no", "max_steps": 3}
    run = trainer(
        tmp_path, model, **changes, remove_unused_columns=False, auto_find_batch_size=True
    )
    times = StepTimesCallback()
    run.add_callback(times)
    run.train()
    assert times.figures["forward_ms"] <= times.figures["step_ms"]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_measuring_changes_nothing_and_leaves_no_hook(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain")
    plain.train()
    watched = trainer(tmp_path / "watched")
    watched.add_callback(StepTimesCallback())
    watched.train()
    assert same_weights(plain.model, watched.model)
    assert not watched.model._forward_hooks
    assert not watched.model._forward_pre_hooks


@pytest.mark.parametrize(
    ("optim", "per_weight"), [("adamw_torch", 8), ("shared_basis_adagrad", None)]
)
def test_state_is_counted(optim: str, per_weight: int | None, tmp_path: Path) -> None:
    changes = {"optim": optim, "save_strategy": "no"}
    run = trainer(tmp_path, **changes, **({"optim_args": None} if per_weight else {}))
    times = StepTimesCallback()
    run.add_callback(times)
    run.train()
    counted = times.figures["optimizer_state_bytes"]
    assert counted == optimizer_state_bytes(run.optimizer)
    weights = sum(param.numel() for param in run.model.parameters())
    if per_weight is not None:
        assert counted == per_weight * weights
    else:
        tensors = [t for _, key, t in run.optimizer.optimizer.state_layout() if key != "step"]
        assert counted == sum(t.numel() * t.element_size() for t in tensors)
    assert times.figures["peak_memory_bytes"] > counted
