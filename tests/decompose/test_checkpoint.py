"""Checkpoints of fits that run at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actstore import durable
from actstore.decompose.checkpoint import Checkpoint
from actstore.errors import StoreBusy


def test_folders_are_swept_and_locked_by_one_at_a_time(tmp_path: Path) -> None:
    """Else a fit that begins could lose its folder to the sweep of another that begins."""
    first = Checkpoint(tmp_path, {"seed": 1})
    with ThreadPoolExecutor(1) as pool:
        for call in (first.__enter__, first.clear):
            with durable.lock(tmp_path / "work/fits.lock", "fits", wait=True):
                waiting = pool.submit(call)
                with pytest.raises(TimeoutError):
                    waiting.result(timeout=0.1)
                assert first.folder.exists() == (call == first.clear)
            waiting.result()
            assert first.folder.exists() == (call == first.__enter__)
    first.__exit__()


def test_a_fit_that_runs_is_not_swept(tmp_path: Path) -> None:
    """Another leaves its folder alone, and the same is refused."""
    with Checkpoint(tmp_path, {"seed": 1}) as first, Checkpoint(tmp_path, {"seed": 2}):
        assert first.folder.is_dir()
        with pytest.raises(StoreBusy, match="with the same arguments"):
            Checkpoint(tmp_path, {"seed": 1}).__enter__()
