"""Streams write what they are given, whatever the sizes and turns."""

import errno
import os

import numpy as np
import pytest

from actstore import durable


@pytest.mark.parametrize("direct", [True, False])
def test_files_that_take_turns_hold_their_own_bytes(tmp_path, monkeypatch, direct):
    """Three files written alternately, in pieces of any size, read back byte for byte."""
    if not direct:
        monkeypatch.setattr(durable, "_DIRECT", 0)
    rng = np.random.default_rng(0)
    streams = durable.Streams()
    files = [streams.open(tmp_path / str(i)) for i in range(3)]
    expected = [b"", b"", b""]
    for size in [0, 1, 4, 4095, 4096, 4097, 1 << 20, (1 << 20) + 3, 3_000_017, 5] * 2:
        i = int(rng.integers(3))
        data = rng.bytes(size)
        assert files[i].write(memoryview(data)) == size
        expected[i] += data
    for file in files:
        file.finish()
        file.close()  # again is nothing

    assert [(tmp_path / str(i)).read_bytes() for i in range(3)] == expected


def test_a_file_system_that_refuses_direct_writes_is_written_the_usual_way(tmp_path, monkeypatch):
    """Where a direct write fails as one that cannot be, the file is the same."""
    file = durable.Streams().open(tmp_path / "x")
    was_direct, real, refused = file._is_direct, os.write, []

    def write(fd, data):
        if file._is_direct:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "no direct writing here")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    file.write(b"a" * 3_000_000)
    file.finish()

    assert (tmp_path / "x").read_bytes() == b"a" * 3_000_000
    assert len(refused) == was_direct


def test_a_file_that_fails_is_closed_without_another_attempt(tmp_path, monkeypatch):
    """After a full disk, closing writes nothing and raises nothing, and others go on."""
    streams = durable.Streams()
    failed, other = streams.open(tmp_path / "failed"), streams.open(tmp_path / "other")

    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            failed.write(bytes(3_000_000))
        failed.close()
    other.write(b"whole")
    other.finish()

    assert (tmp_path / "other").read_bytes() == b"whole"
