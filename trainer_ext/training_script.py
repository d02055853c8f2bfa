"""What training scripts share: resuming, running, saving and the closing lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

Metrics = dict[str, float]
Figure = tuple[str, str, str]
"""Label, name of the metric, format."""


@contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Turns a ValueError of the preparation into one line on stderr and exit status 2."""
    try:
        yield
    except ValueError as error:
        print(f"{Path(script).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The folder to resume from; `--resume_from_checkpoint true` is the last of output_dir.

    Raises:
        ValueError: there is no such checkpoint.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        output = Path(args.output_dir)
        checkpoint = get_last_checkpoint(output) if output.is_dir() else None
        if checkpoint is None:
            raise ValueError(f"resume_from_checkpoint=true: {args.output_dir!r} has no checkpoint")
        return str(checkpoint)
    if not Path(wanted).is_dir():
        raise ValueError(f"resume_from_checkpoint={wanted!r} is not a folder")
    return str(wanted)


def train_and_evaluate(
    trainer: Trainer,
    checkpoint: str | None,
    complete: Callable[[Metrics], None] = lambda metrics: None,
) -> Metrics:
    """Trains and evaluates as `do_train` and `do_eval` say; writes the metrics files.

    Args:
        complete: adds to the metrics of the evaluation.
    """
    metrics: Metrics = {}
    if trainer.args.do_train:
        train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.log_metrics("train", train_metrics)
        trainer.save_metrics("train", train_metrics)
        metrics |= train_metrics
    if trainer.args.do_eval:
        eval_metrics = trainer.evaluate()
        complete(eval_metrics)
        trainer.log_metrics("eval", eval_metrics)
        trainer.save_metrics("eval", eval_metrics)
        metrics |= eval_metrics
    trainer.save_state()
    return metrics


def save_results(trainer: Trainer, *, task: str, dataset: str, finetuned_from: str | None) -> None:
    """Saves the model and writes the model card, pushed if asked for."""
    trainer.save_model()
    if finetuned_from is None:
        # The stock card calls a model without a name a fine-tuned version of nothing; one whose
        # name is a folder it takes for trained from scratch, as this is.
        trainer.model.config.name_or_path = trainer.args.output_dir
    card = {"tasks": task, "dataset": dataset, "finetuned_from": finetuned_from}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def summary(figures: Sequence[Figure], metrics: Mapping[str, float], output_dir: Path) -> str:
    """The closing lines: the figures that matter and where the files are."""
    shown = [f"{label} {metrics[key]:{form}}" for label, key, form in figures if key in metrics]
    files = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
    return f"\n{', '.join(shown)}\n{output_dir}/: {', '.join(files)}"
