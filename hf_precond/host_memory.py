"""Memory of the host that has been freed, kept for the next tensors."""

from __future__ import annotations

import ctypes

# mallopt's names for them, of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK, _KEPT = 1 << 25, 1 << 28


def keep_freed_memory() -> bool:
    """Lets this process keep memory that tensors on the CPU have given back.

    glibc returns blocks of some megabytes to the system as soon as they are free. An optimizer step
    on a CPU frees several of that size for each layer, and has to have them mapped anew for the
    next one, page by page. From now on blocks of up to 32 MiB stay, 256 MiB of them at most.

    This is a setting of the whole process, so no optimizer makes it: ``trainer_ext`` does where the
    Trainer trains on a CPU, and a loop of one's own calls this once.

    Returns:
        whether it could be done: without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; no such library; Windows
        return False
    done = mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK), mallopt(_TRIM_THRESHOLD, _KEPT)
    return done == (1, 1)
