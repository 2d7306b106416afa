"""Streams write what they are given, whatever the sizes and turns."""

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
        file.close()
        file.close()  # again is nothing

    assert [(tmp_path / str(i)).read_bytes() for i in range(3)] == expected


def test_a_file_system_without_direct_writing_is_written_the_usual_way(tmp_path, monkeypatch):
    """Where opening for direct writing is refused, the file is the same."""
    real = os.open

    def refusing(path, flags, *args):
        if flags & durable._DIRECT:
            raise OSError(22, "no direct writing here")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refusing)
    file = durable.Streams().open(tmp_path / "x")
    file.write(b"a" * 5000)
    file.close()

    assert (tmp_path / "x").read_bytes() == b"a" * 5000
