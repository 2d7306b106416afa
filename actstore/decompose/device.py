"""Where products with blocks are made: on CUDA where this process has it, else on the processor.

A work asks twice.  What it multiplies it puts `there`, its settings once a range and the rows of a
block as they come; what the products give it takes back `here`, where sums are kept and the small
codes are solved.  So the device holds a block and what it is multiplied with, whatever the budget.
On a processor both return what they are given, and not a bit changes.

Products of float32 are those of torch's ``float32_matmul_precision``, which is full unless a
program lowers it.  With ``CUDA_VISIBLE_DEVICES=`` empty a process keeps to the processor.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def device() -> torch.device:
    """Return the device of this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def there(values: torch.Tensor) -> torch.Tensor:
    """Return values on the device."""
    return values.to(device())


def here(values: torch.Tensor) -> torch.Tensor:
    """Return values in the memory of this process."""
    return values.cpu()
