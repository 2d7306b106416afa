"""CRC-32C: of data, of files, and of two runs of bytes joined without reading them again."""

from __future__ import annotations

import functools
import os

import google_crc32c
import numpy as np
from numpy.typing import NDArray

CHECKSUM_BYTES = 4
"""Bytes of a checksum in a file."""


def crc32c_of_file(path: str | os.PathLike[str]) -> int:
    """Return the crc32c of a file; one pass, memory one MiB.

    Raises
    ------
    OSError
        If the file cannot be opened or read.
    """
    crc32c = 0
    with open(path, "rb", buffering=0) as file:
        # Of bytes, unlike arrays, google_crc32c takes the checksum without the interpreter lock.
        while data := file.read(2**20):
            crc32c = extend(data, crc32c)
    return crc32c


def extend(data: bytes | NDArray[np.uint8], crc32c: int = 0) -> int:
    """Return the crc32c of data that follow bytes with a given crc32c."""
    return int(google_crc32c.extend(crc32c, data))


def encoded(crc32c: int) -> bytes:
    """Return a crc32c as Zarr's crc32c codec writes it."""
    return crc32c.to_bytes(CHECKSUM_BYTES, "little")


def join(crc32c: int, next_crc32c: int, next_bytes: int) -> int:
    """Return the crc32c of two runs of bytes from those of each and the length of the second."""
    for bit, image in enumerate(_shift(next_bytes)):
        if crc32c >> bit & 1:
            next_crc32c ^= image
    return next_crc32c


@functools.lru_cache(maxsize=64)
def _shift(n_bytes: int) -> tuple[int, ...]:
    """Return what n zero bytes make of each bit of a crc32c register: a 32 x 32 matrix over GF(2).

    Appending bytes is linear in the register, so n of them are the n-th power of one, by squaring.

    References
    ----------
    crc32_combine of zlib (M. Adler), with the polynomial of RFC 3720, appendix B.4.
    """

    def times(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            functools.reduce(int.__xor__, (left[i] for i in range(32) if column >> i & 1), 0)
            for column in right
        )

    # One zero bit: shift right, and fold the bit that falls out back in.
    power: tuple[int, ...] = (0x82F63B78, *(1 << bit for bit in range(31)))
    result = tuple(1 << bit for bit in range(32))
    n_bits = 8 * n_bytes
    while n_bits:
        if n_bits & 1:
            result = times(power, result)
        power = times(power, power)
        n_bits >>= 1
    return result
