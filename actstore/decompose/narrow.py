"""Stored 16-bit values as bfloat16, clipped on the way: what products of an online pass take.

A float32 block in between costs more than the products: it is written once and read three times,
each time twice the bytes.  Here a value is read once and written once.  A float16 is half of a
float32's bits moved into place and multiplied by 2^112, whose exponent has as many more values;
the sixteen bits of a bfloat16 are then the upper half, rounded to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.compiled import compiled

_AT_ONCE = 1024  # values that stay in the first cache between the steps


@compiled
def from_float16(
    values: npt.NDArray[np.uint16], out: npt.NDArray[np.uint16], column: int, clip: bool
) -> Any:
    """Write float16 bits ``(n, w)`` as bfloat16 bits into ``out[:n, column : column + w]``.

    Parameters
    ----------
    values, out : ndarray of uint16
        Both in C order.
    column : int
        Where the columns go.
    clip : bool
        Whether values below zero become zero.

    Returns
    -------
    bool
        Whether all values are finite.
    """
    n, width = values.shape
    bits = np.empty(_AT_ONCE, np.uint32)
    floats = bits.view(np.float32)
    keep = np.uint32(0) if clip else np.uint32(0x8000)
    wrong = np.uint32(0)
    for i in range(n):
        for first in range(0, width, _AT_ONCE):
            m = min(_AT_ONCE, width - first)
            source = values[i, first : first + m]
            target = out[i, column + first : column + first + m]
            for j in range(m):
                bits[j] = np.uint32(source[j] & np.uint32(0x7FFF)) << np.uint32(13)
            for j in range(m):
                floats[j] *= np.float32(2.0**112)
            for j in range(m):
                word = bits[j]
                sign = np.uint32(source[j]) & np.uint32(0x8000)
                word = (
                    word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
                ) >> np.uint32(16)
                # Infinity and NaN begin at 0x47800000 = 65,536, one above the largest float16.
                wrong |= np.uint32(bits[j] >= np.uint32(0x47800000))
                if clip:
                    word = word if sign == 0 else np.uint32(0)
                target[j] = np.uint16(word | (sign & keep))
    return wrong == 0
