"""Classification of sentences or pairs of them, as in GLUE, from files or the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from datasets import DatasetDict, Value, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

NO_TEXT = ("label", "idx")


@dataclass
class ModelArguments:
    tokenizer_name: str = field(default="bert-base-uncased")
    model_name_or_path: str | None = field(default=None, metadata={"help": "weights to go on from"})
    config_name: str | None = field(default=None, metadata={"help": "configuration to begin with"})
    config_overrides: str = field(default="", metadata={"help": "hidden_size=64,..."})


@dataclass
class DataArguments:
    task_name: str | None = field(default=None, metadata={"help": "of nyu-mll/glue, as sst2"})
    train_file: str | None = field(default=None, metadata={"help": "CSV or JSON lines"})
    validation_file: str | None = None
    sentence_columns: str | None = field(
        default=None, metadata={"help": "one, or two as a,b; by default all but label and idx"}
    )
    max_length: int = 128


def load_splits(data_args: DataArguments) -> DatasetDict:
    """Training data and one validation set or, as for MNLI, two."""
    if data_args.task_name:
        return load_dataset("nyu-mll/glue", data_args.task_name)
    kind = "csv" if data_args.train_file.endswith(".csv") else "json"
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    return load_dataset(kind, data_files=files)


def scores_metrics(found: EvalPrediction) -> dict[str, float]:
    """Pearson's correlation, for tasks whose label is a score as in STS-B."""
    return {"pearson": float(np.corrcoef(found.predictions.squeeze(-1), found.label_ids)[0, 1])}


def class_metrics(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(found.predictions, -1) == found.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    raw = load_splits(data_args)
    if raw["train"].features["label"].dtype == "string":
        raw = raw.class_encode_column("label")
    is_score = raw["train"].features["label"].dtype.startswith("float")
    if is_score:
        raw = raw.cast_column("label", Value("float32"))
    num_labels = 1 if is_score else len(raw["train"].unique("label"))

    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name)
    if model_args.model_name_or_path:
        model = AutoModelForSequenceClassification.from_pretrained(
            model_args.model_name_or_path, num_labels=num_labels, ignore_mismatched_sizes=True
        )
    else:
        config = AutoConfig.from_pretrained(model_args.config_name, num_labels=num_labels)
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
        model = AutoModelForSequenceClassification.from_config(config)

    if data_args.sentence_columns:
        columns = data_args.sentence_columns.split(",")
    else:
        columns = [name for name in raw["train"].column_names if name not in NO_TEXT][:2]
    tokens = raw.map(
        lambda rows: tokenizer(
            *(rows[column] for column in columns), truncation=True, max_length=data_args.max_length
        ),
        batched=True,
    )
    validation = [name for name in tokens if name.startswith("validation")]
    trainer = Trainer(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens[validation[0]],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores_metrics if is_score else class_metrics,
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    for name in validation:
        suffix = name.removeprefix("validation")  # MNLI has _matched and _mismatched
        metrics = trainer.evaluate(tokens[name], metric_key_prefix=f"eval{suffix}")
        trainer.save_metrics(f"eval{suffix}", metrics)
    trainer.create_model_card()


if __name__ == "__main__":
    main()
