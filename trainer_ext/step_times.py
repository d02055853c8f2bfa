"""Where the time and the memory of a training run go: forward, backward, optimizer, the rest."""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer_ext.callbacks import our_optimizer, unwrap
from trainer_ext.timing import Mark, mark, milliseconds

ELAPSED = "train_elapsed_s"
"""Key in the log history: seconds spent in training steps so far, without evaluation and saving."""
_FORWARD, _TO_STEP, _OPTIMIZER, _WHOLE = "forward", "to_step", "optimizer", "whole"


class StepTimesCallback(TrainerCallback):
    """Measures every step of a Trainer run without holding it up.

    Medians over all steps but the first, which allocates and compiles. On CUDA the marks are events
    in the stream, read when the run ends; nothing waits for the device in between.

    Attributes:
        figures: complete when training has ended. ``forward_ms``, ``backward_ms`` (whatever lies
            between the forward passes and the optimizer, so clipping too), ``optimizer_ms`` and the
            whole ``step_ms``; bytes of peak memory and of the optimizer's state. A compiled model
            has ``forward_backward_ms``: marks inside would cut its graph.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self._marks: dict[str, list[list[tuple[Mark, Mark]]]] = {}
        self._elapsed_s = 0.0
        self._device = torch.device("cpu")
        self._compiled = False
        self._hooks: list[RemovableHandle] = []
        self._forward_mark: Mark | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins anew, and watches the model's forward pass."""
        self._remove_hooks()  # a try that ran out of memory has not come to its end
        self.__init__()  # type: ignore[misc]  # a Trainer may train again
        self._device = args.device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._marks = {part: [] for part in (_FORWARD, _TO_STEP, _OPTIMIZER, _WHOLE)}
        self._compiled = args.torch_compile
        model: nn.Module = kwargs["model"]
        if not self._compiled:
            self._hooks = [
                model.register_forward_pre_hook(lambda *_: self._forward_begins(model)),
                model.register_forward_hook(lambda *_: self._forward_ends(model)),
            ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first batch of a step is at hand."""
        for of_part in self._marks.values():
            of_part.append([])
        self._begun, self._begun_s = mark(self._device), time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are complete and clipped."""
        self._ready = mark(self._device)
        self._marks[_TO_STEP][-1].append((self._begun, self._ready))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer has returned."""
        self._marks[_OPTIMIZER][-1].append((self._ready, mark(self._device)))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The scheduler has made its step and gradients are gone."""
        self._marks[_WHOLE][-1].append((self._begun, mark(self._device)))
        self._elapsed_s += time.perf_counter() - self._begun_s

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the seconds so far beside what has just been logged."""
        if state.log_history and self._marks:
            state.log_history[-1].setdefault(ELAPSED, round(self._elapsed_s, 3))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the marks."""
        self._remove_hooks()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.figures = {
            **self._times(),
            "peak_memory_bytes": peak_memory(args.device),
            "optimizer_state_bytes": optimizer_state_bytes(kwargs["optimizer"]),
        }
        self._marks = {}

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _forward_begins(self, model: nn.Module) -> None:
        # Otherwise it is an evaluation.
        self._forward_mark = mark(self._device) if model.training else None

    def _forward_ends(self, model: nn.Module) -> None:
        if model.training and self._forward_mark is not None and self._marks[_FORWARD]:
            self._marks[_FORWARD][-1].append((self._forward_mark, mark(self._device)))

    def _times(self) -> dict[str, float]:
        """Medians in milliseconds. The first step counts only where there is no other."""
        by_part: dict[str, list[float]] = defaultdict(list)
        for steps in zip(*self._marks.values(), strict=True):
            parts = [sum(milliseconds(*pair) for pair in pairs) for pairs in steps]
            times = dict(zip(self._marks, parts, strict=True))
            if self._compiled:
                by_part["forward_backward_ms"].append(times[_TO_STEP])
            else:
                by_part["forward_ms"].append(times[_FORWARD])
                by_part["backward_ms"].append(times[_TO_STEP] - times[_FORWARD])
            by_part["optimizer_ms"].append(times[_OPTIMIZER])
            by_part["step_ms"].append(times[_WHOLE])
        return {
            name: round(statistics.median(times[1:] or times), 3) for name, times in by_part.items()
        }


def peak_memory(device: torch.device) -> int:
    """Most bytes allocated on a CUDA device, or most memory of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # of Unix only

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def optimizer_state_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state tensors, wrapped or not; torch's step counters are left out."""
    ours = our_optimizer(optimizer)
    if ours is not None:
        return sum(row.state_bytes for row in ours.plan())
    inner: Optimizer = unwrap(optimizer)
    return sum(num_bytes_of(tensor) for tensor in state_tensors(inner) if tensor.ndim)


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """All tensors of an optimizer's state, also those in lists and mappings."""
    waiting: list[Any] = list(optimizer.state.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value


def num_bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
