"""The scripts in examples/ with our optimizers, on tiny models and local files."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, T5Config, ViTConfig

from hf_precond import list_optimizers
from trainer_ext import checkpoint, cli

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"]


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script changes both."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole words."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="</s>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    ).save_pretrained(folder)
    return folder


def sentences(count: int) -> list[list[str]]:
    """Words that count up from a drawn one: every other word tells a hidden one."""
    drawn = random.Random(0)
    starts = [drawn.randrange(len(WORDS)) for _ in range(count)]
    return [[WORDS[(start + place) % len(WORDS)] for place in range(8)] for start in starts]


def train(script: str, folder: Path, optim: str, *options: object, steps: int = 12) -> list[float]:
    """Runs an example as hf-precond does; returns the logged losses."""
    shared = {
        "output_dir": folder / "out",
        "optim": optim,
        "learning_rate": 1e-2,
        "max_steps": steps,
        "logging_steps": 3,
        "save_steps": steps,
        "per_device_train_batch_size": 16,
        "warmup_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    line = [part for key, value in shared.items() for part in (f"--{key}", str(value))]
    cli.main(["run", str(EXAMPLES / script), *line, *map(str, options)])
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    _, header = checkpoint.read_state(folder / "out" / f"checkpoint-{steps}")
    assert header["algorithm"] == optim
    assert "## Optimizer" in (folder / "out" / "README.md").read_text()
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("optim", ["two_sided_basis", "kfac"])
def test_masked_language_model(optim: str, tokenizer: Path, bert: Path, tmp_path: Path) -> None:
    text = "\n".join(" ".join(WORDS[number % 4] for _ in range(8)) for number in range(256))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text(text)
    losses = train(
        "run_mlm.py",
        tmp_path,
        optim,
        *("--tokenizer_name", tokenizer, "--config_name", bert, "--max_length", 16),
        *("--train_file", tmp_path / "train.txt"),
        *("--validation_file", tmp_path / "validation.txt"),
    )
    assert losses[-1] < losses[0] - 0.2
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["eval_loss"] < losses[0]


@pytest.mark.parametrize("optim", ["shared_basis_adam", "ng_plus"])
@pytest.mark.parametrize("pairs", [False, True])
def test_classification_as_in_glue(
    optim: str, pairs: bool, tokenizer: Path, bert: Path, tmp_path: Path
) -> None:
    """Whether a sentence is about small or large numbers."""
    rows = [
        {"sentence": " ".join(words), "other": words[0], "label": int(int(words[0][1:]) < 20)}
        for words in sentences(128)
    ]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sentence", "other", "label"])
        writer.writeheader()
        writer.writerows(rows)
    losses = train(
        "run_classification.py",
        tmp_path,
        optim,
        *("--tokenizer_name", tokenizer, "--config_name", bert, "--max_length", 16),
        *("--train_file", tmp_path / "data.csv", "--validation_file", tmp_path / "data.csv"),
        *("--sentence_columns", "sentence,other" if pairs else "sentence"),
    )
    assert losses[-1] < losses[0]
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["eval_accuracy"] > 0.6


@pytest.mark.parametrize("optim", ["adadiag", "soap"])
def test_summarization(optim: str, tokenizer: Path, tmp_path: Path) -> None:
    """The summary is the first two words."""
    T5Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=SPECIAL.index("</s>"),
        decoder_start_token_id=0,
    ).save_pretrained(tmp_path / "t5")
    rows = [
        json.dumps({"text": " ".join(words), "summary": " ".join(words[:2])})
        for words in sentences(128)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    losses = train(
        "run_summarization.py",
        tmp_path,
        optim,
        *("--tokenizer_name", tokenizer, "--config_name", tmp_path / "t5"),
        *("--train_file", tmp_path / "data.jsonl", "--validation_file", tmp_path / "data.jsonl"),
        *("--source_prefix", "", "--max_source_length", 16),
    )
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("optim", ["b_kfac", "shampoo"])
def test_images(optim: str, tmp_path: Path) -> None:
    """Bright and dark squares."""
    ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    ).save_pretrained(tmp_path / "vit")
    drawn = np.random.default_rng(0)
    for name, level in (("dark", 60), ("bright", 190)):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for number in range(40):
            pixels = np.clip(drawn.normal(level, 40, (16, 16, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / f"{number}.png")
    losses = train(
        "run_images.py",
        tmp_path,
        optim,
        *("--config_name", tmp_path / "vit", "--image_folder", tmp_path / "images"),
    )
    assert losses[-1] < losses[0]
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["eval_accuracy"] > 0.8


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("optim", ["two_sided_basis", "shared_basis_adagrad", "kfac"])
def test_accelerate_loop(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state"
    options = ["--optim", optim, "--steps", "30", "--checkpoint", str(folder)]
    monkeypatch.setattr(sys, "argv", ["accelerate_loop.py", *options])
    last = load("accelerate_loop").main()
    first = float(re.search(r"step 10 loss ([\d.]+)", capsys.readouterr().out)[1])  # type: ignore[index]
    assert last < first
    assert any(folder.iterdir())


# 64 x 32 weights as one vector: seconds.
PLAIN = [name for name in list_optimizers() if name != "full_matrix_adagrad"]


@pytest.mark.parametrize(
    "optim", [*PLAIN, pytest.param("full_matrix_adagrad", marks=pytest.mark.slow)]
)
def test_plain_loop(
    optim: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", "--optim", optim, "--steps", "60"])
    last = load("plain_loop").main()
    first = float(re.search(r"step 20 loss ([\d.]+)", capsys.readouterr().out)[1])  # type: ignore[index]
    assert last < first


def test_every_example_is_in_the_readme_and_tested() -> None:
    readme, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix == ".py":
            assert path.name in readme
            assert path.stem in tests
