"""Freed memory stays with the process while a capture runs, within its budget.

A forward pass frees hundreds of megabytes that the next one asks for again.  Left to itself, glibc
gives the operating system back what lies free at the end of its heap, and every batch pays a page
fault for each 4 KiB of it: up to 50 us of the processor a token, a sixth of what a small model
takes.  Elsewhere (macOS, Windows, musl) nothing is done: their allocators decide.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pyarrow as pa

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# Larger blocks have pages of their own, which go as they go: in the heap each would leave a hole
# that its successor, aligned a little differently, does not fit into.
_LARGE = 32 * 2**20
_KEEP_ALL = 2**31 - 1
_USUAL = 2 * _LARGE  # what glibc's own rule arrives at once large blocks have come and gone


def resident_bytes() -> int:
    """Return the memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


@contextmanager
def freed_memory_kept(most_bytes: int) -> Iterator[Callable[[], None]]:
    """Keep what is freed for what is asked for next; give it back at the end.

    The setting is the whole process's.  Yields a function to be called after every batch: it gives
    back what is free if the process has more than `most_bytes` then.  Of what batches leave behind
    small pieces stay, the next batch's large blocks no longer fit between them, and what is free,
    but of no use, would grow for a long while.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        yield lambda: None
        return

    def check() -> None:
        if resident_bytes() > most_bytes:
            give_back()

    libc.mallopt(_MMAP_THRESHOLD, _LARGE)
    libc.mallopt(_TRIM_THRESHOLD, _KEEP_ALL)
    try:
        yield check
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _USUAL)
        give_back()


def give_back() -> None:
    """Give what is free now to the operating system, wherever in the heaps it lies."""
    pa.default_memory_pool().release_unused()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
