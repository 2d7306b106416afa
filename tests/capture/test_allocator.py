"""Memory that a batch frees is there for the next one, and for the system once it is over."""

from __future__ import annotations

import platform
import resource

import psutil
import pytest
import torch

from actstore.capturing.allocator import freed_memory_kept, resident_bytes

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told anything"
)

_BLOCKS, _BYTES = 8, 20 * 2**20


def _batch() -> int:
    """Fill fresh blocks, as many at once; return the pages that had to be found for them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(_BYTES, dtype=torch.uint8) for _ in range(_BLOCKS)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_was_freed_is_used_again_without_a_page_fault() -> None:
    """Batches after the first ones find the memory of those before them."""
    with freed_memory_kept(2**60):
        faults = [_batch() for _ in range(5)]
        # One block may find its place taken by what the process holds besides; not all of them.
        assert faults[-1] < 1.01 * _BYTES / 4096


def test_at_the_end_memory_goes_back_to_the_system() -> None:
    """A process that goes on does not hold what a capture needed."""
    rss = psutil.Process().memory_info
    with freed_memory_kept(2**60):
        _batch()
        held = rss().rss
    assert rss().rss < held - _BLOCKS * _BYTES // 2


def test_more_than_is_allowed_is_given_back_meanwhile() -> None:
    """Called after a batch, the check keeps what is free within the bound, or does nothing."""
    most = resident_bytes() + _BLOCKS * _BYTES // 2
    with freed_memory_kept(most) as keep_within:
        _batch()
        assert resident_bytes() > most
        keep_within()
        assert resident_bytes() < most
        faults = [(_batch(), keep_within())[0] for _ in range(2)]
        assert min(faults) > 0.5 * _BLOCKS * _BYTES / 4096
