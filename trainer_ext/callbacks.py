"""What the Trainer shows of the optimizer: the plan at the start, health figures in the logs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_precond.optim.optimizer import PreconditionedOptimizer
from hf_precond.preconditioners.base import layer_needs
from trainer_ext.build import plan_line
from trainer_ext.log import get_logger
from trainer_ext.served import served_names

logger = get_logger(__name__)

HEALTH_PREFIX = "optim_"

FOR_EVERY_TRAINER: list[Callable[[], TrainerCallback]] = []
"""Makes callbacks that a Trainer gets when it begins to train, in scripts that know nothing of
them."""


class OptimizerInUseCallback(TrainerCallback):
    """Shows the plan when training begins; refuses another optimizer than was asked for.

    Also tells the optimizer how long an epoch is, for schedules by epoch, and what scales the loss,
    for what layers have seen.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises RuntimeError if ``args.optim`` names one of ours and another one is in use."""
        inner = unwrap(kwargs.get("optimizer"))
        ours = isinstance(inner, PreconditionedOptimizer)
        in_use = inner.algorithm_name if ours else type(inner).__name__
        if args.optim in served_names() and args.optim != in_use:
            name = str(getattr(args.optim, "value", args.optim))
            raise RuntimeError(
                f"optim={name!r} was asked for, but the optimizer in use is {in_use}"
            )
        if ours:
            set_steps_per_epoch(inner, args, kwargs.get("train_dataloader"))
            inner.grad_scaler = getattr(kwargs["optimizer"], "scaler", None)
            if args.torch_compile and layer_needs(inner.recipe.algorithm) is not None:
                logger.warning(
                    "%s hooks the model's layers: torch_compile breaks its graphs there and "
                    "compiles again on steps that capture",
                    in_use,
                )
            inner.health()  # starts the first logging interval here
            if state.is_world_process_zero:
                logger.info(plan_line(inner))


def set_steps_per_epoch(
    optimizer: PreconditionedOptimizer, args: TrainingArguments, dataloader: Any
) -> None:
    """Takes the length of an epoch from the data, unless an option has said it or it has none."""
    try:
        batches = len(dataloader)
    except TypeError:
        return
    if optimizer.recipe.schedules.steps_per_epoch is None and batches:
        optimizer.steps_per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))


def unwrap(optimizer: Any) -> Any:
    """Returns the optimizer inside wrappers such as Accelerate's."""
    while not isinstance(optimizer, PreconditionedOptimizer):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer


def our_optimizer(optimizer: Any) -> PreconditionedOptimizer | None:
    """Returns the unwrapped optimizer if it is one of ours."""
    inner = unwrap(optimizer)
    return inner if isinstance(inner, PreconditionedOptimizer) else None


def health_logs(optimizer: PreconditionedOptimizer) -> dict[str, float]:
    """Returns the health figures since the last call, under the names they have in the logs."""
    return {f"{HEALTH_PREFIX}{name}": float(value) for name, value in optimizer.health().items()}
