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


@pytest.mark.parametrize("is_allowed", [False, True])
def test_more_than_is_allowed_is_given_back_meanwhile(is_allowed: bool) -> None:
    """The check after a batch gives back what is free where the process is beyond the bound."""
    half = _BLOCKS * _BYTES // 2
    most = resident_bytes() + (100 if is_allowed else 1) * half
    with freed_memory_kept(most) as keep_within:
        _batch()
        held = resident_bytes()
        assert (held < most) == is_allowed
        keep_within()
        if is_allowed:
            assert resident_bytes() > held - half
        else:
            assert resident_bytes() < most
