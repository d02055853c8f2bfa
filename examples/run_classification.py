"""Classification of sentences or pairs of them, as in GLUE, from files or the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


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
    sentence_columns: str = field(default="sentence", metadata={"help": "one, or two as a,b"})
    max_length: int = 128


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    if data_args.task_name:
        raw = load_dataset("nyu-mll/glue", data_args.task_name)
    else:
        kind = "csv" if data_args.train_file.endswith(".csv") else "json"
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        raw = load_dataset(kind, data_files=files)
    if raw["train"].features["label"].dtype == "string":
        raw = raw.class_encode_column("label")
    num_labels = len(raw["train"].unique("label"))

    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name)
    if model_args.model_name_or_path:
        model = AutoModelForSequenceClassification.from_pretrained(
            model_args.model_name_or_path, num_labels=num_labels
        )
    else:
        config = AutoConfig.from_pretrained(model_args.config_name, num_labels=num_labels)
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
        model = AutoModelForSequenceClassification.from_config(config)

    columns = data_args.sentence_columns.split(",")
    tokens = raw.map(
        lambda rows: tokenizer(
            *(rows[column] for column in columns), truncation=True, max_length=data_args.max_length
        ),
        batched=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {
            "accuracy": float((np.argmax(found.predictions, -1) == found.label_ids).mean())
        },
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.create_model_card()


if __name__ == "__main__":
    main()
