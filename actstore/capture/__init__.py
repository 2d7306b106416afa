"""Capture: a corpus through a model, once, into a store."""

from actstore.capture.compact import compact
from actstore.capture.estimate import Estimate, run_estimate
from actstore.capture.plan import Limits
from actstore.capture.run import DEFAULT_SITES, DTYPES, Settings, run_capture

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
