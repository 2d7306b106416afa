"""All folds of a band on the device where it lies, for models that run on an accelerator.

`folds` drives them; `band` looks at a band, `pieces` cuts its rows, `lists` and `sums` hold what
runs.
"""

from actstore.folds.device.band import TORCH_DTYPES
from actstore.folds.device.folds import DeviceFolds, state_bytes, temporary_bytes
from actstore.folds.device.pieces import to_device

__all__ = ["TORCH_DTYPES", "DeviceFolds", "state_bytes", "temporary_bytes", "to_device"]
