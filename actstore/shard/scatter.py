"""The loop that reads rows of a shard and puts each in a place of its own, compiled.

Rows are read a stretch and a column chunk at a time into memory that stays in the second cache, and
copied from there: main memory is written once.  Where a row goes next no processor can guess, so it
is told ahead.  In Python every step would cost as much as the read it asks for, and two threads
would wait for the interpreter's lock, not for the disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from actstore.compiled import compiled
from actstore.shard.checksum import CHECKSUM_BYTES

_GAP_BYTES = 1 << 13  # so many cost less to read than another call
_AHEAD_BYTES = 1 << 12  # announced before they are written
_LINE_BYTES = 64

# Functions of libc; an address and an integer of its size are handed over alike.
_pread: Any = types.ExternalFunction(
    "pread", types.intp(types.int32, types.intp, types.uintp, types.int64)
)
_memcpy: Any = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uintp))


def _announce(_: Any, address: types.Type) -> Any:
    """Tell the processor that the cache line at an address will be written."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        # To write, to keep, data.
        flags = [number(1), number(3), number(1)]
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *flags])
        return context.get_dummy_value()

    return types.void(types.intp), generate


_prefetch = intrinsic(_announce)


@compiled
def scatter(
    fd: int,
    rows: NDArray[np.int64],
    addresses: NDArray[np.int64],
    width_bytes: int,
    row_bytes: int,
    chunk_rows: int,
    scratch: NDArray[np.uint8],
) -> Any:
    """Read rows to addresses.

    Parameters
    ----------
    fd : int
        Descriptor of the file.
    rows : ndarray of int64 (n,)
        Ascending; all in bands that were written.
    addresses : ndarray of int64 (n,)
        Where in memory each row begins; nothing is checked.
    width_bytes, row_bytes : int
        Bytes of a row, and of its part in a column chunk.
    chunk_rows : int
        Rows of a chunk.
    scratch : ndarray of uint8
        Takes what is read at once: one row of a chunk at least.

    Returns
    -------
    failed : int
        Where in the file nothing could be read; -1 if all was.
    n_reads, n_bytes : int
        Reads, and what they read.
    """
    chunk_bytes = chunk_rows * row_bytes + CHECKSUM_BYTES
    n_chunks = -(-width_bytes // row_bytes)
    most = len(scratch) // row_bytes
    ahead = max(1, _AHEAD_BYTES // row_bytes)
    source = scratch.ctypes.data
    n_reads = n_bytes = 0
    first = 0
    while first < len(rows):
        start = rows[first]
        band = start // chunk_rows
        end = min(start + most, (band + 1) * chunk_rows)
        last = first + 1
        while last < len(rows) and rows[last] < end:
            if (rows[last] - rows[last - 1] - 1) * row_bytes > _GAP_BYTES:
                break
            last += 1
        size = (rows[last - 1] + 1 - start) * row_bytes
        place = band * n_chunks * chunk_bytes + (start - band * chunk_rows) * row_bytes
        for c in range(n_chunks):
            done = 0
            while done < size:
                n = _pread(fd, source + done, size - done, place + done)
                if n <= 0:
                    return place + done, n_reads, n_bytes
                n_reads += 1
                done += n
            n_bytes += size
            inside = c * row_bytes
            for i in range(first, last):
                if i + ahead < last:
                    for line in range(0, row_bytes, _LINE_BYTES):
                        _prefetch(addresses[i + ahead] + inside + line)
                _memcpy(
                    addresses[i] + inside,
                    source + (rows[i] - start) * row_bytes,
                    min(row_bytes, width_bytes - inside),
                )
            place += chunk_bytes
        first = last
    return -1, n_reads, n_bytes
