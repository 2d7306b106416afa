"""Capture: a corpus through a model, once, into a store."""

from actstore.capture.compact import compact
from actstore.capture.plan import Limits
from actstore.capture.run import DTYPES, Settings, run_capture

__all__ = ["DTYPES", "Limits", "Settings", "compact", "run_capture"]
