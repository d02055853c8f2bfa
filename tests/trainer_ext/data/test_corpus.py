"""Corpora: what is in them, in which order, and what is refused."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import datasets
import pytest

from trainer_ext.data import corpus as corpus_module
from trainer_ext.data.corpus import (
    hold_out_tail,
    is_validation_text,
    load_corpus,
    load_stdlib,
    read_rows,
    stdlib_files,
)

# Without the time of packing: it would be part of a test's name, another in each test process.
PACKED = gzip.compress(b"some text\n" * 50, mtime=0)
LINES = ["first line\n", "\n", "dritte Zeile: \u00fc\n"]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library with modules in wanted and in unwanted folders."""
    for number in range(60):
        path = tmp_path / f"package{number % 3}" / f"module_{number:02}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"VALUE = {number}\n")
    for folder in ("test", "idlelib", "site-packages", "lib2to3"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "unwanted.py").write_text("UNWANTED = True\n")
    (tmp_path / "empty.py").write_text("\n")
    return tmp_path


def test_stdlib_files_are_sorted_and_exclude_tests(library: Path) -> None:
    names = [path.relative_to(library).as_posix() for path in stdlib_files(library)]
    assert names == sorted(names)
    assert len(names) == 61
    assert not any("unwanted" in name for name in names)


def test_stdlib_split_is_disjoint_complete_and_decided_by_content(library: Path) -> None:
    corpus = load_stdlib(root=library)
    train, validation = corpus.train["text"], corpus.validation["text"]
    assert sorted([*train, *validation]) == sorted(f"VALUE = {n}\n" for n in range(60))
    assert all(map(is_validation_text, validation))
    assert not any(map(is_validation_text, train))
    (library / "package0" / "module_00.py").rename(library / "zzz_renamed.py")
    renamed = load_stdlib(root=library)
    assert sorted(renamed.validation["text"]) == sorted(validation)


def test_stdlib_of_this_interpreter_has_source() -> None:
    assert any(path.name == "argparse.py" for path in stdlib_files())


def test_stdlib_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no library source text"):
        load_stdlib(root=tmp_path)


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz", ".txt.gz"])
def test_text_rows_are_lines_with_their_newlines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    content = "".join(LINES).encode()
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    assert list(read_rows(path)) == LINES


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines_give_their_text_field(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    content = "\n".join(json.dumps({"url": "u", "text": line}) for line in LINES).encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    assert list(read_rows(path)) == LINES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "no text"}\n', "'text' field"),
        ("a.jsonl", b"not json\n", "'text' field"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.txt.gz", b"plain text", "not UTF-8"),
        ("a.txt.xz", b"plain text", "not UTF-8"),
        ("cut.txt.gz", PACKED[:-12], "not UTF-8 text, plain or packed"),
        ("cut.txt.xz", lzma.compress(b"some text\n" * 50)[:-12], "not UTF-8 text, plain or packed"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(path))
    assert name in str(error.value)


def test_files_without_validation_file_hold_out_the_tail(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number}\n" for number in range(100)))
    corpus = load_corpus(train_file=str(path), validation_split_percentage=10)
    assert corpus.train["text"] == [f"{n}\n" for n in range(90)]
    assert corpus.validation["text"] == [f"{n}\n" for n in range(90, 100)]
    assert not corpus.rows_are_documents


def test_streamed_files_give_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    corpus = load_corpus(train_file=str(path), validation_file=str(path), streaming=True)
    assert isinstance(corpus.train, datasets.IterableDataset)
    assert [row["text"] for row in corpus.train] == LINES


@pytest.mark.parametrize("percentage", [0, 100, -5])
def test_hold_out_percentage_has_a_range(percentage: int) -> None:
    with pytest.raises(ValueError, match=f"validation_split_percentage={percentage} must be in"):
        hold_out_tail(datasets.Dataset.from_dict({"text": ["a"] * 10}), percentage)


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="too few"):
        hold_out_tail(datasets.Dataset.from_dict({"text": ["a"]}), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_file": "v.txt"}, "needs a train_file"),
        ({"train_file": "t.txt", "dataset_name": "stdlib"}, "exclude each other"),
        ({"train_file": "missing.txt"}, "'missing.txt' does not exist"),
        ({"train_file": "t.txt", "streaming": True}, "needs a validation_file"),
        ({"train_file": "t.txt", "validation_file": "v.jsonl"}, "of one kind"),
        ({"dataset_config_name": "en"}, "has no configurations"),
    ],
)
def test_bad_combinations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(**options)


# --- Hub datasets, with the download replaced -----------------------------------------------------


def _fake_hub(
    monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[str]], column: str = "text"
) -> list[tuple[str, str | None]]:
    """Replaces `load_dataset`; returns the list of what will be asked of it."""
    requests: list[tuple[str, str | None]] = []

    def load_dataset(name: str, config: str | None, *, streaming: bool) -> dict[str, object]:
        requests.append((name, config))
        parts = {
            split: datasets.Dataset.from_dict({column: texts, "url": texts})
            for split, texts in splits.items()
        }
        return {k: v.to_iterable_dataset() if streaming else v for k, v in parts.items()}

    monkeypatch.setattr(corpus_module.datasets, "load_dataset", load_dataset)
    return requests


def test_c4_defaults_to_english_and_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _fake_hub(monkeypatch, {"train": ["a", "b"], "validation": ["c"]})
    corpus = load_corpus(dataset_name="allenai/c4", streaming=True)
    assert requests == [("allenai/c4", "en")]
    assert list(corpus.train) == [{"text": "a"}, {"text": "b"}]
    assert list(corpus.validation) == [{"text": "c"}]
    assert corpus.rows_are_documents


def test_wikitext_rows_are_lines_not_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _fake_hub(monkeypatch, {"train": ["a\n"], "validation": ["b\n"]})
    corpus = load_corpus(dataset_name="wikitext", dataset_config_name="wikitext-103-raw-v1")
    assert requests == [("Salesforce/wikitext", "wikitext-103-raw-v1")]
    assert not corpus.rows_are_documents


def test_hub_dataset_without_validation_split_holds_out_the_tail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _fake_hub(monkeypatch, {"train": [str(n) for n in range(20)]})
    corpus = load_corpus(dataset_name="someone/text", validation_split_percentage=5)
    assert corpus.validation["text"] == ["19"]


@pytest.mark.parametrize(
    ("splits", "column", "streaming", "message"),
    [
        ({"test": ["a"]}, "text", False, "no 'train' split"),
        ({"train": ["a"]}, "body", False, "no 'text' column"),
        ({"train": ["a"]}, "text", True, "no 'validation' split to stream"),
    ],
)
def test_unfit_hub_datasets_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    splits: dict[str, list[str]],
    column: str,
    streaming: bool,
    message: str,
) -> None:
    _fake_hub(monkeypatch, splits, column)
    with pytest.raises(ValueError, match=message):
        load_corpus(dataset_name="someone/text", streaming=streaming)
