"""Text to text with Seq2SeqTrainer, from JSON lines or the Hub."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)


@dataclass
class ModelArguments:
    tokenizer_name: str = field(default="google-t5/t5-small")
    model_name_or_path: str | None = field(default=None, metadata={"help": "weights to go on from"})
    config_name: str | None = field(default=None, metadata={"help": "configuration to begin with"})
    config_overrides: str = field(default="", metadata={"help": "d_model=64,..."})


@dataclass
class DataArguments:
    train_file: str | None = field(default=None, metadata={"help": "JSON lines"})
    validation_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    text_column: str = "text"
    summary_column: str = "summary"
    source_prefix: str = "summarize: "
    max_source_length: int = 256
    max_target_length: int = 64


def to_tokens(
    rows: dict[str, list[str]], tokenizer: Any, data_args: DataArguments
) -> dict[str, Any]:
    texts = [data_args.source_prefix + text for text in rows[data_args.text_column]]
    model_inputs = tokenizer(texts, truncation=True, max_length=data_args.max_source_length)
    # By itself, so that a summary that is cut keeps its end-of-text token.
    labels = tokenizer(
        text_target=rows[data_args.summary_column],
        truncation=True,
        max_length=data_args.max_target_length,
    )
    return {**model_inputs, "labels": labels["input_ids"]}


def shared_words(written: str, wanted: str) -> float:
    """The F1 of the words of two texts, each as often as it occurs."""
    first, second = Counter(written.split()), Counter(wanted.split())
    both = (first & second).total()
    return 2 * both / max(1, first.total() + second.total())


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, Seq2SeqTrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name)
    if model_args.model_name_or_path:
        model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path)
    else:
        config = AutoConfig.from_pretrained(model_args.config_name)
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
        model = AutoModelForSeq2SeqLM.from_config(config)

    if data_args.dataset_name:
        raw = load_dataset(data_args.dataset_name, data_args.dataset_config_name)
    else:
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        raw = load_dataset("json", data_files=files)

    def share_of_words(found: EvalPrediction) -> dict[str, float]:
        """Words that generated and true summaries share (ROUGE-1, F1)."""
        written, wanted = (
            tokenizer.batch_decode(
                np.where(np.asarray(tokens) < 0, tokenizer.pad_token_id, tokens),
                skip_special_tokens=True,
            )
            for tokens in (found.predictions, found.label_ids)
        )
        shares = [shared_words(*pair) for pair in zip(written, wanted, strict=True)]
        return {"rouge1": float(np.mean(shares))}

    tokens = raw.map(
        to_tokens,
        batched=True,
        remove_columns=raw["train"].column_names,
        fn_kwargs={"tokenizer": tokenizer, "data_args": data_args},
    )
    trainer = Seq2SeqTrainer(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=share_of_words if args.predict_with_generate else None,
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.create_model_card()


if __name__ == "__main__":
    main()
