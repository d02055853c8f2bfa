"""Publishing a finished run on the Hub: weights, tokenizer, card and the optimizer's state.

All files go up in one commit. What is uploaded and not yet committed stays on the Hub, so a push
that broke off goes on where it was. Nothing that could run code, and nothing that looks like a
secret, leaves this machine.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trainer_ext.checkpoint import has_optimizer
from trainer_ext.resume import incomplete_because, last_complete_checkpoint

CARD = "README.md"
CHECKPOINT_IN_REPO = "last-checkpoint"
"""Where the Trainer's own ``hub_strategy=checkpoint`` puts it, too."""

# The Trainer's arguments as a pickled object: the card tells them, and nobody needs to load it.
_LEFT_OUT = ("training_args.bin", "*.tmp", "*.log")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.dill")
# What the Trainer needs to go on, where it holds nothing but tensors and plain data.
_TRAINER_STATE = ("scheduler.pt", "scaler.pt", "optimizer.pt", "rng_state*.pth")
_SECRET_NAMES = (".env*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc", "token", "*.token")
_SECRETS = {
    "an access token of the Hub": re.compile(rb"hf_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an access key of AWS": re.compile(rb"AKIA[0-9A-Z]{16}"),
    "a secret key of an API": re.compile(rb"\bsk-[A-Za-z0-9_-]{32,}"),
}
# The error of the Hub's client is one of the HTTP library's, which changes with its releases.
_ERRORS: tuple[type[Exception], ...] = (
    *cast(Any, HfHubHTTPError.__bases__),
    OSError,
    ValueError,
)
_TEXTS = {"", ".json", ".jsonl", ".yaml", ".yml", ".txt", ".md", ".py", ".cfg", ".toml", ".ini"}
_MAX_TEXT = 50 * 2**20


@dataclass(frozen=True, slots=True)
class Upload:
    """A file and its name in the repository."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size


def files_to_publish(
    folder: str | Path, *, checkpoint: str | Path | None = None, exclude: Sequence[str] = ()
) -> list[Upload]:
    """The files of a run: those of its folder, and its last complete checkpoint's.

    Hidden files, logs and other checkpoints stay here, and so do the Trainer's pickled arguments.

    Args:
        checkpoint: another than the last complete one; not needed where ``folder`` is a checkpoint.
        exclude: shell patterns of names in the repository that are left out.

    Raises:
        ValueError: no such folder, a checkpoint that is not complete, no weights, no model card, or
            a file that may not be published; the message names all of these.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder")
    found = [
        Upload(path, str(path.relative_to(folder).as_posix()))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_aside(path.relative_to(folder))
    ]
    if has_optimizer(folder):
        _check_complete(folder)
    chosen = checkpoint or last_complete_checkpoint(folder)
    if chosen is not None:
        _check_complete(chosen)
        found += [
            Upload(path, f"{CHECKPOINT_IN_REPO}/{path.relative_to(chosen).as_posix()}")
            for path in sorted(Path(chosen).rglob("*"))
            if path.is_file() and not _is_aside(path.relative_to(chosen))
        ]
    kept = [
        upload
        for upload in found
        if not _matches(upload.path.name, _LEFT_OUT) and not _matches(upload.name, exclude)
    ]
    # A secret that lies aside is a mistake worth hearing of, too.
    hidden = [
        Upload(path, path.name)
        for path in folder.glob(".env*")
        if path.is_file() and not _matches(path.name, exclude)
    ]
    _check(kept, hidden, folder)
    return _with_card(kept, folder)


def publish(
    uploads: Sequence[Upload],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model and optimizer state",
    api: HfApi | None = None,
) -> str:
    """Makes the repository where there is none, and puts all files into it with one commit.

    Returns:
        the address of the commit.

    Raises:
        ValueError: the Hub has refused, or could not be reached; the message has no token in it.
    """
    api = HfApi() if api is None else api
    operations = [CommitOperationAdd(upload.name, str(upload.path)) for upload in uploads]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo, operations=operations, commit_message=message, revision=revision
        )
    except _ERRORS as error:
        raise ValueError(_reason(error, repo)) from None
    return str(commit.commit_url)


def _check_complete(checkpoint: str | Path) -> None:
    problem = incomplete_because(checkpoint)
    if problem:
        raise ValueError(f"checkpoint {str(checkpoint)!r} is not complete: {problem}")


def _is_aside(path: Path) -> bool:
    """Whether a file is hidden, or in a checkpoint's folder or one of logs."""
    folders = path.parts[:-1]
    return any(part.startswith(".") for part in path.parts) or any(
        part.startswith(f"{PREFIX_CHECKPOINT_DIR}-") or part in ("runs", "logs", "__pycache__")
        for part in folders
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check(uploads: Sequence[Upload], hidden: Sequence[Upload], folder: Path) -> None:
    """Raises ValueError that names every file that may not be published."""
    problems = [
        f"{upload.name}: {why}" for upload in [*uploads, *hidden] if (why := _refusal(upload))
    ]
    if problems:
        raise ValueError(
            f"nothing was published, because of {'; '.join(problems)}. Remove them, or leave them "
            "out with --exclude PATTERN"
        )
    if not any(upload.path.suffix == ".safetensors" for upload in uploads):
        raise ValueError(f"{str(folder)!r} holds no weights in safetensors")


def _refusal(upload: Upload) -> str:
    """Why a file may not be published; nothing where it may."""
    path = upload.path
    if _matches(path.name, _SECRET_NAMES):
        return "its name is that of a secret"
    if _matches(path.name, _PICKLES):
        if not _matches(path.name, _TRAINER_STATE):
            return "a pickle, which may run code where it is loaded (weights go as safetensors)"
        if not _is_plain(path):
            return "a pickle that holds more than tensors and plain data"
    if path.suffix in _TEXTS and upload.size <= _MAX_TEXT:
        content = path.read_bytes()
        for what, pattern in _SECRETS.items():
            if pattern.search(content):
                return f"it has {what} in it"
    return ""


def _is_plain(path: Path) -> bool:
    """Whether torch's safe unpickler, which runs no code of a file, can read all of it."""
    try:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError):
        return False
    return True


def _with_card(uploads: list[Upload], folder: Path) -> list[Upload]:
    """The files with a card at the top: the checkpoint's, where the run has none of its own."""
    names = {upload.name: upload for upload in uploads}
    if CARD in names:
        return uploads
    of_checkpoint = names.get(f"{CHECKPOINT_IN_REPO}/{CARD}")
    if of_checkpoint is None:
        raise ValueError(f"{str(folder)!r} has no {CARD}: trainer.create_model_card() writes one")
    return [Upload(of_checkpoint.path, CARD), *uploads]


def _reason(error: Exception, repo: str) -> str:
    """What went wrong, in one line and without any token."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    words = {
        401: "not logged in, or the token is not valid: run `hf auth login`",
        403: f"the token may not write to {repo!r}",
        404: f"there is no place for {repo!r}: is the name of the user or organization right?",
        409: f"{repo!r} has been changed meanwhile: push again",
    }
    text = words.get(status or 0) or " ".join(str(error).split())
    for pattern in _SECRETS.values():
        text = pattern.sub(b"(secret)", text.encode()).decode()
    return f"the Hub refused: {text}" if status else f"the Hub could not be reached: {text}"
