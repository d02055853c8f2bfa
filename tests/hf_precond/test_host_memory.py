from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

import hf_precond
from hf_precond.host_memory import keep_freed_memory

# Prints the pages that had to be mapped for fifty tensors of 8 MB, one after the other: the least
# of three times, as a small block in the way makes the heap grow once.
SCRIPT = """
import resource, torch
from hf_precond import keep_freed_memory
assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def tensors(count):
    for _ in range(count):
        torch.ones(2**21).add_(1)
def mapped():
    before = faults()
    tensors(50)
    return faults() - before
tensors(3)
print(min(mapped() for _ in range(3)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_not_mapped_anew() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Mapped anew it would be 50 times 2,048 pages, or 50 times 4 large ones.
    assert int(done.stdout) < 50


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
