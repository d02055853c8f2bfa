from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

import hf_precond
from hf_precond.host_memory import keep_freed_memory

# Prints the pages that had to be mapped for fifty tensors from 8 MB up, one after the other, each a
# little larger: glibc by itself learns from what is freed, and keeps room for that size at most.
SCRIPT = """
import resource, sys, torch
from hf_precond import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(2**21)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for index in range(50):
    torch.ones(2**21 + 4096 * index)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_mapped(mode: str) -> int:
    command = [sys.executable, "-c", SCRIPT, mode]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_not_mapped_anew() -> None:
    assert pages_mapped("keep") < pages_mapped("leave") / 4


@pytest.mark.parametrize(
    "library", [SimpleNamespace(), SimpleNamespace(mallopt=lambda name, value: 0)]
)
def test_without_glibc_nothing_changes(
    library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert not keep_freed_memory()


def test_it_is_public() -> None:
    assert hf_precond.keep_freed_memory is keep_freed_memory
