"""The one way functions are compiled.

Compiled on first use, then kept in numba's cache on disk, where one file is one entry: numba does
not notice a change in *another* file, so a compiled function may call only compiled functions of
its own module, and constants it takes from another must never change their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile a function with numba: without the GIL, cached, inlined, without reassociation.

    Inlined, because an array handed to a function costs a dozen arguments.  No fast-math, so that
    a column's sums have the same bits wherever the columns around it are cut.
    """
    compile_ = numba.njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
    return cast(Function, compile_(function))
