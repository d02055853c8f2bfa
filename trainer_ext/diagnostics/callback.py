"""Diagnostics of any Trainer run: what its gradients say about the choice of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from trainer_ext.diagnostics.collect import Kernel, Sampler, SampleSizes, choose_kernels, kernels_of
from trainer_ext.diagnostics.findings import Window, look_at
from trainer_ext.diagnostics.kfac import KFacErrors
from trainer_ext.diagnostics.report import write_report
from trainer_ext.log import get_logger

logger = get_logger(__name__)

FOLDER = "diagnostics"


class DiagnosticsCallback(TrainerCallback):
    """Looks at some steps of a run and writes a report, whatever optimizer is in use.

    The report (``index.html``, the figures as PNG and ``findings.json``) says how well a shared
    basis, a diagonal, rotations and K-FAC fit this model, and which rank and grouping follow. On
    the steps it looks at a few numbers of each gradient are kept; training itself is unchanged.

    Args:
        output_dir: of the report; default ``diagnostics`` in the run's folder.
        starts: steps done before each look.
        steps: of each look, at least 2.
        layers: shell patterns of the kernels; default of each kind the first, a middle and the
            last.
        rank: of the shared basis whose run is shown.
        kfac: look at K-FAC variants, too, on three layers of at most 1,024 inputs and outputs.
        then_exit: end the program when the last look is done; nothing is saved before.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        *,
        starts: Sequence[int] = (0,),
        steps: int = 32,
        layers: Sequence[str] | None = None,
        rank: int = 8,
        kfac: bool = False,
        then_exit: bool = False,
        sizes: SampleSizes | None = None,
    ) -> None:
        bounds = (("steps", steps, 2), ("rank", rank, 1), ("starts", min(starts, default=-1), 0))
        for name, value, low in bounds:
            if value < low:
                raise ValueError(f"{name}={value} must be at least {low}")
        self._starts = sorted(set(starts))
        for start, later in zip(self._starts, self._starts[1:], strict=False):
            if later < start + steps:
                raise ValueError(f"starts={later} is within the {steps} steps from {start}")
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._steps, self._patterns, self._rank = steps, layers, rank
        self._kfac, self._then_exit = kfac, then_exit
        self._sizes = SampleSizes() if sizes is None else sizes
        self.windows: list[Window] = []
        self._model: nn.Module | None = None
        self._kernels: list[Kernel] = []
        self._sampler: Sampler | None = None
        self._kfac_errors: KFacErrors | None = None
        self._first = self._taken = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Chooses the kernels.

        Raises:
            ValueError: a pattern that matches none.
        """
        self._remove_hooks()  # a try that ran out of memory has not come to its end
        self.windows.clear()
        self._model = kwargs["model"]
        self._kernels = choose_kernels(kernels_of(self._model), self._patterns)
        self.output_dir = self.output_dir or Path(args.output_dir) / FOLDER
        if self._then_exit:
            args.save_strategy = SaveStrategy.NO

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins a look, and asks for the inputs of the step that comes."""
        if state.global_step in self._starts and self._sampler is None:
            self._begin(state.global_step + 1)
        if self._sampler is not None:
            self._sampler.arm(state.global_step + 1)
        if self._kfac_errors is not None:
            self._kfac_errors.arm()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are complete and clipped."""
        if self._sampler is None:
            return
        self._sampler.take()
        if self._kfac_errors is not None:
            self._kfac_errors.take()
        self._taken += 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends a look that has seen enough; after the last one writes the report.

        Raises:
            SystemExit: that is all the program was run for.
        """
        if self._sampler is None or self._taken < self._steps:
            return
        self._end(state)
        if self._then_exit and len(self.windows) == len(self._starts):
            self._write(args, state)
            raise SystemExit(0 if self._has_found(state) else 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the report of what there is; a look that was cut short counts as it is.

        Raises:
            SystemExit: the program was run for the report only; status 1 without one.
        """
        if self._sampler is not None:
            logger.warning(
                "diagnostics: training ended after %d of %d steps", self._taken, self._steps
            )
            self._end(state)
        missed = self._starts[len(self.windows) :]
        if missed:
            logger.warning(
                "diagnostics: training ended at step %d, before the look%s after %s",
                state.global_step,
                "s" if len(missed) > 1 else "",
                ", ".join(map(str, missed)),
            )
        self._write(args, state)
        if self._then_exit:
            raise SystemExit(0 if self._has_found(state) else 1)

    def _begin(self, first: int) -> None:
        assert self._model is not None
        self._first, self._taken = first, 0
        self._sampler = Sampler(self._model, self._kernels, self._sizes, steps=self._steps)
        if self._kfac:
            self._kfac_errors = KFacErrors(
                self._model,
                [kernel.info.module_name for kernel in self._kernels],
                most=3,
                largest_side=1024,
                steps=self._steps,
            )

    def _end(self, state: TrainerState) -> None:
        assert self._sampler is not None
        found = [each for each in self._sampler.samples.values() if len(each.blocks) > 1]
        window = Window(
            first=self._first,
            steps=self._taken - self._sampler.skipped,
            skipped=self._sampler.skipped,
            rank=self._rank,
            kernels=[],
            kfac=self._kfac_errors.curves if self._kfac_errors else {},
        )
        self._remove_hooks()
        self.windows.append(window)
        if not state.is_world_process_zero:
            return
        logger.info(
            "diagnostics: looking at %d kernels, steps %d to %d",
            len(found),
            window.first,
            window.first + self._taken - 1,
        )
        for samples in found:
            findings, pictures = look_at(samples, rank=self._rank, picture=self._sizes.picture)
            window.kernels.append(findings)
            window.pictures[samples.name] = pictures

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero or self.output_dir is None:
            return
        windows = [window for window in self.windows if window.kernels]
        if not self._has_found(state):
            logger.warning("diagnostics: no look has seen two steps with finite gradients")
            return
        name = type(self._model).__name__
        write_report(self.output_dir, windows, state.log_history, name, args.seed)
        logger.info("diagnostics: %s", self.output_dir / "index.html")

    def _has_found(self, state: TrainerState) -> bool:
        """Whether there is something to report; only the first process knows what."""
        return any(window.kernels or not state.is_world_process_zero for window in self.windows)

    def _remove_hooks(self) -> None:
        for part in (self._sampler, self._kfac_errors):
            if part is not None:
                part.remove()
        self._sampler = self._kfac_errors = None
