"""What can happen to a saved optimizer state on its way back: accidents and forgeries.

A mutation changes the files of a folder, with a random generator of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer_ext.checkpoint import FILE_NAME, INDEX_NAME, digest

Mutation = Callable[[Path, Random], None]

# None of them is a learning rate, a decay, a shape, a count or a name.
JUNK: tuple[Any, ...] = (None, "junk", -1, -0.5, float("nan"), [], {}, [[]], {"a": 1}, "1e-3", "")
# Of safetensors: other ones, rare ones and none.
DTYPES = ("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X1")
NESTED = "[" * 100_000
PAYLOAD_NAME = "executed"


# --- accidents ------------------------------------------------------------------------------------


def overwrite_bytes(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    content[start : start + rng.randint(1, 64)] = rng.randbytes(rng.randint(1, 64))
    path.write_bytes(content)


def flip_bits(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 10))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(content))))])


def append_bytes(path: Path, rng: Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)))


def insert_bytes(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    at = rng.randrange(len(content))
    path.write_bytes(content[:at] + rng.randbytes(rng.randint(1, 16)) + content[at:])


def delete_bytes(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    at = rng.randrange(len(content))
    path.write_bytes(content[:at] + content[at + rng.randint(1, 16) :])


def zero_a_page(path: Path, rng: Random) -> None:
    """What a crash of the machine leaves of a file whose size was written before its content."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(0, len(content), 512)
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def replace_by_another_file(path: Path, rng: Random) -> None:
    kind = rng.choice(("pickle", "text", "noise", "weights", "folder", "nothing", "loop"))
    path.unlink()
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(path.with_name(PAYLOAD_NAME))))
    elif kind == "text":
        path.write_text('{"format_version": 1}')
    elif kind == "noise":
        path.write_bytes(rng.randbytes(1000))
    elif kind == "weights":
        save_file({"weight": torch.ones(3)}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# --- the header of safetensors --------------------------------------------------------------------


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file and the bytes behind it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + data)


def change_header_length(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    lengths = (0, 1, length - 1, length + 1, 2 * length, 10**8, 2**31, 2**63, 2**64 - 1)
    path.write_bytes(struct.pack("<Q", rng.choice(lengths)) + content[8:])


def edit_header(path: Path, rng: Random) -> None:
    """Dtypes, shapes and offsets that contradict the file, each other or reason."""
    header, data = read_raw(path)
    name, other = rng.sample(sorted(set(header) - {"__metadata__"}), 2)
    entry = header[name]
    kind = rng.randrange(8)
    if kind == 0:
        dtypes = [
            "F64",
            "F16",
            "BF16",
            "I32",
            "I64",
            "U8",
            "BOOL",
            "F8_E4M3",
            "F8_E5M2",
            "F8_E8M0",
            "F4",
            "C64",
            "X1",
        ]
        entry["dtype"] = rng.choice(dtypes)
    elif kind == 1:
        entry["shape"] = rng.choice(([], [0], [-1], [2**40], [2**62, 4], *JUNK))
    elif kind == 2:
        entry["data_offsets"] = rng.choice(([0, 0], [8, 4], [0, 2**62], header[other], None))
    elif kind == 3:
        header[name], header[other] = header[other], header[name]
    elif kind == 4:
        header["state.unknown.step"] = entry
    elif kind == 5:
        del header[name]
    elif kind == 6:
        header["__metadata__"] = rng.choice((*JUNK, {"header": 1, "sha256": []}))
    else:
        header[rng.choice(("", "\0", "/etc", "ü" * 1000, "state"))] = header.pop(name)
    write_raw(path, json.dumps(header).encode(), data)


def break_header(path: Path, rng: Random) -> None:
    _, data = read_raw(path)
    texts = (NESTED, "{", "null", "[]", '{"a": NaN}', '{"__metadata__": {"a": 1e999}}')
    encoded = [text.encode() for text in texts]
    write_raw(path, rng.choice((*encoded, b"\xff\xfe", b"")), data)


# --- our metadata ---------------------------------------------------------------------------------


def rewrite(
    path: Path,
    change: Callable[[dict[str, Tensor], dict[str, str]], None],
    *,
    forge: bool = False,
) -> None:
    """Writes the file again after a change; a forger computes the checksum anew, too."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    if forge:
        metadata["sha256"] = digest(tensors, metadata["header"])
    path.unlink()
    save_file(tensors, path, metadata=metadata)


def spoil_metadata(path: Path, rng: Random) -> None:
    values = ("", "{", "null", "[]", "0" * 64, NESTED, '{"format_version": 1}', "\ud7ff")

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        key = rng.choice(("header", "sha256"))
        if rng.random() < 0.2:
            del metadata[key]
        else:
            metadata[key] = rng.choice(values)

    rewrite(path, change)


def junk_somewhere(content: Any, rng: Random) -> Any:
    """Replaces or removes one value, at any depth, of plain data."""
    if isinstance(content, dict | list) and content and rng.random() < 0.9:
        key = rng.choice(sorted(content) if isinstance(content, dict) else range(len(content)))
        if rng.random() < 0.15:
            del content[key]
        else:
            content[key] = junk_somewhere(content[key], rng)
        return content
    return rng.choice(JUNK)


def junk_in_our_header(path: Path, rng: Random) -> None:
    rewrite(path, lambda _, metadata: _junk_header(metadata, rng))


def forged_junk_in_our_header(path: Path, rng: Random) -> None:
    rewrite(path, lambda _, metadata: _junk_header(metadata, rng), forge=True)


def _junk_header(metadata: dict[str, str], rng: Random) -> None:
    metadata["header"] = json.dumps(junk_somewhere(json.loads(metadata["header"]), rng))


def swap_equal_tensors(path: Path, rng: Random) -> None:
    """Two tensors of one shape change places: only the checksum can tell."""

    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        pairs = [
            (one, two)
            for one in tensors
            for two in tensors
            if one < two
            and tensors[one].shape == tensors[two].shape
            and not torch.equal(tensors[one], tensors[two])
        ]
        one, two = rng.choice(pairs)
        tensors[one], tensors[two] = tensors[two], tensors[one]

    rewrite(path, change)


def forged_tensor(path: Path, rng: Random) -> None:
    """A tensor that this optimizer cannot have, under a checksum that fits."""

    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        name = rng.choice(sorted(name for name in tensors if not name.endswith(".step")))
        step = rng.choice(sorted(name for name in tensors if name.endswith(".step")))
        kind = rng.randrange(7)
        if kind == 0:
            dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool)
            tensors[name] = tensors[name].to(rng.choice(dtypes))
        elif kind == 1:
            tensors[name] = tensors[name].unsqueeze(0)
        elif kind == 2:
            tensors[name] = tensors[name][..., :-1].contiguous()
        elif kind == 3:
            tensors[f"{name}x"] = tensors.pop(name)
        elif kind == 4:
            del tensors[name]
        elif kind == 5:
            tensors["state.0.weight.more"] = torch.ones(3)
        else:
            bad = rng.choice((float("nan"), float("inf"), -1.0, 0.5))
            tensors[step] = torch.full_like(tensors[step], bad)

    rewrite(path, change, forge=True)


# --- shards ---------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("optimizer-*.safetensors"))


def drop_a_shard(folder: Path, rng: Random) -> None:
    rng.choice(shards(folder)).unlink()


def swap_shards(folder: Path, rng: Random) -> None:
    one, two = rng.sample(shards(folder), 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def copy_a_shard(folder: Path, rng: Random) -> None:
    one, two = rng.sample(shards(folder), 2)
    two.write_bytes(one.read_bytes())


def spoil_a_shard(folder: Path, rng: Random) -> None:
    rng.choice(SINGLE)(rng.choice(shards(folder)), rng)


def spoil_the_index(folder: Path, rng: Random) -> None:
    rng.choice((overwrite_bytes, flip_bits, truncate, insert_bytes, delete_bytes))(
        folder / INDEX_NAME, rng
    )


def junk_in_the_index(folder: Path, rng: Random) -> None:
    path = folder / INDEX_NAME
    text = json.dumps(junk_somewhere(json.loads(path.read_text()), rng))
    path.write_text(rng.choice((text, text, text, NESTED)))


def foreign_names_in_the_index(folder: Path, rng: Random) -> None:
    """Files of other folders, or no states at all, in place of a shard."""
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    digests = index["metadata"]["sha256"]
    names = ("../optimizer-00001-of-00002.safetensors", "/etc/hostname", ".", "", INDEX_NAME)
    digests[rng.choice(names)] = digests.pop(rng.choice(sorted(digests)))
    path.write_text(json.dumps(index))


SINGLE: tuple[Mutation, ...] = (
    overwrite_bytes,
    flip_bits,
    truncate,
    append_bytes,
    insert_bytes,
    delete_bytes,
    zero_a_page,
    replace_by_another_file,
    change_header_length,
    edit_header,
    break_header,
    spoil_metadata,
    junk_in_our_header,
    forged_junk_in_our_header,
    swap_equal_tensors,
    forged_tensor,
)
SHARDED: tuple[Mutation, ...] = (
    drop_a_shard,
    swap_shards,
    copy_a_shard,
    spoil_a_shard,
    spoil_the_index,
    junk_in_the_index,
    foreign_names_in_the_index,
)


def on_the_file(mutation: Mutation) -> Mutation:
    """A mutation of a file as one of the folder that holds it."""
    return lambda folder, rng: mutation(folder / FILE_NAME, rng)
