"""Text corpora as `datasets` objects: the standard library's source, local files, the Hub.

Every corpus is a pair of datasets with one `text` column. A row is either a whole document, which
packing closes with the end-of-text token, or one line of a running text, which it does not.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias, cast

import datasets

TextDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset

STDLIB = "stdlib"
STDLIB_EXCLUDED_FOLDERS = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages"})
STDLIB_VALIDATION_SHARE = 20
"""One standard-library file in this many goes to the validation split."""

HUB_DEFAULT_CONFIGS = {
    "allenai/c4": "en",
    "wikitext": "wikitext-2-raw-v1",
    "Salesforce/wikitext": "wikitext-2-raw-v1",
}
HUB_NAMES = {"wikitext": "Salesforce/wikitext"}
HUB_LINE_CORPORA = frozenset({"Salesforce/wikitext"})


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and validation text.

    Attributes:
        name: what the model card and the logs call it.
        rows_are_documents: a row is a document of its own, not a line of a longer one.
    """

    name: str
    train: TextDataset
    validation: TextDataset
    rows_are_documents: bool


def load_corpus(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    validation_split_percentage: int = 5,
    streaming: bool = False,
) -> Corpus:
    """Loads the corpus that the options name; the standard library's source when they name none.

    Raises:
        ValueError: for options that exclude each other, a missing file, or no validation text.
    """
    if train_file is None and validation_file is not None:
        raise ValueError(f"validation_file={validation_file!r} needs a train_file")
    if train_file is not None:
        if dataset_name is not None:
            raise ValueError(
                f"dataset_name={dataset_name!r} and train_file={train_file!r} exclude each other"
            )
        return load_files(
            train_file,
            validation_file,
            validation_split_percentage=validation_split_percentage,
            streaming=streaming,
        )
    if dataset_name is None or dataset_name == STDLIB:
        if dataset_config_name is not None:
            raise ValueError(
                f"dataset_config_name={dataset_config_name!r}: {STDLIB!r} has no configurations"
            )
        return load_stdlib(streaming=streaming)
    return load_from_hub(
        dataset_name,
        dataset_config_name,
        validation_split_percentage=validation_split_percentage,
        streaming=streaming,
    )


# --- the standard library's own source text -------------------------------------------------------


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The running interpreter's library modules, sorted by relative path, tests left out."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    return [
        root / path
        for path in sorted(relative, key=Path.as_posix)
        if STDLIB_EXCLUDED_FOLDERS.isdisjoint(path.parts)
    ]


def is_validation_text(text: str) -> bool:
    """Whether a document belongs to the validation split, decided by its content alone.

    By content and not by name, so that a file present twice never sits on both sides.
    """
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % STDLIB_VALIDATION_SHARE == 0


def load_stdlib(*, streaming: bool = False, root: Path | None = None) -> Corpus:
    """The source text of the standard library: one document per module.

    Raises:
        ValueError: the interpreter came without its library's source.
    """
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files(root)]
    documents = [text for text in texts if text.strip()]
    train = [text for text in documents if not is_validation_text(text)]
    validation = [text for text in documents if is_validation_text(text)]
    if not train or not validation:
        raise ValueError(
            f"dataset_name={STDLIB!r}: this Python has no library source text; use train_file"
        )
    return Corpus(
        name=STDLIB,
        train=_from_texts(train, streaming=streaming),
        validation=_from_texts(validation, streaming=streaming),
        rows_are_documents=True,
    )


# --- local files ----------------------------------------------------------------------------------


def read_rows(path: str | Path) -> Iterator[str]:
    """Yields the lines of a text file, newline kept, or the `text` field of each JSON line.

    The name decides: `.xz` and `.gz` are unpacked, `.jsonl` (also `.jsonl.gz`) is parsed.

    Raises:
        ValueError: for a missing file, a file that is not UTF-8 text, a JSON line without `text`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"text file {str(path)!r} does not exist")
    with _open_text(path) as lines:
        try:
            if is_json_lines(path):
                yield from (_text_field(line, path) for line in lines if line.strip())
            else:
                yield from lines
        except (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
            raise ValueError(
                f"text file {str(path)!r} is not UTF-8 text, plain or packed as .xz or .gz: {error}"
            ) from error


def is_json_lines(path: str | Path) -> bool:
    """Whether the file's name says JSON lines, packed or not."""
    return ".jsonl" in Path(path).suffixes


def load_files(
    train_file: str,
    validation_file: str | None = None,
    *,
    validation_split_percentage: int = 5,
    streaming: bool = False,
) -> Corpus:
    """Local text; without a validation file the last rows of the training file are held out.

    Raises:
        ValueError: see `read_rows`; streaming without a validation file; files of two kinds.
    """
    if validation_file is not None and is_json_lines(train_file) != is_json_lines(validation_file):
        raise ValueError(
            f"train_file={train_file!r} and validation_file={validation_file!r} must be of one "
            "kind: both text or both .jsonl"
        )
    if validation_file is None and streaming:
        raise ValueError("streaming=True with a train_file needs a validation_file")
    train = _from_file(train_file, streaming=streaming)
    if validation_file is None:
        train, validation = hold_out_tail(train, validation_split_percentage)
    else:
        validation = _from_file(validation_file, streaming=streaming)
    return Corpus(
        name=Path(train_file).name,
        train=train,
        validation=validation,
        rows_are_documents=is_json_lines(train_file),
    )


# --- the Hub --------------------------------------------------------------------------------------


def load_from_hub(
    dataset_name: str,
    dataset_config_name: str | None = None,
    *,
    validation_split_percentage: int = 5,
    streaming: bool = False,
) -> Corpus:
    """A dataset with a `text` column from the Hugging Face Hub.

    Raises:
        ValueError: no `train` split, no `text` column, or streaming without a `validation` split.
    """
    config_name = dataset_config_name or HUB_DEFAULT_CONFIGS.get(dataset_name)
    repository = HUB_NAMES.get(dataset_name, dataset_name)
    splits = datasets.load_dataset(repository, config_name, streaming=streaming)
    if "train" not in splits:
        raise ValueError(f"dataset_name={dataset_name!r} has no 'train' split, only {list(splits)}")
    columns = splits["train"].column_names
    if columns is not None and "text" not in columns:
        raise ValueError(f"dataset_name={dataset_name!r} has no 'text' column, only {columns}")
    train = splits["train"].select_columns("text")
    if "validation" in splits:
        validation = splits["validation"].select_columns("text")
    elif streaming:
        raise ValueError(
            f"dataset_name={dataset_name!r} has no 'validation' split to stream, only "
            f"{list(splits)}"
        )
    else:
        train, validation = hold_out_tail(train, validation_split_percentage)
    return Corpus(
        name=dataset_name,
        train=train,
        validation=validation,
        rows_are_documents=repository not in HUB_LINE_CORPORA,
    )


# --- shared ---------------------------------------------------------------------------------------


def hold_out_tail(
    dataset: datasets.Dataset, percentage: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits off the last `percentage` of the rows: neighbouring lines stay on one side.

    Raises:
        ValueError: a percentage outside 1..99, or too few rows for two non-empty parts.
    """
    if not 1 <= percentage <= 99:
        raise ValueError(f"validation_split_percentage={percentage} must be in 1..99")
    held_out = max(1, len(dataset) * percentage // 100)
    kept = len(dataset) - held_out
    if kept < 1:
        raise ValueError(f"{len(dataset)} rows are too few to hold out a validation split")
    return dataset.select(range(kept)), dataset.select(range(kept, len(dataset)))


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")


def _text_field(line: str, path: Path) -> str:
    try:
        return str(json.loads(line)["text"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"text file {str(path)!r}: each line must be a JSON object with a 'text' field, got "
            f"{line.strip()[:60]!r}"
        ) from error


def _generate_rows(path: str) -> Iterator[dict[str, str]]:
    for text in read_rows(path):
        yield {"text": text}


def _from_file(path: str, *, streaming: bool) -> TextDataset:
    if not Path(path).is_file():
        raise ValueError(f"text file {path!r} does not exist")
    if streaming:
        return datasets.IterableDataset.from_generator(_generate_rows, gen_kwargs={"path": path})
    return datasets.Dataset.from_dict({"text": list(read_rows(path))})


def _from_texts(texts: list[str], *, streaming: bool) -> TextDataset:
    dataset = datasets.Dataset.from_dict({"text": texts})
    return dataset.to_iterable_dataset() if streaming else dataset
