"""Capture: a corpus through a model, once, into a store."""

from actstore.capturing.compact import compact
from actstore.capturing.estimate import Estimate, run_estimate
from actstore.capturing.plan import Limits
from actstore.capturing.run import DEFAULT_SITES, DTYPES, Settings, run_capture

__all__ = [
    "DEFAULT_SITES",
    "DTYPES",
    "Estimate",
    "Limits",
    "Settings",
    "compact",
    "run_capture",
    "run_estimate",
]
