"""Image classification, from a folder with one folder per class or from the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "weights to go on from"})
    config_name: str | None = field(default=None, metadata={"help": "configuration to begin with"})
    config_overrides: str = field(default="", metadata={"help": "hidden_size=64,..."})


@dataclass
class DataArguments:
    image_folder: str | None = field(default=None, metadata={"help": "train/CLASS/*.png and so on"})
    dataset_name: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    validation_share: float = field(default=0.1, metadata={"help": "where there is no split"})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    args.remove_unused_columns = False  # images become pixels when they are read
    set_seed(args.seed)
    if data_args.dataset_name:
        raw = load_dataset(data_args.dataset_name)
    else:
        raw = load_dataset("imagefolder", data_dir=data_args.image_folder)
    if "validation" not in raw:
        parts = raw["train"].train_test_split(data_args.validation_share, seed=args.seed)
        raw["train"], raw["validation"] = parts["train"], parts["test"]
    names = raw["train"].features[data_args.label_column].names

    if model_args.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            model_args.model_name_or_path, num_labels=len(names), ignore_mismatched_sizes=True
        )
    else:
        config = AutoConfig.from_pretrained(model_args.config_name, num_labels=len(names))
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
        model = AutoModelForImageClassification.from_config(config)
    size = model.config.image_size

    def to_pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [
            image.convert("RGB").resize((size, size)) for image in rows[data_args.image_column]
        ]
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        return {"pixel_values": list(scaled), "labels": rows[data_args.label_column]}

    trainer = Trainer(
        model,
        args,
        train_dataset=raw["train"].with_transform(to_pixels),
        eval_dataset=raw["validation"].with_transform(to_pixels),
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
