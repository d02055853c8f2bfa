"""The launcher on a script that knows nothing of this package, and the hf-precond command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hf_precond.registry import list_optimizers
from tests.trainer_ext.tiny import NAME, tiny_gpt2
from trainer_ext import cli

SCRIPT = '''
"""Trains a small model, in the style of the scripts of transformers."""
import sys
from dataclasses import dataclass, field

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

import neighbour


@dataclass
class ModelArguments:
    n_embd: int = field(default=16)


def main():
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    model_args, training_args = parser.parse_args_into_dataclasses()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=1, n_head=2, n_embd=model_args.n_embd, vocab_size=32, n_positions=16,
            bos_token_id=0, eos_token_id=0,
        )
    )
    rows = torch.randint(32, (16, 16))
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=training_args, train_dataset=data)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    print("ARGV", sys.argv[0], len(sys.argv), __name__, neighbour.WORD)


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """An unmodified script with a module beside it."""
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "neighbour.py").write_text("WORD = 'beside'\n")
    (folder / "run_tiny.py").write_text(SCRIPT)
    return folder / "run_tiny.py"


def options(folder: Path) -> list[str]:
    text = (
        f"--output_dir {folder} --optim {NAME} --optim_args rank=4,update_interval=2, "
        "--max_steps 4 --save_steps 2 --logging_steps 2 --per_device_train_batch_size 4 "
        "--report_to none --use_cpu --disable_tqdm true --learning_rate 1e-2 "
        "--dataloader_pin_memory false"
    )
    return text.split()


def python(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the package importable, from another folder, with further variables."""
    path = os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


LAUNCHERS = {
    "python": "-m trainer_ext",
    "torchrun": "-m torch.distributed.run --standalone -m trainer_ext",
    "accelerate": "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no -m trainer_ext",
}


@pytest.mark.parametrize(
    "launcher",
    # The others start the same way; other tests run their scripts in this process.
    [
        pytest.param(name, marks=() if name == "torchrun" else pytest.mark.slow)
        for name in LAUNCHERS
    ],
)
def test_unmodified_script(launcher: str, script: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python(*LAUNCHERS[launcher].split(), str(script), *options(out), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    count = 1 + len(options(out))
    assert f"ARGV {script} {count} __main__ beside" in done.stdout
    assert f"{NAME}: {NAME} 3,072 parameters in 4 tensors" in done.stderr
    assert "optim_escaped_mass_share" in done.stdout
    names = {path.name for path in (out / "checkpoint-4").iterdir()}
    assert names >= {"model.safetensors", "optimizer.safetensors", "README.md"}
    assert "optimizer.pt" not in names
    assert "## Optimizer" in (out / "README.md").read_text()


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """The launcher in this process, which it leaves as it was."""

    def launched(arguments: Sequence[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", list(sys.argv))
            patch.setattr(sys, "path", list(sys.path))
            cli.run_main(arguments)

    return launched


def test_unmodified_script_resumes(
    script: Path,
    tmp_path: Path,
    launch: Callable[[Sequence[str]], None],
    logs: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    launch([str(script), *options(out)])
    before = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    launch([str(script), *options(out), "--resume_from_checkpoint", str(out / "checkpoint-2")])
    assert "STARTS FRESH" not in logs.text
    assert (out / "model.safetensors").read_bytes() == before


def test_wrong_name_lists_the_choices(
    script: Path,
    tmp_path: Path,
    launch: Callable[[Sequence[str]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        launch([str(script), *options(tmp_path), "--optim", "shared_basis_adagrat"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in list_optimizers())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = {**tiny_gpt2().config.to_dict(), "architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["list"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "name"
    assert [line.split()[0] for line in lines] == list(list_optimizers())


def test_explain(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", "--model", str(model_folder), "--optim", NAME]
    cli.main([*command, "--optim_args", "rank=4"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "q: 2 x [8, 16]" in rows["transformer.h.0.attn.c_attn.weight"]
    assert NAME in rows["transformer.h.1.mlp.c_fc.weight"]
    assert "adam" in rows["transformer.wte.weight"]
    assert "embedding" in rows["transformer.wte.weight"]


ERRORS = {
    "lits": "Did you mean 'list'",
    "explain --model MODEL": "Missing option '--optim'",
    "explain --model MODEL --optim shared_basis_adagrat": f"Did you mean '{NAME}'",
    f"explain --model MODEL --optim {NAME} --optim_args rnak=3": "unknown option 'rnak'",
    f"explain --model MODEL --optim {NAME} --optim_args rank=0": "rank = 0 is not allowed",
    f"explain --model ./nowhere --optim {NAME}": "./nowhere",
    "run nowhere.py": "there is no script 'nowhere.py'",
}


@pytest.mark.parametrize("command", ERRORS)
def test_mistakes_take_one_line(
    command: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(command.replace("MODEL", str(model_folder)).split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("hf-precond")
    assert ERRORS[command] in error


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.command_names())


def test_launcher_takes_commands(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run_main(["list", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == list(list_optimizers())


def test_launcher_without_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run_main(["nowhere.py", "--optim", NAME])
    assert stop.value.code == 2
    expected = "python -m trainer_ext: error: there is no script 'nowhere.py'\n"
    assert capsys.readouterr().err == expected
