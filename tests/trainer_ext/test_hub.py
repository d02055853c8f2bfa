"""Publishing, with the real client against a Hub on this machine."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import GPT2LMHeadModel

from tests.trainer_ext.hub_server import LARGE, TOKEN, Hub, loopback_hub
from tests.trainer_ext.test_cli import SCRIPT, options, python
from tests.trainer_ext.tiny import same_weights, tiny_gpt2, trainer
from trainer_ext import cli
from trainer_ext.hub import files_to_publish, publish
from trainer_ext.resume import incomplete_because

REPO = "me/tiny"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at three and six."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = trainer(folder)
    run.train()
    run.save_model()
    run.save_state()
    run.create_model_card()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub, reached by the plain LFS protocol, without pauses between attempts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with loopback_hub() as server:
        yield server


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


@pytest.fixture
def push(hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``hf-precond push`` with this Hub in place of the real one."""
    monkeypatch.setattr("trainer_ext.hub.HfApi", lambda: api)
    return lambda *arguments: cli.main(["push", *map(str, arguments)])


# --- what goes up ---------------------------------------------------------------------------------


def test_a_run_and_its_last_checkpoint_go_up(finished: Path) -> None:
    names = {upload.name for upload in files_to_publish(finished)}
    own = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert names >= {*own, "trainer_state.json"}
    state = {"optimizer.safetensors", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert names >= {f"last-checkpoint/{name}" for name in {*state, "model.safetensors"}}
    assert not any("training_args" in name or "checkpoint-" in name[:11] for name in names)
    steps = {
        json.loads(upload.path.read_text())["global_step"]
        for upload in files_to_publish(finished)
        if upload.name.endswith("trainer_state.json")
    }
    assert steps == {6}


def test_another_checkpoint_may_be_chosen_and_files_left_out(finished: Path) -> None:
    uploads = files_to_publish(
        finished, checkpoint=finished / "checkpoint-3", exclude=["last-checkpoint/rng*"]
    )
    chosen = [upload for upload in uploads if upload.name.startswith("last-checkpoint/")]
    assert {upload.path.parent.name for upload in chosen} == {"checkpoint-3"}
    assert "last-checkpoint/rng_state.pth" not in {upload.name for upload in uploads}


def test_a_checkpoint_is_a_run_too(finished: Path) -> None:
    names = {upload.name for upload in files_to_publish(finished / "checkpoint-6")}
    assert {"model.safetensors", "optimizer.safetensors", "README.md"} <= names


def test_the_checkpoint_lends_its_card(run: Path) -> None:
    (run / "README.md").unlink()
    first = files_to_publish(run)[0]
    assert (first.name, first.path) == ("README.md", run / "checkpoint-6" / "README.md")
    for card in run.rglob("README.md"):
        card.unlink()
    with pytest.raises(ValueError, match=r"has no README.md: trainer.create_model_card\(\)"):
        files_to_publish(run)


def test_half_a_checkpoint_is_passed_over_and_refused_by_name(run: Path) -> None:
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    uploads = files_to_publish(run)
    chosen = {u.path.parent.name for u in uploads if u.name.startswith("last-checkpoint/")}
    assert chosen == {"checkpoint-3"}
    with pytest.raises(ValueError, match=r"checkpoint-6' is not complete: trainer_state.json"):
        files_to_publish(run, checkpoint=run / "checkpoint-6")


def test_a_damaged_checkpoint_is_refused_as_the_folder_too(run: Path) -> None:
    folder = run / "checkpoint-6"
    state = folder / "optimizer.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"checkpoint-6' is not complete: .*sha256 does not match"):
        files_to_publish(folder)


SECRETS: dict[str, tuple[str, str]] = {
    "notes.txt": (f"login with {TOKEN}", "it has an access token of the Hub in it"),
    "key.pem": ("x", "its name is that of a secret"),
    ".env": ("HF_TOKEN=x", "its name is that of a secret"),
    "config.yaml": ("-----BEGIN RSA PRIVATE KEY-----", "it has a private key in it"),
    "id_rsa": ("x", "its name is that of a secret"),
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_refused(run: Path, name: str) -> None:
    content, message = SECRETS[name]
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        files_to_publish(run)
    assert name in str(refused.value)
    assert TOKEN not in str(refused.value)
    names = {upload.name for upload in files_to_publish(run, exclude=[name])}
    assert name not in names


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_pickles_are_refused_and_not_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(1)}, run / "pytorch_model.bin")
    torch.save(Payload(), run / "checkpoint-6" / "scheduler.pt", pickle_module=pickle)
    with pytest.raises(ValueError, match="nothing was published") as refused:
        files_to_publish(run)
    message = str(refused.value)
    assert "pytorch_model.bin: a pickle, which may run code" in message
    assert "last-checkpoint/scheduler.pt: a pickle that holds more than tensors" in message
    assert "executed" not in capsys.readouterr().out
    files_to_publish(run, exclude=["*.bin", "*/scheduler.pt"])


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights in safetensors"):
        files_to_publish(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        files_to_publish(tmp_path / "none")


# --- the way there --------------------------------------------------------------------------------


def test_one_commit_holds_everything(
    finished: Path, hub: Hub, push: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    push(finished, REPO, "--private")
    shown = capsys.readouterr().out
    uploads = files_to_publish(finished)
    assert hub.commits == 1
    assert hub.private == {REPO}
    published = hub.repos[REPO]["main"]
    assert published == {upload.name: upload.path.read_bytes() for upload in uploads}
    assert f"{len(uploads)} files" in shown
    assert f"/{REPO}/commit/" in shown
    assert TOKEN not in shown


def test_a_dry_run_lists_and_sends_nothing(
    finished: Path, hub: Hub, push: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    push(finished, REPO, "--dry_run", "--json")
    listed = json.loads(capsys.readouterr().out)
    assert hub.requests == []
    assert listed["commit"] is None
    assert listed["files"] == {u.name: u.size for u in files_to_publish(finished)}


def test_a_branch_is_made(finished: Path, hub: Hub, push: Callable[..., None]) -> None:
    push(finished, REPO, "--revision", "trial", "--message", "first")
    assert hub.repos[REPO]["main"] == {}
    assert "model.safetensors" in hub.repos[REPO]["trial"]
    push(finished, REPO, "--revision", "trial")
    assert hub.commits == 2


def test_what_is_published_loads_and_goes_on_bit_for_bit(
    finished: Path, hub: Hub, api: HfApi, tmp_path: Path
) -> None:
    uploads = files_to_publish(finished, checkpoint=finished / "checkpoint-3")
    publish(uploads, REPO, api=api)
    copy = Path(
        snapshot_download(
            REPO, endpoint=hub.endpoint, token=TOKEN, cache_dir=tmp_path / "cache", etag_timeout=20
        )
    )
    loaded = GPT2LMHeadModel.from_pretrained(copy)
    again = trainer(tmp_path / "again", tiny_gpt2())
    again.train(resume_from_checkpoint=str(copy / "last-checkpoint"))
    assert again.state.global_step == 6
    assert same_weights(again.model, loaded)


def test_a_broken_push_goes_on_where_it_was(finished: Path, hub: Hub, api: HfApi) -> None:
    uploads = files_to_publish(finished)
    send = partial(publish, uploads, REPO, api=api)
    hub.faults["POST", "/commit/"] = [500] * 20
    with pytest.raises(ValueError, match="the Hub refused"):
        send()
    assert hub.commits == 0
    sent = hub.count("^PUT /lfs-store/")
    large = {upload.path.read_bytes() for upload in uploads if upload.path.suffix in LARGE}
    # What two files share may go up twice: the client asks for all at once.
    assert sent >= len(large)
    hub.faults.clear()
    send()
    assert hub.commits == 1
    assert hub.count("^PUT /lfs-store/") == sent


@pytest.mark.parametrize("fault", [500, 503, 0])
def test_a_passing_fault_is_tried_again(fault: int, finished: Path, hub: Hub, api: HfApi) -> None:
    hub.faults["PUT", "/lfs-store/"] = [fault]
    publish(files_to_publish(finished), REPO, api=api)
    assert hub.commits == 1


@pytest.mark.parametrize(
    ("place", "status", "message"),
    [
        ("/repos/create", 401, "not logged in, or the token is not valid"),
        ("/repos/create", 403, "the token may not write to 'me/tiny'"),
        ("/preupload/", 403, "the token may not write to 'me/tiny'"),
        ("/commit/", 409, "has been changed meanwhile: push again"),
        ("/commit/", 400, "the Hub refused: "),
    ],
)
def test_refusals_are_one_line_without_the_token(
    place: str,
    status: int,
    message: str,
    finished: Path,
    hub: Hub,
    push: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.faults["POST", place] = [status] * 10
    with pytest.raises(SystemExit) as stop:
        push(finished, REPO)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert TOKEN not in captured.err + captured.out
    assert hub.commits == 0


def test_wrong_tokens_and_no_hub(finished: Path, hub: Hub) -> None:
    uploads = files_to_publish(finished)
    with pytest.raises(ValueError, match="not logged in"):
        publish(uploads, REPO, api=HfApi(endpoint=hub.endpoint, token="hf_wrong"))
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    with pytest.raises(ValueError, match="the Hub could not be reached"):
        publish(uploads, REPO, api=nowhere)


# --- the Trainer's own way ------------------------------------------------------------------------

STATE = {"optimizer.safetensors", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
STRATEGIES = {
    "end": set(),
    "every_save": set(),
    "checkpoint": {f"last-checkpoint/{name}" for name in STATE},
    "all_checkpoints": {f"checkpoint-{step}/{name}" for step in (2, 4) for name in STATE},
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_unmodified_script_publishes_by_every_strategy(
    strategy: str, hub: Hub, tmp_path: Path
) -> None:
    script = tmp_path / "run_tiny.py"
    script.write_text(SCRIPT.replace("trainer.create_model_card()", "trainer.push_to_hub()"))
    (tmp_path / "neighbour.py").write_text("WORD = 'beside'\n")
    pushing = f"--push_to_hub --hub_strategy {strategy} --hub_model_id {REPO} --hub_token {TOKEN}"
    done = python(
        *("-m", "trainer_ext", str(script), *options(tmp_path / "out"), *pushing.split()),
        *("--hub_always_push", "true"),
        folder=tmp_path,
        HF_ENDPOINT=hub.endpoint,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    published = hub.repos[REPO]["main"]
    states = {name for name in published if "/" in name and name.rpartition("/")[2] in STATE}
    assert states == STRATEGIES[strategy]
    assert not any(name.endswith("optimizer.pt") for name in published)
    assert "## Optimizer" in published["README.md"].decode()
    if strategy == "checkpoint":
        place = tmp_path / "copy" / "checkpoint-4"
        place.mkdir(parents=True)
        for name, content in published.items():
            if name.startswith("last-checkpoint/"):
                (place / name.rpartition("/")[2]).write_bytes(content)
        assert not incomplete_because(place)
