"""The scripts in examples/ with our optimizers, on tiny models and local files."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)

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
    return losses_with_state(folder / "out", optim, steps)


def losses_with_state(out: Path, optim: str, steps: int) -> list[float]:
    """The logged losses of a run whose last checkpoint has the optimizer's state."""
    state = json.loads((out / "trainer_state.json").read_text())
    tensors, header = checkpoint.read_state(out / f"checkpoint-{steps}")
    assert header["algorithm"] == optim
    assert any(tensor.any() for tensor in tensors.values())
    assert "## Optimizer" in (out / "README.md").read_text()
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


def test_masked_language_model_with_a_tokenizer_of_its_own(bert: Path, tmp_path: Path) -> None:
    """Trained on the text: the model gets its size."""
    text = "\n".join(" ".join(words) for words in sentences(128))
    (tmp_path / "train.txt").write_text(text)
    losses = train(
        "run_mlm.py",
        tmp_path,
        "adadiag",
        *("--train_tokenizer", 60, "--config_name", bert, "--max_length", 24),
        *("--train_file", tmp_path / "train.txt"),
    )
    assert losses[-1] < losses[0]
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(saved) == BertConfig.from_pretrained(tmp_path / "out").vocab_size <= 60
    assert saved.tokenize("w7") != ["[UNK]"]
    assert saved.decode(saved("w7 w8")["input_ids"]).split() == ["[CLS]", "w7", "w8", "[SEP]"]


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


GLUE_CARD = """---
configs:
- config_name: mnli
  data_files: [{split: train, path: mnli/t.jsonl}, {split: validation_matched, path: mnli/t.jsonl},
    {split: validation_mismatched, path: mnli/t.jsonl}]
- config_name: stsb
  data_files: [{split: train, path: stsb/t.jsonl}, {split: validation, path: stsb/t.jsonl}]
---
"""


@pytest.fixture
def glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks laid out as on the Hub, in a folder that is found by the same name."""
    folder = tmp_path / "nyu-mll" / "glue"
    names = {"mnli": ("premise", "hypothesis"), "stsb": ("sentence1", "sentence2")}
    for task, (first, second) in names.items():
        (folder / task).mkdir(parents=True)
        with (folder / task / "t.jsonl").open("w") as file:
            for number, words in enumerate(sentences(96)):
                place = int(words[0][1:])
                label = place // 14 if task == "mnli" else float(place < 20)
                row = {first: " ".join(words), second: words[0], "label": label, "idx": number}
                file.write(json.dumps(row) + "\n")
    (folder / "README.md").write_text(GLUE_CARD)
    monkeypatch.chdir(tmp_path)
    # The cache takes the relative name for the same data.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("glue")
@pytest.mark.parametrize("optim", ["two_sided_basis", "rs_kfac"])
@pytest.mark.parametrize(
    ("task", "figures"),
    [
        ("mnli", ["eval_matched_accuracy", "eval_mismatched_accuracy"]),
        ("stsb", ["eval_pearson"]),
    ],
)
def test_tasks_of_glue(
    optim: str, task: str, figures: list[str], tokenizer: Path, bert: Path, tmp_path: Path
) -> None:
    """Columns of other names, two validation sets, scores instead of classes."""
    losses = train(
        "run_classification.py",
        tmp_path,
        optim,
        *("--tokenizer_name", tokenizer, "--config_name", bert, "--max_length", 16),
        *("--task_name", task),
        steps=24,
    )
    assert losses[-1] < losses[0]
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert all(metrics[figure] > 0.3 for figure in figures)


@pytest.mark.parametrize("optim", ["adadiag", "soap", "kfac"])
def test_summarization(optim: str, tokenizer: Path, tmp_path: Path) -> None:
    """The summary is the first two words; evaluation writes them."""
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
        *("--source_prefix", "", "--max_source_length", 16, "--max_target_length", 2),
        *("--predict_with_generate", True, "--eval_strategy", "steps", "--eval_steps", 6),
        *("--generation_max_length", 4, "--per_device_eval_batch_size", 64),
    )
    assert losses[-1] < losses[0] - 0.2
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 0 <= metrics["eval_rouge1"] <= 1
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {entry.get("optim_missing_columns", 0) for entry in history} == {0}


def test_a_summary_that_is_cut_keeps_its_end(tokenizer: Path) -> None:
    """Or a model learns to stop only where summaries are short."""
    rows = {"text": ["w1 w2"], "summary": ["w1 w2 w3 w4"]}
    data = load("run_summarization").DataArguments(max_target_length=3, source_prefix="")
    made = load("run_summarization").to_tokens(rows, AutoTokenizer.from_pretrained(tokenizer), data)
    labels = AutoTokenizer.from_pretrained(tokenizer).convert_ids_to_tokens(made["labels"][0])
    assert labels == ["[CLS]", "w1", "[SEP]"]


def test_shared_words() -> None:
    shared = load("run_summarization").shared_words
    assert shared("a b b", "b b c") == pytest.approx(2 / 3)
    assert shared("", "a") == shared("", "") == 0


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


@functools.cache
def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while it is executed.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("optim", ["two_sided_basis", "shared_basis_adagrad", "kfac"])
def test_accelerate_loop(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Falling losses; resumed after an epoch it ends with the same weights, bit for bit."""

    def run(*more: str) -> float:
        options = ["--optim", optim, "--epochs", "2", "--checkpoints", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["accelerate_loop.py", *options, *more])
        return load("accelerate_loop").main()

    last = run()
    first = float(re.search(r"epoch 1 loss ([\d.]+)", capsys.readouterr().out)[1])  # type: ignore[index]
    assert last < first - 0.3
    weights = tmp_path / "epoch_2" / "model.safetensors"
    straight = weights.read_bytes()
    weights.unlink()
    assert run("--resume", str(tmp_path / "epoch_1")) == last
    assert weights.read_bytes() == straight


def torchrun(*arguments: object) -> str:
    """Runs on two ranks and returns what they print."""
    root = str(EXAMPLES.parent)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + [str(argument) for argument in arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("optim", ["two_sided_basis", "kfac"])
def test_accelerate_loop_on_two_ranks(optim: str, tmp_path: Path) -> None:
    loop = (EXAMPLES / "accelerate_loop.py", "--optim", optim, "--epochs", 3)
    straight = torchrun(*loop, "--checkpoints", tmp_path)
    losses = [float(loss) for loss in re.findall(r"epoch \d loss ([\d.]+)", straight)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.3
    resumed = torchrun(*loop, "--resume", tmp_path / "epoch_2")
    assert re.findall(r"epoch \d loss [\d.]+", resumed) == [f"epoch 3 loss {losses[-1]:.3f}"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("optim", ["two_sided_basis", "kfac"])
def test_a_trainer_script_on_two_ranks(
    optim: str, tokenizer: Path, bert: Path, tmp_path: Path
) -> None:
    """Each matrix on one rank; the checkpoint is that of one process."""
    text = "\n".join(" ".join(WORDS[number % 4] for _ in range(8)) for number in range(256))
    (tmp_path / "train.txt").write_text(text)
    torchrun(
        *("-m", "trainer_ext", EXAMPLES / "run_mlm.py", "--train_file", tmp_path / "train.txt"),
        *("--tokenizer_name", tokenizer, "--config_name", bert, "--output_dir", tmp_path / "out"),
        *("--optim", optim, "--optim_args", "sharding=owner", "--learning_rate", "1e-2"),
        *("--max_steps", 12, "--save_steps", 12, "--logging_steps", 3, "--warmup_steps", 2),
        *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
    )
    losses = losses_with_state(tmp_path / "out", optim, steps=12)
    assert losses[-1] < losses[0] - 0.2


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
